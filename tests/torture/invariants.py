"""What must hold after a job, whatever was done to the processes: looked up in database, blobs and journals.

Nothing is asked of the service here; only the mathematics of the aggregate is its own, because a replay is just that.
Every rule gives sentences about what is wrong; none at all means that all hold.
"""

import hashlib
import itertools
import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from app.blobs import checkpoint_key
from app.credentials import verify
from app.federation.pooling import pool_metrics
from app.rounds.aggregation import write_aggregate
from isthmus.federation.strategies import strategy_of
from isthmus.privacy.chain import ChainBroken
from isthmus.privacy.chain import verify as verify_entries
from isthmus.privacy.rdp import ORDERS
from isthmus.wire.events import GENESIS, event_hash
from isthmus.wire.jobs import JobSpec
from isthmus.wire.ledger import LedgerEntryView
from isthmus.wire.manifest import Manifest
from isthmus.wire.privacy import PrivacyMode
from isthmus.wire.rounds import receipt_bytes

Row = dict[str, Any]
SPENT = ("released", "acknowledged")


@dataclass
class Record:
    """Where to look."""

    connection: psycopg.Connection
    blobs: Path
    """The folder of the service's blob store."""
    journals: Mapping[str, Path]
    """Organization -> its worker's state directory."""
    public_key: str
    """The service's, under which receipts verify."""
    _replays: set[tuple[Any, ...]] = field(default_factory=set)

    def rows(self, statement: str, *values: Any) -> list[Row]:
        """What Postgres answers."""
        with self.connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(statement.encode(), values).fetchall()


def check_job(record: Record, job_id: UUID) -> list[str]:
    """Everything about one job that has ended by completing."""
    (job,) = record.rows("SELECT * FROM jobs WHERE id = %s", job_id)
    rules = (_rounds, _frozen_sets, _receipts, _update_blobs, _replay, _ledger, _journals, _secured, _job_events)
    return [f"job {str(job_id)[-6:]}: {wrong}" for rule in rules for wrong in rule(record, job)]


def check_everything(record: Record, *, most_unreferred: int) -> list[str]:
    """What holds across jobs: ledgers, chains, one open round a job, an idle queue, and a tidy disk.

    Args:
        most_unreferred: so many files that no row names may be left, by processes that were killed.
    """
    rules = (_ledgers, _all_chains, _one_open_round, _idle_queue)
    found = [wrong for rule in rules for wrong in rule(record)]
    unreferred = unreferred_files(record)
    if len(unreferred) > most_unreferred:
        found.append(f"{len(unreferred)} files in the blob store are named by no row; at most {most_unreferred} may be")
    return found


# --- one job ----------------------------------------------------------------------------------------------------------


def _rounds(record: Record, job: Row) -> Iterator[str]:
    """The rounds follow each other, each from the model that the one before published."""
    if job["state"] != "completed":
        yield f"it is {job['state']}: {job['detail']}"
    rounds = record.rows("SELECT * FROM rounds WHERE job_id = %s ORDER BY number", job["id"])
    checkpoints = {
        row["round_number"]: row for row in record.rows("SELECT * FROM checkpoints WHERE job_id = %s", job["id"])
    }
    numbers = [row["number"] for row in rounds]
    if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        yield f"its rounds are {numbers}"
    last = JobSpec.model_validate(job["spec"]).rounds
    if sorted(checkpoints) != list(range(last + 1)):
        yield f"its checkpoints are of rounds {sorted(checkpoints)}, not 0 to {last}"
        return
    model = checkpoints[0]["digest"]
    for row in rounds:
        if row["phase"] != "completed":
            yield f"round {row['number']} is {row['phase']}"
        if row["model_digest"] != model:
            yield f"round {row['number']} did not begin with the model that the round before published"
        if row["kind"] == "train":
            model = checkpoints[row["number"]]["digest"]
        if row["result_digest"] != model:
            yield f"round {row['number']} names another result than its checkpoint"
    if job["model_digest"] != model:
        yield "its model is not the last checkpoint"


def _contributions(record: Record, round_id: UUID) -> list[Row]:
    """All updates of a round, in canonical order of their names."""
    rows = record.rows(
        "SELECT u.*, o.name AS organization, d.name AS dataset FROM updates u"
        " JOIN participations p ON p.id = u.participation_id JOIN datasets d ON d.id = p.dataset_id"
        " JOIN organizations o ON o.id = d.organization_id WHERE u.round_id = %s",
        round_id,
    )
    return sorted(rows, key=lambda row: (row["organization"], row["dataset"]))


