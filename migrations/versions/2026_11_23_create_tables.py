"""Create every table, and the triggers that keep the books append-only."""

from typing import Final

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision: Final = "2026_11_23_create_tables"
down_revision: Final = None

MOMENT: Final = sa.DateTime(timezone=True)
WORD: Final = sa.String(40)  # a member of an enumeration; `isthmus.wire` says which there are

APPEND_ONLY: Final = ("events", "ledger_entries")
TABLES: Final = (
    "organizations",
    "principals",
    "api_keys",
    "idempotency_keys",
    "event_streams",
    "events",
    "enrollment_tokens",
    "workers",
    "datasets",
    "jobs",
    "participations",
    "grants",
    "rounds",
    "tasks",
    "updates",
    "checkpoints",
    "ledger_entries",
)  # each after those that it refers to


def upgrade() -> None:
    _create_organizations()
    _create_principals()
    _create_api_keys()
    _create_idempotency_keys()
    _create_event_streams()
    _create_events()
    _create_enrollment_tokens()
    _create_workers()
    _create_datasets()
    _create_jobs()
    _create_participations()
    _create_grants()
    _create_rounds()
    _create_tasks()
    _create_updates()
    _create_checkpoints()
    _create_ledger_entries()
    _refuse_changes()


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)
    op.execute("DROP FUNCTION isthmus_refuse_change()")


def _refuse_changes() -> None:
    """What happened stays: rows of the books are added, and neither changed nor deleted, whoever asks."""
    op.execute("""
        CREATE FUNCTION isthmus_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'restrict_violation';
        END
        $$
    """)
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION isthmus_refuse_change()"
        )


def _create_organizations() -> None:
    op.create_table(
        "organizations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("display_name", sa.String(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_organizations"),
        sa.UniqueConstraint("name", name="uq_organizations_name"),
    )


def _create_principals() -> None:
    op.create_table(
        "principals",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("display_name", sa.String(), nullable=False),
        sa.Column("role", WORD, nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=True),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("disabled_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_principals"),
        sa.UniqueConstraint("name", name="uq_principals_name"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_principals_organization_id_organizations"
        ),
        sa.CheckConstraint(
            "(role IN ('steward', 'worker')) = (organization_id IS NOT NULL)",
            name=op.f("ck_principals_role_and_organization_agree"),
        ),
    )
    op.create_index("ix_principals_organization_id", "principals", ["organization_id"])


