"""A worker that was killed gets its task back with its next claim: an index for that."""

from typing import Final

from alembic import op

revision: Final = "2026_11_23_index_tasks_to_claim"
down_revision: Final = "2026_11_23_create_queue"


def upgrade() -> None:
    op.drop_index("ix_tasks_offered", table_name="tasks")
    op.create_index(
        "ix_tasks_to_claim", "tasks", ["worker_id", "offered_at"], postgresql_where="state IN ('offered', 'claimed')"
    )


def downgrade() -> None:
    op.drop_index("ix_tasks_to_claim", table_name="tasks")
    op.create_index("ix_tasks_offered", "tasks", ["worker_id", "offered_at"], postgresql_where="state = 'offered'")
