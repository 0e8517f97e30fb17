"""Ledgers get budgets that nobody overdraws: sums, a limit and a hash chain, all kept by Postgres itself.

What was charged before keeps its entry, as a release that nothing bounds. Datasets are closed until their workers
announce them again, with a policy under their signature.
"""

from typing import Final

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision: Final = "2026_11_23_account_for_privacy"
down_revision: Final = "2026_11_23_index_tasks_to_claim"

ORDERS: Final = 76  # of `orders-v1`
GENESIS: Final = "0" * 64
NANO: Final = ARRAY(sa.BigInteger())

FUNCTIONS: Final = {
    "isthmus_not_negative(bigint[], bigint)": """
        CREATE FUNCTION isthmus_not_negative(nano bigint[], draws bigint) RETURNS boolean
        LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT draws >= 0 AND (nano IS NULL OR (array_position(nano, NULL) IS NULL AND 0 <= ALL (nano)))
        $$
    """,
    "isthmus_within_budget(bigint[], bigint, bigint[], bigint, bigint[], bigint)": """
        CREATE FUNCTION isthmus_within_budget(
            limit_nano bigint[], limit_draws bigint,
            reserved_nano bigint[], reserved_draws bigint, spent_nano bigint[], spent_draws bigint
        ) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT CASE WHEN limit_nano IS NULL THEN
                reserved_draws = 0 AND spent_draws = 0 AND 0 = ALL (reserved_nano) AND 0 = ALL (spent_nano)
            ELSE
                reserved_draws + spent_draws <= limit_draws AND EXISTS (
                    SELECT FROM unnest(limit_nano, reserved_nano, spent_nano) AS at_order(allowed, reserved, spent)
                    WHERE reserved + spent <= allowed
                )
            END
        $$
    """,
    "isthmus_sum(bigint[], bigint[], integer)": """
        CREATE FUNCTION isthmus_sum(nano bigint[], other bigint[], sign integer) RETURNS bigint[]
        LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT array_agg(one + sign * two ORDER BY place)
            FROM unnest(nano, other) WITH ORDINALITY AS at_order(one, two, place)
        $$
    """,
    # As `isthmus.privacy.cost.Cost.epsilon`; where nothing is promised, a million, as JSON knows no infinity.
    "isthmus_epsilon(bigint[], bigint, float8, bigint, float8[])": """
        CREATE FUNCTION isthmus_epsilon(
            nano bigint[], draws bigint, delta float8, limit_draws bigint, conversion float8[]
        ) RETURNS float8 LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT CASE
                WHEN draws = 0 AND 0 = ALL (nano) THEN 0
                WHEN conversion IS NULL OR draws > limit_draws THEN 1e6
                ELSE (
                    SELECT greatest(0, least(1e6, min(CASE
                        WHEN divergence >= 128000000000 THEN 1e6
                        WHEN 1 - exp(-divergence / 1e9::float8) < (0.99::float8 * delta) ^ 2 THEN 0
                        ELSE divergence / 1e9::float8 + given
                    END)))
                    FROM unnest(nano, conversion) AS at_order(divergence, given)
                )
            END
        $$
    """,
    "isthmus_field(text)": """
        CREATE FUNCTION isthmus_field(value text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT CASE WHEN value IS NULL THEN '-,'
                   ELSE octet_length(convert_to(value, 'UTF8')) || ':' || value || ',' END
        $$
    """,
    # As `isthmus.privacy.chain.entry_hash`.
    "isthmus_entry_hash(ledger_entries)": """
        CREATE FUNCTION isthmus_entry_hash(entry ledger_entries) RETURNS text LANGUAGE sql STABLE PARALLEL SAFE AS $$
            SELECT encode(sha256(convert_to(
                isthmus_field('isthmus/ledger-entry/v1')
                || isthmus_field(entry.previous_hash)
                || isthmus_field(entry.id::text)
                || isthmus_field(entry.sequence::text)
                || isthmus_field(entry.kind)
                || isthmus_field(entry.lineage)
                || isthmus_field(entry.dataset_id::text)
                || isthmus_field(entry.job_id::text)
                || isthmus_field(entry.participation_id::text)
                || isthmus_field(entry.round_number::text)
                || isthmus_field(entry.release)
                || isthmus_field(entry.mode)
                || isthmus_field(entry.event)
                || isthmus_field(entry.orders_version)
                || isthmus_field(array_to_string(entry.rdp_nano, ' '))
                || isthmus_field(entry.draws::text)
                || isthmus_field(entry.elements::text)
                || isthmus_field(entry.digest)
                || isthmus_field(encode(float8send(entry.reserved_epsilon), 'hex'))
                || isthmus_field(encode(float8send(entry.spent_epsilon), 'hex'))
                || isthmus_field((extract(epoch FROM entry.created_at) * 1000000)::bigint::text),
                'UTF8')), 'hex')
        $$
    """,
    "isthmus_enter()": """
        CREATE FUNCTION isthmus_enter() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            book ledgers%ROWTYPE;
            nothing bigint[];
            costs boolean := NEW.draws <> 0 OR 0 <> ANY (NEW.rdp_nano);
            promised integer := CASE NEW.kind WHEN 'reserve' THEN 1 ELSE -1 END;
            spent integer := CASE NEW.kind WHEN 'spend' THEN 1 ELSE 0 END;
        BEGIN
            PERFORM FROM participations WHERE id = NEW.participation_id FOR NO KEY UPDATE;
            SELECT * INTO book FROM ledgers WHERE id = NEW.ledger_id FOR NO KEY UPDATE;
            IF book.id IS NULL THEN
                RAISE EXCEPTION 'there is no ledger %', NEW.ledger_id USING ERRCODE = 'foreign_key_violation';
            END IF;
            IF NEW.kind NOT IN ('reserve', 'spend', 'refund') OR NEW.orders_version <> book.orders_version
                OR cardinality(NEW.rdp_nano) <> cardinality(book.spent_nano) THEN
                RAISE EXCEPTION 'an entry of another kind, or over other orders' USING ERRCODE = 'check_violation';
            END IF;
            IF costs AND NEW.kind <> 'refund' AND (book.closed OR book.limit_nano IS NULL) THEN
                RAISE EXCEPTION 'ledger % takes no cost', NEW.ledger_id
                    USING ERRCODE = 'check_violation', TABLE = 'ledgers', CONSTRAINT = 'ck_ledgers_within_budget';
            END IF;
            IF costs THEN
                nothing := array_fill(0::bigint, ARRAY[cardinality(book.spent_nano)]);
                UPDATE participations SET
                    reserved_nano = nullif(
                        isthmus_sum(coalesce(reserved_nano, nothing), NEW.rdp_nano, promised), nothing),
                    reserved_draws = reserved_draws + promised * NEW.draws
                WHERE id = NEW.participation_id;
                book.reserved_nano := isthmus_sum(book.reserved_nano, NEW.rdp_nano, promised);
                book.reserved_draws := book.reserved_draws + promised * NEW.draws;
                book.spent_nano := isthmus_sum(book.spent_nano, NEW.rdp_nano, spent);
                book.spent_draws := book.spent_draws + spent * NEW.draws;
            END IF;
            NEW.lineage := book.lineage;
            NEW.sequence := book.head_sequence + 1;
            NEW.previous_hash := book.head_hash;
            NEW.created_at := clock_timestamp();
            NEW.reserved_epsilon := isthmus_epsilon(
                isthmus_sum(book.reserved_nano, book.spent_nano, 1), book.reserved_draws + book.spent_draws,
                book.delta, book.limit_draws, book.conversion);
            NEW.spent_epsilon := isthmus_epsilon(
                book.spent_nano, book.spent_draws, book.delta, book.limit_draws, book.conversion);
            NEW.hash := isthmus_entry_hash(NEW);
            UPDATE ledgers SET
                reserved_nano = book.reserved_nano, reserved_draws = book.reserved_draws,
                spent_nano = book.spent_nano, spent_draws = book.spent_draws,
                unaccounted_releases = unaccounted_releases
                    + CASE WHEN NEW.kind = 'spend' AND NEW.mode = 'none' THEN 1 ELSE 0 END,
                head_sequence = NEW.sequence, head_hash = NEW.hash,
                closed = book.closed AND NOT isthmus_within_budget(
                    book.limit_nano, book.limit_draws,
                    book.reserved_nano, book.reserved_draws, book.spent_nano, book.spent_draws)
            WHERE id = NEW.ledger_id;
            RETURN NEW;
        END
        $$
    """,
    "isthmus_guard_ledger()": """
        CREATE FUNCTION isthmus_guard_ledger() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                IF NEW.head_sequence = 0 AND NEW.reserved_draws = 0 AND NEW.spent_draws = 0
                    AND NEW.unaccounted_releases = 0 AND 0 = ALL (NEW.reserved_nano) AND 0 = ALL (NEW.spent_nano) THEN
                    RETURN NEW;
                END IF;
            ELSIF (OLD.id, OLD.organization_id, OLD.lineage, OLD.orders_version, OLD.reserved_nano, OLD.reserved_draws,
                   OLD.spent_nano, OLD.spent_draws, OLD.unaccounted_releases, OLD.head_sequence, OLD.head_hash)
                = (NEW.id, NEW.organization_id, NEW.lineage, NEW.orders_version, NEW.reserved_nano, NEW.reserved_draws,
                   NEW.spent_nano, NEW.spent_draws, NEW.unaccounted_releases, NEW.head_sequence, NEW.head_hash) THEN
                RETURN NEW;
            END IF;
            RAISE EXCEPTION 'the sums of a ledger change with an entry only' USING ERRCODE = 'restrict_violation';
        END
        $$
    """,
    "isthmus_guard_reservation()": """
        CREATE FUNCTION isthmus_guard_reservation() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'what is reserved changes with an entry of the ledger only'
                USING ERRCODE = 'restrict_violation';
        END
        $$
    """,
}

