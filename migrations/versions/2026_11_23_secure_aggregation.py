"""Rounds under secure aggregation: their attempts, the members' messages, and blobs that must not be kept."""

import json
from typing import Final

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision: Final = "2026_11_23_secure_aggregation"
down_revision: Final = "2026_11_23_account_for_privacy"

BEFORE: Final = "phase IN ('collecting', 'aggregating')"
OPEN: Final = "phase IN ('collecting', 'survivors', 'unmasking', 'aggregating')"


def upgrade() -> None:
    op.create_table(
        "secured_attempts",
        sa.Column("round_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("step", sa.String(40), nullable=False),
        sa.Column("roster", sa.LargeBinary(), nullable=False),
        sa.Column("roster_digest", sa.String(), nullable=False),
        sa.Column("context", sa.LargeBinary(), nullable=False),
        sa.Column("members", sa.Integer(), nullable=False),
        sa.Column("threshold", sa.Integer(), nullable=False),
        sa.Column("needed", sa.Integer(), nullable=False),
        sa.Column("target", sa.Integer(), nullable=False),
        sa.Column("step_closes_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("keyed", ARRAY(sa.Integer()), nullable=True),
        sa.Column("shared", ARRAY(sa.Integer()), nullable=True),
        sa.Column("survivors", ARRAY(sa.Integer()), nullable=True),
        sa.Column("signed", ARRAY(sa.Integer()), nullable=True),
        sa.Column("answers_needed", sa.Integer(), nullable=False),
        sa.Column("answers_tried", sa.Integer(), nullable=True),
        sa.Column("suspects", ARRAY(sa.String()), nullable=True),
        sa.Column("bound_to", ARRAY(sa.String()), nullable=True),
        sa.Column("progress", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("round_id", name="pk_secured_attempts"),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_secured_attempts_round_id_rounds"),
        sa.CheckConstraint(
            "threshold <= needed AND needed <= members", name=op.f("ck_secured_attempts_enough_can_stay")
        ),
    )
    op.create_index("ix_secured_attempts_step_closes_at", "secured_attempts", ["step_closes_at"])
    op.create_table(
        "secured_members",
        sa.Column("round_id", sa.Uuid(), nullable=False),
        sa.Column("index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("organization", sa.String(), nullable=False),
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("identity", sa.LargeBinary(), nullable=False),
        sa.Column("weight", sa.BigInteger(), nullable=False),
        sa.Column("admitted_digest", sa.String(), nullable=True),
        sa.Column("keys", sa.LargeBinary(), nullable=True),
        sa.Column("shares", sa.LargeBinary(), nullable=True),
        sa.Column("signature", sa.LargeBinary(), nullable=True),
        sa.Column("reveal", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("round_id", "index", name="pk_secured_members"),
        sa.UniqueConstraint("task_id", name="uq_secured_members_task_id"),
        sa.ForeignKeyConstraint(
            ["round_id"], ["secured_attempts.round_id"], name="fk_secured_members_round_id_secured_attempts"
        ),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_secured_members_task_id_tasks"),
    )
    # Ciphertext cannot be compressed; so kept, a slice of it is read without the rest.
    op.execute("ALTER TABLE secured_members ALTER COLUMN shares SET STORAGE EXTERNAL")
    op.create_table(
        "discarded_blobs",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("discarded_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_discarded_blobs"),
    )
    op.alter_column("updates", "l2_norm", nullable=True)
    _index_open_rounds(OPEN)


def _index_open_rounds(phases: str) -> None:
    for name in ("uq_rounds_one_open_a_job", "ix_rounds_open"):
        op.drop_index(name, table_name="rounds")
    op.create_index("uq_rounds_one_open_a_job", "rounds", ["job_id"], unique=True, postgresql_where=sa.text(phases))
    op.create_index("ix_rounds_open", "rounds", ["phase", "closes_at"], postgresql_where=sa.text(phases))


def downgrade() -> None:
    """Jobs under secure aggregation end, and claim to be without it: the version before cannot run or read them."""
    told = "The platform was set back to a version without secure aggregation. Submit the job anew without it."
    secured = "spec::jsonb ->> 'secure_aggregation' IS NOT NULL"
    op.execute(f"""
        UPDATE tasks SET state = 'cancelled', detail = '{told}', lease_expires_at = NULL
        WHERE state IN ('offered', 'claimed', 'uploading') AND job_id IN (SELECT id FROM jobs WHERE {secured})
    """)  # noqa: S608 -- a constant
    op.execute(f"""
        UPDATE rounds SET phase = 'cancelled', detail = '{told}', completed_at = clock_timestamp()
        WHERE {OPEN} AND job_id IN (SELECT id FROM jobs WHERE {secured})
    """)  # noqa: S608 -- a constant
    op.execute(f"""
        UPDATE jobs SET state = 'failed', reason = NULL, detail = '{told}', paused_at = NULL,
            ended_at = clock_timestamp()
        WHERE state IN ('draft', 'awaiting_approval', 'running', 'paused') AND {secured}
    """)  # noqa: S608 -- a constant
    for job_id, spec in op.get_bind().execute(sa.text("SELECT id, spec::text FROM jobs")).all():
        kept = json.loads(spec)
        if "secure_aggregation" in kept:
            del kept["secure_aggregation"]
            op.get_bind().execute(
                sa.text("UPDATE jobs SET spec = CAST(:spec AS json) WHERE id = :id"),
                {"id": job_id, "spec": json.dumps(kept)},
            )
    op.drop_table("secured_members")
    op.drop_table("secured_attempts")
    op.drop_table("discarded_blobs")
    op.execute("UPDATE updates SET l2_norm = 0 WHERE l2_norm IS NULL")
    op.alter_column("updates", "l2_norm", nullable=False)
    _index_open_rounds(BEFORE)
