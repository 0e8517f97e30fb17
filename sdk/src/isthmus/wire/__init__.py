"""The contract: every body that crosses the network, every name and every refusal. Pydantic and the standard library."""