TRIGGERS: Final = (
    # A change made by the trigger of an entry is not one that anybody else made: it is nested.
    "CREATE TRIGGER ledgers_guarded BEFORE INSERT OR UPDATE ON ledgers FOR EACH ROW "
    "WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION isthmus_guard_ledger()",
    "CREATE TRIGGER ledgers_kept BEFORE DELETE OR TRUNCATE ON ledgers "
    "FOR EACH STATEMENT EXECUTE FUNCTION isthmus_refuse_change()",
    "CREATE TRIGGER participations_guarded BEFORE UPDATE OF reserved_nano, reserved_draws ON participations "
    "FOR EACH ROW WHEN (pg_trigger_depth() = 0 AND (OLD.reserved_nano, OLD.reserved_draws) IS DISTINCT FROM "
    "(NEW.reserved_nano, NEW.reserved_draws)) EXECUTE FUNCTION isthmus_guard_reservation()",
    "CREATE TRIGGER participations_begin_empty BEFORE INSERT ON participations FOR EACH ROW "
    "WHEN (NEW.reserved_nano IS NOT NULL OR NEW.reserved_draws <> 0) EXECUTE FUNCTION isthmus_guard_reservation()",
    "CREATE TRIGGER ledger_entries_entered BEFORE INSERT ON ledger_entries "
    "FOR EACH ROW EXECUTE FUNCTION isthmus_enter()",
)


