"""How alembic reaches the database: one connection, a transaction a migration, one migrating process at a time."""

import os
from typing import Final

from alembic import context
from sqlalchemy import create_engine, pool, text

from app.database import sqlalchemy_url
from app.models import Base

MIGRATING: Final = 0x15_7B_06  # the advisory lock of whoever migrates


def database_url() -> str:
    """The database to migrate; past a transaction pooler, since the lock belongs to a session.

    Raises:
        RuntimeError: nobody said which.
    """
    url = context.config.attributes.get("url") or os.environ.get("ISTHMUS_DATABASE_URL")
    if not url:
        raise RuntimeError("no database to migrate: set ISTHMUS_DATABASE_URL")
    return sqlalchemy_url(url)


def migrate() -> None:
    """Wait for any other migrating process, then apply what it left to do."""
    engine = create_engine(database_url(), poolclass=pool.NullPool)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATING})  # ends with the connection
            connection.commit()
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                transaction_per_migration=True,
                include_name=lambda name, kind, _parents: (
                    kind != "table" or not (name or "").startswith("procrastinate_")
                ),
            )
            with context.begin_transaction():
                context.run_migrations()
    finally:
        engine.dispose()


if context.is_offline_mode():
    raise RuntimeError("migrations are applied to a database; there is no offline mode")
migrate()