def _frozen_sets(record: Record, job: Row) -> Iterator[str]:
    """Every update that was accepted and not withdrawn is in its round's set once, and the record says the same."""
    told = _events(record, f"job:{job['id']}")
    for of in record.rows("SELECT * FROM rounds WHERE job_id = %s ORDER BY number", job["id"]):
        number, updates = of["number"], _contributions(record, of["id"])
        members = [row for row in updates if not row["excluded"]]
        if of["accepted"] != len(members):
            yield f"round {number} counts {of['accepted']} updates and has {len(members)}"
        if [row["position"] for row in members] != list(range(len(members))):
            yield f"round {number}: positions {[row['position'] for row in members]} are not the canonical order"
        if any(row["position"] is not None for row in updates if row["excluded"]):
            yield f"round {number}: an excluded update is in the set"
        doubled = [key for key, count in Counter(row["participation_id"] for row in updates).items() if count > 1]
        if doubled:
            yield f"round {number}: a participation has several updates"
        whole = [event for event in told if event["data"].get("round") == number]
        mine = _of_last_attempt(whole)
        frozen = [event["data"]["updates"] for event in mine if event["kind"] == "round-frozen"]
        listed = [{name: row[name] for name in ("organization", "dataset", "digest", "weight")} for row in members]
        if _is_central(job) and of["kind"] == "train":  # whoever knew a digest could try out guesses at the records
            listed = [{**one, "digest": None} for one in listed]
        if frozen != [listed]:
            yield f"round {number}: the record tells {len(frozen)} freezes, or another set than the updates"
        counts = Counter(event["kind"] for event in mine)
        counts["round-opened"] = sum(event["kind"] == "round-opened" for event in whole)
        for kind, expected in (("round-opened", 1), ("round-completed", 1), ("update-accepted", len(updates))):
            if (count := counts[kind]) != expected:
                yield f"round {number}: {kind} is told {count} times, not {expected}"
        submitted = record.rows("SELECT id FROM tasks WHERE round_id = %s AND state = 'submitted'", of["id"])
        if {row["id"] for row in submitted} != {row["task_id"] for row in members}:
            yield f"round {number}: the submitted tasks are not those with an update"
        if record.rows(
            "SELECT id FROM tasks WHERE round_id = %s AND state IN ('offered', 'claimed', 'uploading')", of["id"]
        ):
            yield f"round {number}: a task is still open"


def _of_last_attempt(told: list[Row]) -> list[Row]:
    """What is told of a round since its last attempt was given up; all of it where none was. What came before is
    gone."""
    aborts = [place for place, event in enumerate(told) if event["kind"] == "attempt-aborted"]
    return told[aborts[-1] + 1 :] if aborts else told


def _receipts(record: Record, job: Row) -> Iterator[str]:
    """Every receipt carries the service's signature."""
    for row in _updates(record, job):
        message = receipt_bytes(row["task_id"], row["digest"], row["received_at"].astimezone(UTC))
        if not verify(record.public_key, message, row["signature"]):
            yield f"the receipt of update {row['digest'][:8]} does not verify"


def _updates(record: Record, job: Row) -> list[Row]:
    return record.rows(
        "SELECT u.*, r.number, r.kind FROM updates u JOIN rounds r ON r.id = u.round_id WHERE r.job_id = %s", job["id"]
    )


def _update_blobs(record: Record, job: Row) -> Iterator[str]:
    """What the rows name lies on the disk, with the bytes that they name; not what was summed under central noise, and
    not what was masked."""
    for row in _updates(record, job):
        if row["kind"] == "train" and (_is_central(job) or _is_secured(job)) and not row["excluded"]:
            if row["blob_key"] is not None:
                yield f"round {row['number']}: an update lies on that was summed under central noise or masked"
        elif not row["excluded"]:
            yield from _blob(record, row["blob_key"], row["digest"], row["size_bytes"])
    for row in record.rows("SELECT * FROM checkpoints WHERE job_id = %s", job["id"]):
        yield from _blob(record, checkpoint_key(row["digest"]), row["digest"], row["size_bytes"])
        if row["state_digest"] is not None:
            yield from _blob(record, checkpoint_key(row["state_digest"]), row["state_digest"], None)