def upgrade() -> None:
    for name in list(FUNCTIONS)[:5]:
        op.execute(FUNCTIONS[name])
    _create_ledgers()
    _end_unfinished_jobs()
    _rewrite_specs()
    _alter_datasets()
    _create_lineages()
    _alter_participations()
    _alter_ledger_entries()
    op.add_column("rounds", sa.Column("noise_key", sa.LargeBinary(), nullable=True))
    op.alter_column("updates", "blob_key", nullable=True)
    for name in list(FUNCTIONS)[5:]:
        op.execute(FUNCTIONS[name])
    _chain_what_stands()
    for trigger in TRIGGERS:
        op.execute(trigger)


def _create_ledgers() -> None:
    op.create_table(
        "ledgers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("lineage", sa.String(), nullable=False),
        sa.Column("epsilon", sa.Float(), nullable=True),
        sa.Column("delta", sa.Float(), nullable=True),
        sa.Column("orders_version", sa.String(), nullable=False),
        sa.Column("limit_nano", NANO, nullable=True),
        sa.Column("limit_draws", sa.BigInteger(), nullable=True),
        sa.Column("conversion", ARRAY(sa.Double()), nullable=True),
        sa.Column("reserved_nano", NANO, nullable=False),
        sa.Column("reserved_draws", sa.BigInteger(), nullable=False),
        sa.Column("spent_nano", NANO, nullable=False),
        sa.Column("spent_draws", sa.BigInteger(), nullable=False),
        sa.Column("unaccounted_releases", sa.BigInteger(), nullable=False),
        sa.Column("head_sequence", sa.Integer(), nullable=False),
        sa.Column("head_hash", sa.String(), nullable=False),
        sa.Column("closed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ledgers"),
        sa.UniqueConstraint("organization_id", "lineage", name="uq_ledgers_organization_id_lineage"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_ledgers_organization_id_organizations"
        ),
        sa.CheckConstraint(
            "closed OR isthmus_within_budget("
            "limit_nano, limit_draws, reserved_nano, reserved_draws, spent_nano, spent_draws)",
            name=op.f("ck_ledgers_within_budget"),
        ),
        sa.CheckConstraint(
            "isthmus_not_negative(reserved_nano, reserved_draws) AND isthmus_not_negative(spent_nano, spent_draws)",
            name=op.f("ck_ledgers_sums_not_negative"),
        ),
        sa.CheckConstraint("(epsilon IS NULL) = (limit_nano IS NULL)", name=op.f("ck_ledgers_budget_whole")),
    )


