"""The Isthmus service: who may do what, the state of rounds, the aggregate, the public ledger."""
