"""What tests of the service may ask for."""

from tests.running import platform

__all__ = ["platform"]
