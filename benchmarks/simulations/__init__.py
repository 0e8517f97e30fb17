"""The same rounds in several ways, each a process that does one round whenever it is told to."""