def _end_unfinished_jobs() -> None:
    """Jobs that were not over end as failed: workers would refuse their offers.

    `spec_digest` keeps naming the spec that was submitted, as the events do. The rewritten one has another digest, so
    no worker would take it for the job that its steward approved, and no dataset has a plan for it.
    """
    told = "The platform was upgraded while this job was not over, and accounts for privacy now. Submit the job anew."
    op.execute(f"""
        UPDATE tasks SET state = 'cancelled', detail = '{told}', lease_expires_at = NULL
        WHERE state IN ('offered', 'claimed', 'uploading')
    """)  # noqa: S608 -- a constant
    op.execute(f"""
        UPDATE rounds SET phase = 'cancelled', detail = '{told}', completed_at = clock_timestamp()
        WHERE phase IN ('collecting', 'aggregating')
    """)  # noqa: S608 -- a constant
    op.execute(f"""
        UPDATE jobs SET state = 'failed', reason = NULL, detail = '{told}', paused_at = NULL,
            ended_at = clock_timestamp()
        WHERE state IN ('draft', 'awaiting_approval', 'running', 'paused')
    """)  # noqa: S608 -- a constant


def _rewrite_specs() -> None:
    """Specs from before, in the form that is read from now on: nothing was accounted for, so they claim nothing.

    A clip beyond what may be written now is taken for the nearest that may. What a job left to the default for its
    evaluation stays as it was then: with a clip, sites kept their results.
    """
    op.execute("""
        UPDATE jobs SET spec = (old.spec || jsonb_build_object(
            'privacy', jsonb_build_object(
                'unit', 'none', 'where', NULL, 'epsilon', NULL, 'delta', NULL, 'noise_multiplier', NULL,
                'clip_norm', CASE WHEN old.clip_norm IS NOT NULL THEN least(greatest(old.clip_norm, 1e-9), 1e9) END,
                'statistics_noise_multiplier', NULL, 'max_orgs_per_person', 1),
            'evaluation', old.evaluation || jsonb_build_object(
                'noise_multiplier', NULL,
                'release', coalesce(
                    old.evaluation ->> 'release', CASE WHEN old.clip_norm IS NOT NULL THEN 'local' END))
        ))::json
        FROM (
            SELECT id, spec::jsonb AS spec, (spec #>> '{privacy,clip_norm}')::numeric AS clip_norm,
                coalesce(nullif(spec::jsonb -> 'evaluation', 'null'), '{}') AS evaluation
            FROM jobs
        ) old
        WHERE jobs.id = old.id AND old.spec #> '{privacy,unit}' IS NULL
    """)


