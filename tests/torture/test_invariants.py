"""The checks of the invariants: silent where all is well, and each says so when what it looks at is broken."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from tests.torture.finished import ROUNDS, Finished, finished
from tests.torture.invariants import Record, check_everything, check_job, digests_of, spends_of, unreferred_files

__all__ = ["finished"]

Break = Callable[[Record], None]


@pytest.fixture
def record(finished: Finished, tmp_path: Path) -> Iterator[Record]:
    """The record, in a transaction that is rolled back and on copies of the files."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder)
    with psycopg.connect(finished.database_url) as connection:
        yield finished.record(connection, folder)
        connection.rollback()


def wrong_with(record: Record, finished: Finished) -> list[str]:
    """All that the checks find."""
    return check_job(record, finished.job_id) + check_everything(record, most_unreferred=0)


def test_nothing_is_wrong_with_a_finished_job(record: Record, finished: Finished) -> None:
    assert wrong_with(record, finished) == []
    assert spends_of(record, [finished.job_id]) == 3 * ROUNDS
    digests = digests_of(record, finished.job_id)
    assert len(set(digests)) == 2 * (ROUNDS + 1), "no two models or states are alike"
    assert not unreferred_files(record)


def statement(text: str, *, table: str | None = None) -> Break:
    """Change rows, though they be append-only."""

    def act(record: Record) -> None:
        if table is not None:
            record.connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER".encode())
        cursor = record.connection.execute(text.encode())
        assert cursor.rowcount != 0, f"{text} changed nothing"

    return act


def journal(text: str, rows: int = 1) -> Break:
    """Change a worker's journal."""

    def act(record: Record) -> None:
        with closing(sqlite3.connect(record.journals["clinic-01"] / "journal.sqlite")) as connection, connection:
            assert connection.execute(text).rowcount == rows

    return act


def session(state: str, **columns: str) -> Break:
    """Give a worker a session of round 2."""
    names, values = ", ".join(["state", *columns]), ", ".join([state, *columns.values()])
    return journal(
        f"INSERT INTO sessions (participation_id, round_number, attempt, round_id, began_at, {names})"
        f" SELECT participation_id, 2, 1, 'x', 'x', {values} FROM releases WHERE round_number = 2"
    )


def file_of(query: str, change: Callable[[Path], None]) -> Break:
    """Change the file of a blob whose key the query gives."""

    def act(record: Record) -> None:
        row = record.connection.execute(query.encode()).fetchone()
        assert row is not None
        change(record.blobs / row[0])

    return act


