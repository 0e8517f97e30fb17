"""Every sweep asks for the jobs that wait for approval, and for tasks that nobody can do any more: indexes for that."""

from typing import Final

from alembic import op

revision: Final = "2026_11_23_index_what_sweeps_ask"
down_revision: Final = "2026_11_23_secure_aggregation"


def upgrade() -> None:
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_index(
        "ix_tasks_unfinished", "tasks", ["round_id"], postgresql_where="state IN ('offered', 'claimed', 'uploading')"
    )


def downgrade() -> None:
    op.drop_index("ix_tasks_unfinished", table_name="tasks")
    op.drop_index("ix_jobs_state", table_name="jobs")
