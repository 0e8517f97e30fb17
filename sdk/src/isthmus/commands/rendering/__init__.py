"""The contract's models as text and tables. Values in, renderables out; nothing here asks the service or the clock."""