def _create_api_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("principal_id", sa.Uuid(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("scopes", ARRAY(sa.String()), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("expires_at", MOMENT, nullable=True),
        sa.Column("revoked_at", MOMENT, nullable=True),
        sa.Column("last_used_at", MOMENT, nullable=True),
        sa.Column("replaces_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.ForeignKeyConstraint(["principal_id"], ["principals.id"], name="fk_api_keys_principal_id_principals"),
        sa.ForeignKeyConstraint(["replaces_id"], ["api_keys.id"], name="fk_api_keys_replaces_id_api_keys"),
    )
    op.create_index("ix_api_keys_principal_id", "api_keys", ["principal_id"])
    op.create_index("ix_api_keys_replaces_id", "api_keys", ["replaces_id"])


def _create_idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("principal_id", sa.Uuid(), nullable=False),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("body_digest", sa.String(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=True),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("principal_id", "route", "key", name="pk_idempotency_keys"),
        sa.ForeignKeyConstraint(
            ["principal_id"], ["principals.id"], name="fk_idempotency_keys_principal_id_principals"
        ),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])


def _create_event_streams() -> None:
    op.create_table(
        "event_streams",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("head_hash", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_event_streams"),
    )


def _create_events() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("stream", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("previous_hash", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
        sa.UniqueConstraint("stream", "sequence", name="uq_events_stream_sequence"),
        sa.ForeignKeyConstraint(["stream"], ["event_streams.name"], name="fk_events_stream_event_streams"),
    )


def _create_enrollment_tokens() -> None:
    op.create_table(
        "enrollment_tokens",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(), nullable=False),
        sa.Column("created_by", sa.Uuid(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("expires_at", MOMENT, nullable=False),
        sa.Column("used_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_enrollment_tokens"),
        sa.UniqueConstraint("token_hash", name="uq_enrollment_tokens_token_hash"),
        sa.ForeignKeyConstraint(["created_by"], ["principals.id"], name="fk_enrollment_tokens_created_by_principals"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_enrollment_tokens_organization_id_organizations"
        ),
    )
    op.create_index("ix_enrollment_tokens_organization_id", "enrollment_tokens", ["organization_id"])


def _create_workers() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("principal_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("public_key", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("enrolled_at", MOMENT, nullable=False),
        sa.Column("last_seen_at", MOMENT, nullable=True),
        sa.Column("revoked_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
        sa.UniqueConstraint("organization_id", "name", name="uq_workers_organization_id_name"),
        sa.UniqueConstraint("principal_id", name="uq_workers_principal_id"),
        sa.UniqueConstraint("public_key", name="uq_workers_public_key"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_workers_organization_id_organizations"
        ),
        sa.ForeignKeyConstraint(["principal_id"], ["principals.id"], name="fk_workers_principal_id_principals"),
    )


def _create_datasets() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("state", WORD, nullable=False),
        sa.Column("data_schema", sa.JSON(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("task_kinds", ARRAY(sa.String()), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("policy", sa.JSON(), nullable=False),
        sa.Column("policy_set_by", sa.Uuid(), nullable=True),
        sa.Column("announced_at", MOMENT, nullable=False),
        sa.Column("confirmed_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_datasets"),
        sa.UniqueConstraint("organization_id", "name", name="uq_datasets_organization_id_name"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_datasets_organization_id_organizations"
        ),
        sa.ForeignKeyConstraint(["policy_set_by"], ["principals.id"], name="fk_datasets_policy_set_by_principals"),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name="fk_datasets_worker_id_workers"),
        sa.CheckConstraint("rows > 0", name=op.f("ck_datasets_rows_above_zero")),
    )
    op.create_index("ix_datasets_worker_id", "datasets", ["worker_id"])


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("state", WORD, nullable=False),
        sa.Column("reason", WORD, nullable=True),
        sa.Column("detail", sa.String(), nullable=True),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("spec_digest", sa.String(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=True),
        sa.Column("model_digest", sa.String(), nullable=True),
        sa.Column("rounds_completed", sa.Integer(), nullable=False),
        sa.Column("statistics", sa.JSON(), nullable=True),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("paused_at", MOMENT, nullable=True),
        sa.Column("started_at", MOMENT, nullable=True),
        sa.Column("ended_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.ForeignKeyConstraint(["owner_id"], ["principals.id"], name="fk_jobs_owner_id_principals"),
    )
    op.create_index("ix_jobs_owner_id_id", "jobs", ["owner_id", "id"])


def _create_participations() -> None:
    op.create_table(
        "participations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("dataset_id", sa.Uuid(), nullable=False),
        sa.Column("state", WORD, nullable=False),
        sa.Column("detail", sa.String(), nullable=True),
        sa.Column("declared_rows", sa.BigInteger(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_participations"),
        sa.UniqueConstraint("job_id", "dataset_id", name="uq_participations_job_id_dataset_id"),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name="fk_participations_dataset_id_datasets"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_participations_job_id_jobs"),
    )
    op.create_index("ix_participations_dataset_id", "participations", ["dataset_id"])


def _create_grants() -> None:
    op.create_table(
        "grants",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("participation_id", sa.Uuid(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("expires_at", MOMENT, nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.Column("rounds_used", sa.Integer(), nullable=False),
        sa.Column("granted_by", sa.Uuid(), nullable=False),
        sa.Column("granted_at", MOMENT, nullable=False),
        sa.Column("by_rule", sa.Boolean(), nullable=False),
        sa.Column("ended_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_grants"),
        sa.UniqueConstraint("participation_id", name="uq_grants_participation_id"),
        sa.ForeignKeyConstraint(["granted_by"], ["principals.id"], name="fk_grants_granted_by_principals"),
        sa.ForeignKeyConstraint(
            ["participation_id"], ["participations.id"], name="fk_grants_participation_id_participations"
        ),
        sa.CheckConstraint("rounds_used >= 0 AND rounds_used <= rounds", name=op.f("ck_grants_not_overused")),
    )
    op.create_index("ix_grants_expires_at_live", "grants", ["expires_at"], postgresql_where="ended_at IS NULL")


def _create_rounds() -> None:
    op.create_table(
        "rounds",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("phase", WORD, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("cohort_seed", sa.String(), nullable=False),
        sa.Column("cohort_size", sa.Integer(), nullable=False),
        sa.Column("target_updates", sa.Integer(), nullable=False),
        sa.Column("min_updates", sa.Integer(), nullable=False),
        sa.Column("accepted", sa.Integer(), nullable=False),
        sa.Column("model_digest", sa.String(), nullable=False),
        sa.Column("result_digest", sa.String(), nullable=True),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("detail", sa.String(), nullable=True),
        sa.Column("opened_at", MOMENT, nullable=False),
        sa.Column("closes_at", MOMENT, nullable=False),
        sa.Column("grace_s", sa.Float(), nullable=False),
        sa.Column("frozen_at", MOMENT, nullable=True),
        sa.Column("deferred_at", MOMENT, nullable=True),
        sa.Column("completed_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_rounds"),
        sa.UniqueConstraint("job_id", "number", name="uq_rounds_job_id_number"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_rounds_job_id_jobs"),
        sa.CheckConstraint("accepted >= 0 AND accepted <= cohort_size", name=op.f("ck_rounds_accepted_within_cohort")),
        sa.CheckConstraint("kind <> 'train' OR min_updates >= 2", name=op.f("ck_rounds_min_updates_of_two")),
        sa.CheckConstraint("min_updates >= 0", name=op.f("ck_rounds_min_updates_not_negative")),
    )
    op.create_index(
        "ix_rounds_open", "rounds", ["phase", "closes_at"], postgresql_where="phase IN ('collecting', 'aggregating')"
    )
    op.create_index(
        "uq_rounds_one_open_a_job",
        "rounds",
        ["job_id"],
        unique=True,
        postgresql_where="phase IN ('collecting', 'aggregating')",
    )


def _create_tasks() -> None:
    op.create_table(
        "tasks",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("round_id", sa.Uuid(), nullable=False),
        sa.Column("participation_id", sa.Uuid(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("state", WORD, nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("detail", sa.String(), nullable=True),
        sa.Column("admitted_digest", sa.String(), nullable=True),
        sa.Column("offered_at", MOMENT, nullable=False),
        sa.Column("lease_expires_at", MOMENT, nullable=True),
        sa.Column("progress_until", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
        sa.UniqueConstraint("round_id", "participation_id", name="uq_tasks_round_id_participation_id"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_tasks_job_id_jobs"),
        sa.ForeignKeyConstraint(
            ["participation_id"], ["participations.id"], name="fk_tasks_participation_id_participations"
        ),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_tasks_round_id_rounds"),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name="fk_tasks_worker_id_workers"),
    )
    op.create_index(
        "ix_tasks_leased", "tasks", ["lease_expires_at"], postgresql_where="state IN ('claimed', 'uploading')"
    )
    op.create_index("ix_tasks_offered", "tasks", ["worker_id", "offered_at"], postgresql_where="state = 'offered'")
    op.create_index("ix_tasks_participation_id", "tasks", ["participation_id"])


def _create_updates() -> None:
    op.create_table(
        "updates",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("round_id", sa.Uuid(), nullable=False),
        sa.Column("participation_id", sa.Uuid(), nullable=False),
        sa.Column("blob_key", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("l2_norm", sa.Float(), nullable=False),
        sa.Column("released", sa.JSON(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=True),
        sa.Column("excluded", sa.Boolean(), nullable=False),
        sa.Column("received_at", MOMENT, nullable=False),
        sa.Column("signature", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_updates"),
        sa.UniqueConstraint("task_id", name="uq_updates_task_id"),
        sa.ForeignKeyConstraint(
            ["participation_id"], ["participations.id"], name="fk_updates_participation_id_participations"
        ),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_updates_round_id_rounds"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_updates_task_id_tasks"),
    )
    op.create_index("ix_updates_participation_id", "updates", ["participation_id"])
    op.create_index("ix_updates_round_id", "updates", ["round_id"])


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("round_number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("state_digest", sa.String(), nullable=True),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoints"),
        sa.UniqueConstraint("job_id", "round_number", name="uq_checkpoints_job_id_round_number"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_checkpoints_job_id_jobs"),
    )
    op.create_index("ix_checkpoints_digest", "checkpoints", ["digest"])


def _create_ledger_entries() -> None:
    op.create_table(
        "ledger_entries",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("dataset_id", sa.Uuid(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("participation_id", sa.Uuid(), nullable=False),
        sa.Column("round_number", sa.Integer(), nullable=False),
        sa.Column("release", sa.String(), nullable=False),
        sa.Column("clip_norm", sa.Float(), nullable=True),
        sa.Column("noise_multiplier", sa.Float(), nullable=False),
        sa.Column("elements", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ledger_entries"),
        sa.UniqueConstraint("dataset_id", "sequence", name="uq_ledger_entries_dataset_id_sequence"),
        sa.UniqueConstraint("participation_id", "round_number", "release", name="uq_ledger_entries_charge_key"),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name="fk_ledger_entries_dataset_id_datasets"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_ledger_entries_job_id_jobs"),
        sa.ForeignKeyConstraint(
            ["participation_id"], ["participations.id"], name="fk_ledger_entries_participation_id_participations"
        ),
    )
    op.create_index("ix_ledger_entries_job_id", "ledger_entries", ["job_id"])
