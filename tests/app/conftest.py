"""What tests of the service may ask for."""

from tests.federation import federation, make_federation
from tests.running import platform

__all__ = ["federation", "make_federation", "platform"]
