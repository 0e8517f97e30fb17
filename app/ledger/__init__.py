"""The public ledger: one entry for everything that was released of a dataset."""