def _is_central(job: Row) -> bool:
    """Whether the service adds the job's noise: then neither updates nor keys are kept."""
    return JobSpec.model_validate(job["spec"]).privacy.mode is PrivacyMode.CENTRAL


def _is_secured(job: Row) -> bool:
    """Whether the updates of its training rounds are masked."""
    return JobSpec.model_validate(job["spec"]).secure_aggregation is not None


def _spends_when_summed(job: Row) -> bool:
    """Whether a training round is spent for with its sum, and not with each admission."""
    return JobSpec.model_validate(job["spec"]).privacy.mode in (PrivacyMode.CENTRAL, PrivacyMode.DISTRIBUTED)


def _blob(record: Record, key: str, digest: str, size_bytes: int | None) -> Iterator[str]:
    path = record.blobs / key
    if not path.is_file():
        yield f"the blob {key} is missing"
        return
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest or size_bytes not in (None, len(content)):
        yield f"the blob {key} does not hold what its row says"


def _replay(record: Record, job: Row) -> Iterator[str]:
    """Each checkpoint is a function of the one before, the ordered set and the strategy's state: compute it again."""
    spec, manifest = JobSpec.model_validate(job["spec"]), Manifest.model_validate(job["manifest"])
    checkpoints = {
        row["round_number"]: row for row in record.rows("SELECT * FROM checkpoints WHERE job_id = %s", job["id"])
    }
    for of in record.rows("SELECT * FROM rounds WHERE job_id = %s AND phase = 'completed'", job["id"]):
        members = [row for row in _contributions(record, of["id"]) if row["position"] is not None]
        if of["metrics"] != pool_metrics([row["released"] for row in members]):
            yield f"round {of['number']}: its metrics are not those of its set"
        if of["noise_key"] is not None:
            yield f"round {of['number']}: the key of its noise is still there"
        if of["kind"] != "train" or _is_central(job) or _is_secured(job):
            continue
        before, after = checkpoints.get(of["number"] - 1), checkpoints.get(of["number"])
        if before is None or after is None:  # told by the rule of the rounds
            continue
        ordered = sorted(members, key=lambda row: row["position"])
        weights = [row["weight"] for row in ordered]
        digests = tuple(row["digest"] for row in ordered)
        key = (str(spec.strategy), before["digest"], before["state_digest"], digests, tuple(weights))
        if (*key, after["digest"], after["state_digest"]) in record._replays:
            continue
        paths = [record.blobs / row["blob_key"] for row in ordered]
        state = before["state_digest"]
        if not all(path.is_file() for path in paths):
            yield f"round {of['number']} cannot be replayed: an update is missing"
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                again = write_aggregate(
                    manifest,
                    strategy_of(spec.strategy),
                    record.blobs / checkpoint_key(before["digest"]),
                    None if state is None else record.blobs / checkpoint_key(state),
                    paths,
                    weights,
                    (Path(folder) / "model", Path(folder) / "state"),
                )
            except (ArithmeticError, ValueError, OSError) as error:
                yield f"round {of['number']} cannot be replayed: {error}"
                continue
        if again != (after["digest"], after["state_digest"]):
            yield f"round {of['number']}: replaying its inputs gives another checkpoint"
        else:
            record._replays.add((*key, *again))


