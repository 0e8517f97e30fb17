"""The contract: every body that crosses the network, every name, every refusal. Pydantic and the standard library."""
