"""Every sweep asks for the jobs that wait for approval: an index for that."""

from typing import Final

from alembic import op

revision: Final = "2026_11_23_index_jobs_by_state"
down_revision: Final = "2026_11_23_secure_aggregation"


def upgrade() -> None:
    op.create_index("ix_jobs_state", "jobs", ["state"])


def downgrade() -> None:
    op.drop_index("ix_jobs_state", table_name="jobs")
