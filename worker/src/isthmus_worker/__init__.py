"""isthmus-worker: the agent beside an organization's data."""

from typing import Final

VERSION: Final = "0.1.0"