def _ledger(record: Record, job: Row) -> Iterator[str]:
    """What was admitted was spent, once; nothing else was; the grants count the training rounds; and nothing of what
    was reserved is left."""
    everything = record.rows("SELECT * FROM ledger_entries WHERE job_id = %s", job["id"])
    entries = [row for row in everything if row["kind"] == "spend"]
    charged = Counter((row["participation_id"], row["round_number"], row["release"]) for row in entries)
    if twice := [key for key, count in charged.items() if count > 1]:
        yield f"{len(twice)} releases were charged twice"
    admitted = record.rows(
        "SELECT t.participation_id, r.number, t.kind, t.admitted_digest AS digest FROM tasks t"
        " JOIN rounds r ON r.id = t.round_id WHERE t.job_id = %s AND t.admitted_digest IS NOT NULL",
        job["id"],
    )
    if _spends_when_summed(job):  # for its set, and for nothing else
        summed = [row for row in _updates(record, job) if row["position"] is not None and row["kind"] == "train"]
        admitted = [row for row in admitted if row["kind"] != "train"] + summed
    spends = {_spend(job, row, row["round_number"], row["release"]) for row in entries}
    admissions = {_spend(job, row, row["number"], row["kind"]) for row in admitted}
    for key in spends ^ admissions:
        yield f"round {key[1]}: {'charged and not admitted' if key in spends else 'admitted and not charged'}"
    yield from _reservations(record, job, everything)
    for row in _updates(record, job):
        unsummed = _spends_when_summed(job) and row["kind"] == "train" and row["position"] is None
        if not unsummed and _spend(job, row, row["number"], row["kind"]) not in spends:
            yield f"round {row['number']}: an update was accepted that was not charged"
    for row in record.rows(
        "SELECT g.* FROM grants g JOIN participations p ON p.id = g.participation_id WHERE p.job_id = %s", job["id"]
    ):
        rounds = sum(key[0] == row["participation_id"] and key[2] == "train" for key in charged)
        if row["rounds_used"] != rounds:
            yield f"a grant counts {row['rounds_used']} rounds, and {rounds} were charged"


def _spend(job: Row, row: Row, number: int, kind: str) -> tuple[UUID, int, str, str]:
    """What is spent for once. Of a round that was begun again, the first attempt's masked bytes: others' are others."""
    masked = kind == "train" and _is_secured(job)
    return row["participation_id"], number, kind, "masked" if masked else row["digest"]


def _reservations(record: Record, job: Row, entries: list[Row]) -> Iterator[str]:
    """Reserved is spent or refunded, to the unit; and no job spent more than was reserved for it."""
    for part in record.rows("SELECT * FROM participations WHERE job_id = %s", job["id"]):
        mine = sorted(
            (row for row in entries if row["participation_id"] == part["id"]), key=lambda row: row["sequence"]
        )
        promised = [0] * len(ORDERS)
        for row in mine:
            sign = 1 if row["kind"] == "reserve" else -1
            promised = [one + sign * other for one, other in zip(promised, row["rdp_nano"], strict=True)]
            if min(promised) < 0:
                yield f"entry {row['sequence']} takes more than was reserved"
        if any(promised) or part["reserved_nano"] is not None or part["reserved_draws"]:
            yield "something is still reserved for a job that is over"


def _journals(record: Record, job: Row) -> Iterator[str]:
    """Each worker's own account shows at least what the service's does, and every receipt in it stands."""
    parts = record.rows(
        "SELECT p.id, o.name AS organization FROM participations p JOIN datasets d ON d.id = p.dataset_id"
        " JOIN organizations o ON o.id = d.organization_id WHERE p.job_id = %s",
        job["id"],
    )
    entries = record.rows("SELECT * FROM ledger_entries WHERE job_id = %s AND kind = 'spend'", job["id"])
    updates = _updates(record, job)
    for part in parts:
        releases = _releases(record.journals[part["organization"]], str(part["id"]))
        who = part["organization"]
        masked = _masked_digests(record.journals[who], str(part["id"]))
        spent = {
            (row["round_number"], row["kind"]): row["digest"]
            for row in releases
            if row["state"] in SPENT or (row["state"] == "prepared" and row["unanswered"])
        }
        kept = [(row["round_number"], row["kind"]) for row in releases if row["state"] != "discarded"]
        if len(kept) != len(set(kept)):
            yield f"{who} noised twice for one round"
        for entry in entries:
            if entry["participation_id"] == part["id"]:
                mine = spent.get((entry["round_number"], entry["release"]))
                if mine is None:
                    yield f"{who}: its own ledger does not show the spend of round {entry['round_number']}"
                elif entry["digest"] not in masked.get(entry["round_number"], {mine}):
                    yield f"{who}: its ledger and the service's name other bytes for round {entry['round_number']}"
        yield from _own_ledger(who, record.journals[who], str(part["id"]), entries, part["id"])
        stored = {(row["number"], row["kind"]): row for row in updates if row["participation_id"] == part["id"]}
        acknowledged = {(row["round_number"], row["kind"]): row for row in releases if row["state"] == "acknowledged"}
        for key, row in acknowledged.items():
            yield from _acknowledged(who, row, stored.get(key), masked.get(key[0], set()) if row["secured"] else set())
        yield from _files(who, record.journals[who], releases)