def flip(path: Path) -> None:
    """One bit of the last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def litter(record: Record) -> None:
    """A draft that nobody names."""
    (record.blobs / "drafts" / "0123").write_bytes(b"half")


ONE_UPDATE = "(SELECT u.id FROM updates u JOIN rounds r ON r.id = u.round_id WHERE r.number = 2 ORDER BY u.id LIMIT 1)"
ONE_TASK = f"(SELECT task_id FROM updates WHERE id = {ONE_UPDATE})"
ONE_ENTRY = "(SELECT id FROM ledger_entries WHERE round_number = 2 ORDER BY id LIMIT 1)"
ANOTHER = "repeat('0', 64)"
CHECKPOINT_KEY = "'checkpoints/' || left(digest, 2) || '/' || digest"
STATE_KEY = "'checkpoints/' || left(state_digest, 2) || '/' || state_digest"

BREAKS: dict[str, tuple[Break, str]] = {
    "a ledger row is deleted": (
        statement(f"DELETE FROM ledger_entries WHERE id = {ONE_ENTRY}", table="ledger_entries"),
        "admitted and not charged",
    ),
    "a ledger row names other bytes": (
        statement(f"UPDATE ledger_entries SET digest = {ANOTHER} WHERE id = {ONE_ENTRY}", table="ledger_entries"),
        "charged and not admitted",
    ),
    "a ledger row costs less": (
        statement(f"UPDATE ledger_entries SET draws = 5 WHERE id = {ONE_ENTRY}", table="ledger_entries"),
        "tampered with at entry",
    ),
    "a ledger's sum is not its entries'": (
        statement(
            "UPDATE ledgers SET spent_nano[1] = 7, closed = true WHERE id ="
            " (SELECT id FROM ledgers ORDER BY id LIMIT 1)",
            table="ledgers",
        ),
        "its sums are not those of its entries",
    ),
    "a reservation is left": (
        statement(
            "UPDATE participations SET reserved_draws = 5 WHERE id ="
            " (SELECT id FROM participations ORDER BY id LIMIT 1)",
            table="participations",
        ),
        "still reserved for a job that is over",
    ),
    "a worker's own ledger counts a release twice": (
        journal(
            "INSERT INTO ledger_entries SELECT lineage, 99, body, previous_hash, hash FROM ledger_entries"
            " WHERE sequence = 2"
        ),
        "shows 1 releases twice",
    ),
    "a release is charged twice": (
        statement(
            "ALTER TABLE ledger_entries DROP CONSTRAINT uq_ledger_entries_charge_key;"
            "INSERT INTO ledger_entries (id, ledger_id, dataset_id, kind, mode, orders_version, rdp_nano, draws,"
            " job_id, participation_id, round_number, release, elements, digest) SELECT gen_random_uuid(), ledger_id,"
            " dataset_id, kind, mode, orders_version, rdp_nano, draws, job_id, participation_id, round_number, release,"
            f" elements, digest FROM ledger_entries WHERE id = {ONE_ENTRY}"
        ),
        "charged twice",
    ),
    "a ledger has a gap": (
        statement(
            "UPDATE ledger_entries SET sequence = 99 WHERE id ="
            " (SELECT id FROM ledger_entries WHERE sequence = 3 ORDER BY id LIMIT 1)",
            table="ledger_entries",
        ),
        "not numbered without gaps",
    ),
    "an update is doubled": (
        statement(
            "ALTER TABLE updates DROP CONSTRAINT uq_updates_task_id;"
            "INSERT INTO updates SELECT gen_random_uuid(), task_id, round_id, participation_id, blob_key, digest,"
            " size_bytes, weight, l2_norm, released, 3, excluded, received_at, signature"
            f" FROM updates WHERE id = {ONE_UPDATE}"
        ),
        "a participation has several updates",
    ),
    "an update is left out of the set": (
        statement(f"UPDATE updates SET position = NULL WHERE id = {ONE_UPDATE}"),
        "are not the canonical order",
    ),
    "an acknowledged update is not in the set": (
        statement(f"UPDATE updates SET position = NULL WHERE id = {ONE_UPDATE}"),
        "was acknowledged and is not in the set",
    ),
    "the set is in another order": (
        statement(
            "UPDATE updates SET position = 2 - position WHERE position <> 1 AND round_id ="
            " (SELECT id FROM rounds WHERE number = 2)"
        ),
        "are not the canonical order",
    ),
    "an update vanishes": (statement(f"DELETE FROM updates WHERE id = {ONE_UPDATE}"), "its update is nowhere"),
    "a weight is changed": (
        statement(f"UPDATE updates SET weight = weight + 1 WHERE id = {ONE_UPDATE}"),
        "gives another checkpoint",
    ),
    "an excluded update is in the set": (
        statement(f"UPDATE updates SET excluded = true WHERE id = {ONE_UPDATE}"),
        "an excluded update is in the set",
    ),
    "a receipt is signed by nobody": (
        statement(f"UPDATE updates SET signature = repeat('0', 128) WHERE id = {ONE_UPDATE}"),
        "does not verify",
    ),
    "a metric is changed": (
        statement("""UPDATE rounds SET metrics = '{"train/loss": 0}' WHERE number = 2"""),
        "its metrics are not those of its set",
    ),
    "an update's bytes are changed": (
        file_of(f"SELECT blob_key FROM updates WHERE id = {ONE_UPDATE}", flip),
        "does not hold what its row says",
    ),
    "an update's bytes are gone": (
        file_of(f"SELECT blob_key FROM updates WHERE id = {ONE_UPDATE}", Path.unlink),
        "cannot be replayed",
    ),
    "a checkpoint's bytes are changed": (
        file_of(f"SELECT {CHECKPOINT_KEY} FROM checkpoints WHERE round_number = 2", flip),
        "does not hold what its row says",
    ),
    "a strategy's state is gone": (
        file_of(f"SELECT {STATE_KEY} FROM checkpoints WHERE round_number = 2", Path.unlink),
        "is missing",
    ),
    "a strategy's state is another": (
        statement(
            "UPDATE checkpoints SET state_digest = (SELECT state_digest FROM checkpoints WHERE round_number = 1)"
            " WHERE round_number = 2"
        ),
        "gives another checkpoint",
    ),
    "a round begins with an older model": (
        statement(
            "UPDATE rounds SET model_digest = (SELECT digest FROM checkpoints WHERE round_number = 1) WHERE number = 3"
        ),
        "did not begin with the model",
    ),
    "a checkpoint is missing": (statement("DELETE FROM checkpoints WHERE round_number = 2"), "checkpoints are of"),
    "a counter is off": (statement("UPDATE rounds SET accepted = 2 WHERE number = 2"), "counts 2 updates and has 3"),
    "two rounds are open": (
        statement(
            "DROP INDEX uq_rounds_one_open_a_job; UPDATE rounds SET phase = 'collecting' WHERE number < 3"
        ),
        "has 2 open rounds",
    ),
    "a task is still open": (
        statement(f"UPDATE tasks SET state = 'claimed' WHERE id = {ONE_TASK}"),
        "a task is still open",
    ),
    "a grant counts too few rounds": (
        statement("UPDATE grants SET rounds_used = 2 WHERE id = (SELECT id FROM grants ORDER BY id LIMIT 1)"),
        "a grant counts 2 rounds, and 3 were charged",
    ),
    "an event is changed": (
        statement("""UPDATE events SET actor = 'nobody' WHERE kind = 'job-completed'""", table="events"),
        "missing, out of order or changed",
    ),
    "an event is deleted": (
        statement("DELETE FROM events WHERE kind = 'job-completed'", table="events"),
        "does not end at its head",
    ),
    "a freeze is told twice": (
        statement("UPDATE events SET kind = 'round-frozen' WHERE kind = 'round-completed' AND (data->>'round') = '2'"
                  , table="events"),
        "the record tells 2 freezes",
    ),
    "a job of the queue waits": (
        statement(
            "INSERT INTO procrastinate_jobs (queue_name, task_name, args) SELECT 'rounds', 'aggregate_round',"
            " json_build_object('round_id', id) FROM rounds WHERE number = 2"
        ),
        "a job of the queue is todo",
    ),
    "a draft is left": (litter, "named by no row"),
    "a worker's journal lacks a spend": (
        journal("DELETE FROM releases WHERE round_number = 2"),
        "does not show the spend of round 2",
    ),
    "a worker's journal takes a spend back": (
        journal("UPDATE releases SET state = 'discarded' WHERE round_number = 2"),
        "does not show the spend of round 2",
    ),
    "a worker's journal names other bytes": (
        journal("UPDATE releases SET digest = '0000' WHERE round_number = 2"),
        "name other bytes for round 2",
    ),
    "a worker's receipt is another": (
        journal("UPDATE releases SET receipt = replace(receipt, 'ture\":\"', 'ture\":\"00') WHERE round_number = 2"),
        "the receipt of round 2 is not that of the stored update",
    ),
    "a worker noised twice": (
        journal(
            "INSERT INTO releases (id, participation_id, round_number, model_digest, spec_digest, kind, state, job,"
            " dataset, task_id, fence, digest, size_bytes, noise_multiplier, prepared_at) SELECT 99, participation_id,"
            " round_number, 'another model', spec_digest, kind, 'prepared', job, dataset, task_id, fence, digest,"
            " size_bytes, noise_multiplier, prepared_at FROM releases WHERE round_number = 2"
        ),
        "noised twice for one round",
    ),
    "a roster outlives its round": (
        statement(
            "INSERT INTO secured_attempts (round_id, attempt, step, roster, roster_digest, context, members, threshold,"
            " needed, target, answers_needed) SELECT id, 1, 'unmask', 'x', 'x', 'x', 3, 3, 3, 3, 3 FROM rounds"
            " WHERE number = 2"
        ),
        "round 2 is over and secured_attempts has rows of it",
    ),
    "masked updates are not deleted": (
        statement("INSERT INTO discarded_blobs (key, discarded_at) VALUES ('updates/x', now())"),
        "were not deleted",
    ),
    "a worker keeps secrets of a round that is over": (
        session("'over'", secrets="x'00'"),
        "its secrets are still in the journal",
    ),
    "a worker's session is never over": (
        session("'signed'"),
        "is over and its session is signed",
    ),
    "a worker told shares for two sets": (
        journal(
            "INSERT INTO sessions (participation_id, round_number, attempt, round_id, state, revealed_for, began_at)"
            " SELECT participation_id, 2, column1, 'x', 'over', column2, 'x' FROM releases,"
            """ (VALUES (1, '{"survivors":[{"member":"a/b"}]}'), (2, '{"survivors":[{"member":"a/c"}]}'))"""
            " WHERE round_number = 2",
            rows=2,
        ),
        "were told for two sets of survivors",
    ),
    "a worker told shares for another set than was summed": (
        session("'over'", revealed_for="""'{"survivors":[{"member":"clinic-00/patients"}]}'"""),
        "were told for another set than was summed",
    ),
    "a worker masks two vectors with the same masks": (
        journal(
            "INSERT INTO sessions (participation_id, round_number, attempt, round_id, state, masked_digest, began_at)"
            " SELECT participation_id, 2, column1, 'x', 'over', 'same', 'x' FROM releases, (VALUES (1), (2))"
            " WHERE round_number = 2",
            rows=2,
        ),
        "two attempts have the same masks",
    ),
    "a worker holds bytes that it lost": (
        journal("UPDATE releases SET state = 'released', file = 'gone' WHERE round_number = 2"),
        "are not those of its row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_found(record: Record, finished: Finished, name: str) -> None:
    act, expected = BREAKS[name]
    act(record)
    found = wrong_with(record, finished)
    assert any(expected in wrong for wrong in found), found


def test_a_job_that_failed_is_not_taken_for_completed(record: Record, finished: Finished) -> None:
    record.connection.execute("UPDATE jobs SET state = 'failed', detail = 'too bad'")
    assert any("it is failed: too bad" in wrong for wrong in wrong_with(record, finished))
