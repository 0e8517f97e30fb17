"""Everything the server takes from its environment, read once and refused at start rather than at midnight."""

import contextlib
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _seconds(value: Any) -> Any:
    """`2` and `0.5` are seconds; `PT2S` and `00:00:02` are read as they are."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return timedelta(seconds=float(value))
    return value


Span = Annotated[timedelta, BeforeValidator(_seconds), Field(gt=timedelta(0))]


class Settings(BaseSettings):
    """Each field is a variable of the environment: `database_url` is ISTHMUS_DATABASE_URL."""

    model_config = SettingsConfigDict(env_prefix="ISTHMUS_", frozen=True, extra="ignore")

    environment: Literal["development", "production"] = "development"
    host: str = "127.0.0.1"
    port: int = Field(default=8400, ge=0, le=65535)
    data_dir: Path = Path(".isthmus")

    database_url: str | None = None
    """A Postgres of version 15 or later; None: an embedded one under data_dir."""
    database_direct_url: str | None = None
    """Where `database_url` leads to a transaction pooler: the way past it, for LISTEN and advisory locks."""
    database_connections: int = Field(default=10, ge=2, le=1000)

    signing_key_file: Path | None = None
    """Ed25519 in PEM; signs receipts. None: made under data_dir."""

    coordinate: bool = True
    """Open, close and aggregate rounds in this process; False where `isthmus-server coordinate` runs."""
    sweep: Span = timedelta(seconds=1)
    """How often due rounds, leases and grants are looked for."""
    lease: Span = timedelta(seconds=15)
    heartbeat: Span = timedelta(seconds=5)
    longest_wait: Span = timedelta(seconds=60)
    """The longest that a claim may wait."""
    aggregation_retry: Span = timedelta(seconds=5)
    """An aggregation that nobody works on is deferred again after so long."""

    max_json_bytes: int = Field(default=4 << 20, ge=1 << 16)
    max_model_bytes: int = Field(default=8 << 30, ge=1 << 10)
    max_update_bytes: int = Field(default=16 << 30, ge=1 << 10)

    @model_validator(mode="after")
    def _production_names_its_own_parts(self) -> Self:
        if self.environment == "production" and None in (self.database_url, self.signing_key_file):
            raise ValueError("ISTHMUS_DATABASE_URL and ISTHMUS_SIGNING_KEY_FILE must be set in production")
        return self

    @model_validator(mode="after")
    def _leases_outlive_heartbeats(self) -> Self:
        if self.lease <= self.heartbeat:
            raise ValueError("ISTHMUS_LEASE must be longer than ISTHMUS_HEARTBEAT, else every lease is lost")
        return self

    def direct_url(self) -> str:
        """The way to the database past a pooler, for what lives in a session: LISTEN, advisory locks, migrations."""
        return self.database_direct_url or self.resolved_database_url()

    def resolved_database_url(self) -> str:
        """The database to use.

        Raises:
            RuntimeError: none is set; whoever starts the service starts the embedded one first.
        """
        if self.database_url is None:
            raise RuntimeError("no database is set; start the embedded Postgres or set ISTHMUS_DATABASE_URL")
        return self.database_url