def _own_ledger(who: str, state: Path, participation_id: str, entries: list[Row], part: UUID) -> Iterator[str]:
    """The worker's ledger has an entry for each release that the service spent for, of the same cost, and only one."""
    uri = f"{(state / 'journal.sqlite').resolve().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=10)) as connection:
        bodies = [json.loads(row[0]) for row in connection.execute("SELECT body FROM ledger_entries")]
    own = Counter[tuple[int, str]]()
    costs: dict[tuple[int, str], list[int]] = {}
    for body in bodies:
        if body.get("participation_id") == participation_id:
            key = (int(body["round_number"]), str(body["kind"]))
            own[key] += 1
            costs[key] = body["nano"]
    if twice := [key for key, count in own.items() if count > 1]:
        yield f"{who}: its own ledger shows {len(twice)} releases twice"
    for entry in entries:
        if entry["participation_id"] == part:
            key = (entry["round_number"], entry["release"])
            if key not in costs:
                yield f"{who}: its own ledger has no entry for round {entry['round_number']}"
            elif costs[key] != entry["rdp_nano"]:
                yield f"{who}: its own ledger has another cost for round {entry['round_number']}"


def _masked_digests(state: Path, participation_id: str) -> dict[int, set[str]]:
    """What left in a participation's secured rounds, by round: one digest an attempt."""
    found: dict[int, set[str]] = {}
    for row in _rows_of(state, "SELECT * FROM sessions WHERE participation_id = ?", participation_id):
        if row["masked_digest"] is not None:
            found.setdefault(row["round_number"], set()).add(row["masked_digest"])
    return found


def _acknowledged(who: str, release: Row, update: Row | None, masked: Collection[str]) -> Iterator[str]:
    """The receipt is that of the stored update, or of the masked bytes of an attempt that was given up."""
    number = release["round_number"]
    if update is None:
        yield f"{who}: round {number} was acknowledged and its update is nowhere"
        return
    receipt = json.loads(release["receipt"])
    of_another_attempt = receipt["digest"] in masked and receipt["digest"] != update["digest"]
    same = (
        receipt["task_id"] == str(update["task_id"])
        and receipt["digest"] == update["digest"]
        and receipt["digest"] in (masked or {release["digest"]})
        and datetime.fromisoformat(receipt["received_at"]) == update["received_at"]
        and receipt["signature"] == update["signature"]
    )
    if not same and not of_another_attempt:
        yield f"{who}: the receipt of round {number} is not that of the stored update"
    if masked and update["digest"] not in masked:
        yield f"{who}: round {number} has an update that this worker never masked"
    if not update["excluded"] and update["position"] is None:
        yield f"{who}: round {number} was acknowledged and is not in the set"


def _rows_of(state: Path, statement: str, *values: str) -> list[Row]:
    uri = f"{(state / 'journal.sqlite').resolve().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=10)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(statement, values)]


def _releases(state: Path, participation_id: str) -> list[Row]:
    return _rows_of(state, "SELECT * FROM releases WHERE participation_id = ?", participation_id)


def _files(who: str, state: Path, releases: list[Row]) -> Iterator[str]:
    """Bytes that wait to be sent are what was noised; acknowledged ones are gone, but for a vector that is kept until a
    later round."""
    for row in releases:
        if (name := row["file"] or row["vector"]) is None:
            continue
        if row["state"] == "discarded" or (row["state"] == "acknowledged" and not row["secured"]):
            yield f"{who}: round {row['round_number']} is {row['state']} and its bytes are still held"
            continue
        path = state / "releases" / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != row["digest"]:
            yield f"{who}: the bytes of round {row['round_number']} are not those of its row"


# --- secured rounds ---------------------------------------------------------------------------------------------------


SECRET: Final = ("offer", "secrets", "keys_answer", "shares_answer", "survivors", "receipt")
"""Columns of a worker's session that are empty when it is over."""