def _alter_datasets() -> None:
    """Every dataset that stands becomes a lineage of its own, closed until its worker announces it again.

    Nobody has set the empty policy, so the first one that is announced is in force by itself.
    """
    op.add_column("datasets", sa.Column("announced_policy", sa.JSON(), nullable=True))
    op.add_column("datasets", sa.Column("policy_signature", sa.String(), nullable=True))
    op.add_column("datasets", sa.Column("signed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("datasets", sa.Column("lineage", sa.String(), nullable=True))
    op.add_column("datasets", sa.Column("ledger_id", sa.Uuid(), nullable=True))
    op.execute("""
        UPDATE datasets SET announced_policy = '{}', policy = '{}', policy_set_by = NULL, policy_signature = '',
            signed_at = announced_at,
            lineage = encode(sha256(convert_to(id::text, 'UTF8')), 'hex'), ledger_id = gen_random_uuid()
    """)
    op.execute(f"""
        INSERT INTO ledgers (id, organization_id, lineage, orders_version, reserved_nano, reserved_draws, spent_nano,
            spent_draws, unaccounted_releases, head_sequence, head_hash, closed)
        SELECT ledger_id, organization_id, lineage, 'orders-v1', array_fill(0::bigint, ARRAY[{ORDERS}]), 0,
            array_fill(0::bigint, ARRAY[{ORDERS}]), 0, 0, 0, '{GENESIS}', false
        FROM datasets
    """)  # noqa: S608 -- constants
    for column in ("announced_policy", "policy_signature", "signed_at", "lineage", "ledger_id"):
        op.alter_column("datasets", column, nullable=False)
    op.create_foreign_key("fk_datasets_ledger_id_ledgers", "datasets", "ledgers", ["ledger_id"], ["id"])
    op.create_index("ix_datasets_ledger_id", "datasets", ["ledger_id"])


def _create_lineages() -> None:
    op.create_table(
        "lineages",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("lineage", sa.String(), nullable=False),
        sa.Column("ledger_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "lineage", name="pk_lineages"),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_lineages_organization_id_organizations"
        ),
        sa.ForeignKeyConstraint(["ledger_id"], ["ledgers.id"], name="fk_lineages_ledger_id_ledgers"),
    )
    op.create_index("ix_lineages_ledger_id", "lineages", ["ledger_id"])
    op.execute("""
        INSERT INTO lineages (organization_id, lineage, ledger_id)
        SELECT organization_id, lineage, id FROM ledgers
    """)


def _alter_participations() -> None:
    op.add_column("participations", sa.Column("plan", sa.JSON(), nullable=True))
    op.add_column("participations", sa.Column("reserved_nano", NANO, nullable=True))
    op.add_column("participations", sa.Column("reserved_draws", sa.BigInteger(), nullable=False, server_default="0"))
    op.alter_column("participations", "reserved_draws", server_default=None)
    op.create_check_constraint(
        op.f("ck_participations_within_reservation"),
        "participations",
        "isthmus_not_negative(reserved_nano, reserved_draws)",
    )
    op.create_index(
        "ix_participations_reserving", "participations", ["id"], postgresql_where="reserved_nano IS NOT NULL"
    )


def _alter_ledger_entries() -> None:
    op.execute("DROP TRIGGER ledger_entries_append_only ON ledger_entries")
    for column in (
        sa.Column("ledger_id", sa.Uuid()),
        sa.Column("lineage", sa.String()),
        sa.Column("mode", sa.String()),
        sa.Column("event", sa.String()),
        sa.Column("orders_version", sa.String()),
        sa.Column("rdp_nano", NANO),
        sa.Column("draws", sa.BigInteger()),
        sa.Column("reserved_epsilon", sa.Float()),
        sa.Column("spent_epsilon", sa.Float()),
        sa.Column("previous_hash", sa.String()),
        sa.Column("hash", sa.String()),
    ):
        op.add_column("ledger_entries", column)
    op.execute(f"""
        UPDATE ledger_entries e SET ledger_id = d.ledger_id, lineage = d.lineage, mode = 'none', kind = 'spend',
            orders_version = 'orders-v1', rdp_nano = array_fill(0::bigint, ARRAY[{ORDERS}]), draws = 0,
            reserved_epsilon = 0, spent_epsilon = 0, previous_hash = '', hash = ''
        FROM datasets d WHERE d.id = e.dataset_id
    """)  # noqa: S608 -- constants
    for name in ("ledger_id", "lineage", "mode", "orders_version", "rdp_nano", "draws", "reserved_epsilon",
                 "spent_epsilon", "previous_hash", "hash"):  # fmt: skip
        op.alter_column("ledger_entries", name, nullable=False)
    for name in ("round_number", "release", "digest"):
        op.alter_column("ledger_entries", name, nullable=True)
    op.drop_column("ledger_entries", "clip_norm")
    op.drop_column("ledger_entries", "noise_multiplier")
    op.drop_constraint("uq_ledger_entries_dataset_id_sequence", "ledger_entries")
    op.create_unique_constraint("uq_ledger_entries_ledger_id_sequence", "ledger_entries", ["ledger_id", "sequence"])
    op.create_foreign_key("fk_ledger_entries_ledger_id_ledgers", "ledger_entries", "ledgers", ["ledger_id"], ["id"])
    op.create_check_constraint(
        op.f("ck_ledger_entries_spends_name_their_release"),
        "ledger_entries",
        "(kind = 'spend') = (round_number IS NOT NULL AND release IS NOT NULL AND digest IS NOT NULL)",
    )
    op.create_check_constraint(
        op.f("ck_ledger_entries_cost_not_negative"), "ledger_entries", "isthmus_not_negative(rdp_nano, draws)"
    )


def _chain_what_stands() -> None:
    """Entries from before are chained as they stand; from then on they cannot be changed any more."""
    op.execute(f"""
        DO $$
        DECLARE
            entry ledger_entries%ROWTYPE;
            head text;
            of uuid;
        BEGIN
            FOR entry IN SELECT * FROM ledger_entries ORDER BY ledger_id, sequence LOOP
                IF of IS DISTINCT FROM entry.ledger_id THEN
                    of := entry.ledger_id;
                    head := '{GENESIS}';
                END IF;
                entry.previous_hash := head;
                head := isthmus_entry_hash(entry);
                UPDATE ledger_entries SET previous_hash = entry.previous_hash, hash = head WHERE id = entry.id;
                UPDATE ledgers SET head_sequence = entry.sequence, head_hash = head,
                    unaccounted_releases = entry.sequence WHERE id = of;
            END LOOP;
        END
        $$
    """)  # noqa: S608 -- a constant
    op.execute(
        "CREATE TRIGGER ledger_entries_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_entries "
        "FOR EACH STATEMENT EXECUTE FUNCTION isthmus_refuse_change()"
    )


def downgrade() -> None:
    op.execute("DROP TRIGGER ledger_entries_entered ON ledger_entries")
    op.execute("DROP TRIGGER ledger_entries_append_only ON ledger_entries")
    op.execute("DROP TRIGGER participations_guarded ON participations")
    op.execute("DROP TRIGGER participations_begin_empty ON participations")
    op.execute("DELETE FROM ledger_entries WHERE kind <> 'spend'")
    op.execute("DROP FUNCTION isthmus_enter()")
    op.execute("DROP FUNCTION isthmus_entry_hash(ledger_entries)")
    op.drop_constraint(op.f("ck_ledger_entries_spends_name_their_release"), "ledger_entries")
    op.drop_constraint(op.f("ck_ledger_entries_cost_not_negative"), "ledger_entries")
    op.drop_constraint("uq_ledger_entries_ledger_id_sequence", "ledger_entries")
    op.add_column("ledger_entries", sa.Column("clip_norm", sa.Float(), nullable=True))
    op.add_column("ledger_entries", sa.Column("noise_multiplier", sa.Float(), nullable=False, server_default="0"))
    op.alter_column("ledger_entries", "noise_multiplier", server_default=None)
    for name in ("ledger_id", "lineage", "mode", "event", "orders_version", "rdp_nano", "draws", "reserved_epsilon",
                 "spent_epsilon", "previous_hash", "hash"):  # fmt: skip
        op.drop_column("ledger_entries", name)
    for name in ("round_number", "release", "digest"):
        op.alter_column("ledger_entries", name, nullable=False)
    op.create_unique_constraint("uq_ledger_entries_dataset_id_sequence", "ledger_entries", ["dataset_id", "sequence"])
    op.execute(
        "CREATE TRIGGER ledger_entries_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_entries "
        "FOR EACH STATEMENT EXECUTE FUNCTION isthmus_refuse_change()"
    )
    op.execute("UPDATE updates SET blob_key = '' WHERE blob_key IS NULL")
    op.alter_column("updates", "blob_key", nullable=False)
    op.drop_column("rounds", "noise_key")
    op.drop_index("ix_participations_reserving", table_name="participations")
    op.drop_constraint(op.f("ck_participations_within_reservation"), "participations")
    for name in ("plan", "reserved_nano", "reserved_draws"):
        op.drop_column("participations", name)
    op.drop_index("ix_datasets_ledger_id", table_name="datasets")
    for name in ("announced_policy", "policy_signature", "signed_at", "lineage", "ledger_id"):
        op.drop_column("datasets", name)
    op.drop_table("lineages")
    op.drop_table("ledgers")
    for function in FUNCTIONS:
        if function not in ("isthmus_enter()", "isthmus_entry_hash(ledger_entries)"):
            op.execute(f"DROP FUNCTION {function}")
