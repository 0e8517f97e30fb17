"""Isthmus: organizations train a model together; data stays, the model moves."""

__version__ = "0.1.0"