def _secured(record: Record, job: Row) -> Iterator[str]:
    """When rounds are over nothing is left that could unmask an update; and every worker signed one set an attempt, and
    told shares for one set a round."""
    for table in ("secured_attempts", "secured_members"):
        for row in record.rows(
            f"SELECT DISTINCT r.number FROM {table} s JOIN rounds r ON r.id = s.round_id"
            " WHERE r.job_id = %s AND r.phase IN ('completed', 'failed', 'cancelled')",
            job["id"],
        ):
            yield f"round {row['number']} is over and {table} has rows of it"
    if record.rows("SELECT 1 AS one FROM discarded_blobs LIMIT 1"):
        yield "blobs are noted as discarded and were not deleted"
    if _is_secured(job):
        for of in record.rows("SELECT * FROM rounds WHERE job_id = %s AND kind = 'train'", job["id"]):
            yield from _attempts_told(record, job, of)
    for part in record.rows(
        "SELECT p.id, o.name AS organization FROM participations p JOIN datasets d ON d.id = p.dataset_id"
        " JOIN organizations o ON o.id = d.organization_id WHERE p.job_id = %s",
        job["id"],
    ):
        yield from _sessions(record, job, part["organization"], str(part["id"]))


STORY: Final = ("keys-closed", "shares-closed", "round-frozen", "survivors-signed", "unmasked")
"""What is told of the attempt that came through, in this order."""


def _attempts_told(record: Record, job: Row, of: Row) -> Iterator[str]:
    """The record tells every step of the attempt that came through, and as many that did not as there were."""
    told = [row for row in _events(record, f"job:{job['id']}") if row["data"].get("round") == of["number"]]
    if (aborts := sum(row["kind"] == "attempt-aborted" for row in told)) != of["attempt"] - 1:
        yield f"round {of['number']}: {aborts} attempts were given up, and it came through in attempt {of['attempt']}"
    last = [row["kind"] for row in told if row["data"].get("attempt") == of["attempt"] and row["kind"] in STORY]
    steps = [kind for number, kind in enumerate(last) if kind not in last[:number]]  # unmasked anew after wrong shares
    if steps != list(STORY):
        yield f"round {of['number']}: of its last attempt the record tells {steps}"


def _sessions(record: Record, job: Row, who: str, participation_id: str) -> Iterator[str]:
    """One worker's own account of a job's secured rounds."""
    state = record.journals[who]
    sessions = _rows_of(state, "SELECT * FROM sessions WHERE participation_id = ?", participation_id)
    for row in sessions:
        where = f"{who}: attempt {row['attempt']} of round {row['round_number']}"
        if row["state"] != "over":
            yield f"{where} is over and its session is {row['state']}"
        elif left := [name for name in SECRET if row[name] is not None]:
            yield f"{where} is over and its {', '.join(left)} are still in the journal"
    digests = [row["masked_digest"] for row in sessions if row["masked_digest"] is not None]
    if len(digests) != len(set(digests)):
        yield f"{who}: two attempts have the same masks"
    if left_files := sorted(path.name for path in (state / "masked").glob(f"{participation_id}-*")):
        yield f"{who}: {len(left_files)} masked updates were not deleted"
    for number in sorted({row["round_number"] for row in sessions}):
        sets = {row["revealed_for"] for row in sessions if row["round_number"] == number and row["revealed_for"]}
        if len(sets) > 1:
            yield f"{who}: shares of round {number} were told for two sets of survivors"
        (of,) = record.rows("SELECT id FROM rounds WHERE job_id = %s AND number = %s", job["id"], number)
        members = [row for row in _contributions(record, of["id"]) if row["position"] is not None]
        summed = [f"{row['organization']}/{row['dataset']}" for row in members]
        for one in sets:
            if [each["member"] for each in json.loads(one)["survivors"]] != summed:
                yield f"{who}: shares of round {number} were told for another set than was summed"


def _job_events(record: Record, job: Row) -> Iterator[str]:
    yield from _chain(record, f"job:{job['id']}")


# --- across jobs ------------------------------------------------------------------------------------------------------


def _events(record: Record, stream: str) -> list[Row]:
    return record.rows("SELECT * FROM events WHERE stream = %s ORDER BY sequence", stream)


