"""What tests of the contract may ask for."""

from tests.running import platform

__all__ = ["platform"]
