"""Create the queue that work with a body is deferred to. `migrations.procrastinate_schema` says how it is upgraded."""

from typing import Final

from migrations import procrastinate_schema

revision: Final = "2026_11_23_create_queue"
down_revision: Final = "2026_11_23_create_tables"


def upgrade() -> None:
    procrastinate_schema.create()


def downgrade() -> None:
    procrastinate_schema.drop()