def _chain(record: Record, stream: str) -> Iterator[str]:
    """Numbered without gaps, each naming its predecessor's hash, up to the head."""
    previous = GENESIS
    sequence = 0
    for sequence, row in enumerate(_events(record, stream), 1):
        expected = event_hash(
            stream=stream, sequence=sequence, kind=row["kind"], at=row["at"].astimezone(UTC), actor=row["actor"],
            data=row["data"], previous_hash=previous,
        )  # fmt: skip
        if row["sequence"] != sequence or row["previous_hash"] != previous or row["hash"] != expected:
            yield f"{stream}: event {sequence} is missing, out of order or changed"
            return
        previous = row["hash"]
    heads = record.rows("SELECT * FROM event_streams WHERE name = %s", stream)
    if [(row["sequence"], row["head_hash"]) for row in heads] != [(sequence, previous)]:
        yield f"{stream}: the chain does not end at its head"


def _all_chains(record: Record) -> Iterator[str]:
    for row in record.rows("SELECT name FROM event_streams"):
        yield from _chain(record, row["name"])


def _ledgers(record: Record) -> Iterator[str]:
    """Every ledger's entries are numbered without gaps and chained up to its head, and its sums are theirs."""
    for ledger in record.rows("SELECT * FROM ledgers"):
        who = f"the ledger {ledger['id']}"
        rows = record.rows("SELECT * FROM ledger_entries WHERE ledger_id = %s ORDER BY sequence", ledger["id"])
        if [row["sequence"] for row in rows] != list(range(1, len(rows) + 1)):
            yield f"{who} is not numbered without gaps"
            continue
        views = [
            LedgerEntryView.model_validate({**row, "event": None if row["event"] is None else json.loads(row["event"])})
            for row in rows
        ]
        try:
            verify_entries(views, until=(ledger["head_sequence"], ledger["head_hash"]))
        except ChainBroken as error:
            yield f"{who}: {error}"
        reserved, spent = [0] * len(ORDERS), [0] * len(ORDERS)
        for row in rows:
            sign = 1 if row["kind"] == "reserve" else -1
            reserved = [one + sign * other for one, other in zip(reserved, row["rdp_nano"], strict=True)]
            if row["kind"] == "spend":
                spent = [one + other for one, other in zip(spent, row["rdp_nano"], strict=True)]
        if (reserved, spent) != (ledger["reserved_nano"], ledger["spent_nano"]):
            yield f"{who}: its sums are not those of its entries"


def _one_open_round(record: Record) -> Iterator[str]:
    for row in record.rows(
        "SELECT job_id, count(*) AS open FROM rounds"
        " WHERE phase IN ('collecting', 'survivors', 'unmasking', 'aggregating') GROUP BY 1"
    ):
        if row["open"] > 1:
            yield f"job {row['job_id']} has {row['open']} open rounds"


def _idle_queue(record: Record) -> Iterator[str]:
    """No queue job waits, and none that a killed process left behind is of a round that still wants it."""
    for row in record.rows("SELECT status, args FROM procrastinate_jobs"):
        wanted = record.rows(
            "SELECT 1 AS one FROM rounds WHERE id = %s AND phase = 'aggregating'", UUID(row["args"]["round_id"])
        )
        if row["status"] == "todo" or wanted:
            yield f"a job of the queue is {row['status']} for round {row['args']['round_id']}"


def unreferred_files(record: Record) -> list[str]:
    """Files in the blob store that no row names: drafts, and what killed processes had stored and not recorded."""
    named = {
        row["blob_key"]
        for row in record.rows("SELECT blob_key FROM updates WHERE NOT excluded AND blob_key IS NOT NULL")
    }
    for row in record.rows("SELECT digest, state_digest FROM checkpoints"):
        named |= {checkpoint_key(digest) for digest in (row["digest"], row["state_digest"]) if digest is not None}
    present = {str(path.relative_to(record.blobs)) for path in record.blobs.rglob("*") if path.is_file()}
    return sorted(present - named)


def digests_of(record: Record, job_id: UUID) -> tuple[str, ...]:
    """The job's checkpoints, in the order of their rounds, with the strategy's states."""
    rows = record.rows("SELECT digest, state_digest FROM checkpoints WHERE job_id = %s ORDER BY round_number", job_id)
    return tuple(itertools.chain.from_iterable((row["digest"], row["state_digest"] or "-") for row in rows))


def spends_of(record: Record, job_ids: Collection[UUID]) -> int:
    """How many releases were charged for jobs."""
    (row,) = record.rows(
        "SELECT count(*) AS spends FROM ledger_entries WHERE kind = 'spend' AND job_id = ANY(%s)", list(job_ids)
    )
    return int(row["spends"])
