"""Secure aggregation from end to end: real processes, real data, killed in the middle; and the sum is the plain one."""

import csv
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg import sql

from app.blobs import checkpoint_key
from isthmus.codec import arrays
from isthmus.codec.blocks import TensorFile, TensorFileWriter
from isthmus.federation.aggregation import MemorySource
from isthmus.federation.secured import SUM, aggregate_sum, quantise
from isthmus.federation.strategies import strategy_of
from isthmus.wire.events import verify_chain
from isthmus.wire.jobs import JobSpec, JobState, JobView
from isthmus.wire.manifest import update_manifest
from isthmus.wire.secured import MASKED
from isthmus_worker.journal import Journal
from isthmus_worker.state import StateDir
from tests.acceptance import island
from tests.acceptance.island import job_spec, until
from tests.postgres_plugin import _drop, _with_database
from tests.torture.ground import Ground, ground
from tests.torture.invariants import check_job

HEART = Path(__file__).parents[2] / "examples" / "heart" / "data"
FEATURES = ("age", "sex", "chest_pain")
PAINS = ["typical angina", "atypical angina", "non-anginal", "asymptomatic"]
OF_HEARTS: dict[str, Any] = {
    "data": {
        "task": "classification",
        "features": [
            "age", {"name": "sex", "categories": ["Female", "Male"]}, {"name": "chest_pain", "categories": PAINS}
        ],
        "target": "disease",
        "classes": 2,
    },
    "model": {"layers": [{"linear": {"in": 7, "out": 4}}, "relu", {"linear": {"in": 4, "out": 2}}]},
}  # fmt: skip
OF_PATIENTS: dict[str, Any] = {
    "data": {
        "task": "classification",
        "features": ["age", {"name": "sex", "categories": ["Female", "Male"]}],
        "target": "disease",
        "classes": 2,
    },
    "model": {"layers": [{"linear": {"in": 3, "out": 4}}, "relu", {"linear": {"in": 4, "out": 2}}]},
}
WIDE = {"layers": [{"linear": {"in": 3, "out": 256}}, "relu", {"linear": {"in": 256, "out": 256}}, "relu",
                   {"linear": {"in": 256, "out": 2}}]}  # fmt: skip
CLIPPED = {"unit": "none", "clip_norm": 1.0}
DISTRIBUTED = {"unit": "organization", "where": "distributed", "clip_norm": 0.5, "noise_multiplier": 20.0}
UNIFORM = {"fedavg": {"weights": "uniform"}}


def secured_job(**changes: Any) -> JobSpec:
    """A job over the patients of the island under secure aggregation."""
    spec = {**OF_PATIENTS, "privacy": CLIPPED, "secure_aggregation": True, "rounds": 2, "evaluation": {"holdout": 0.25}}
    return job_spec(**{**spec, **changes})


@pytest.fixture(scope="module")
def four(
    postgres_url: str, _maintenance: psycopg.Connection, _template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ground]:
    """A service and four organizations, for several tests: each leaves all of them running."""
    name = f"isthmus_{uuid4().hex[:12]}"
    copy = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY wal_log")
    _maintenance.execute(copy.format(sql.Identifier(name), sql.Identifier(_template)))
    try:
        with ground(tmp_path_factory.mktemp("four"), _with_database(postgres_url, name), 4) as opened:
            yield opened
    finally:
        _drop(_maintenance, name)


def write_hearts(path: Path, number: int, rows: int = 0) -> None:
    """Every tenth of the real records from `number` on; the larger the number, the fewer: weights differ."""
    del rows
    records = [row for file in sorted(HEART.glob("*.csv")) for row in csv.DictReader(file.read_text().splitlines())]
    mine = [row for row in records[number::10] if row["chest_pain"] and row["sex"]][: 92 - 4 * number]
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, [*FEATURES, "disease"], extrasaction="ignore")
        out.writeheader()
        out.writerows(mine)


def complete(opened: Ground, job: JobView) -> JobView:
    """The job, once it has completed."""
    done = opened.finish(job)
    assert done.state is JobState.COMPLETED, done.detail
    return done


def told(opened: Ground, job: JobView, kind: str) -> list[Mapping[str, Any]]:
    """What the record says of one kind, in its order; the record as a whole is sound."""
    assert opened.researcher is not None
    events = list(opened.researcher.jobs.events(job.id, follow=False))
    verify_chain(events)
    return [event.data for event in events if event.kind == kind]


def stored_updates(opened: Ground, job: JobView, number: int) -> dict[str, Path]:
    """The bodies of a round's updates as they lie on the service's disk, by organization/dataset."""
    with opened.record() as record:
        rows = record.rows(
            "SELECT u.blob_key, o.name AS organization, d.name AS dataset FROM updates u"
            " JOIN rounds r ON r.id = u.round_id JOIN participations p ON p.id = u.participation_id"
            " JOIN datasets d ON d.id = p.dataset_id JOIN organizations o ON o.id = d.organization_id"
            " WHERE r.job_id = %s AND r.number = %s AND u.blob_key IS NOT NULL",
            job.id, number,
        )  # fmt: skip
    return {f"{row['organization']}/{row['dataset']}": opened.blobs / row["blob_key"] for row in rows}


def updates_in(opened: Ground, job: JobView, number: int) -> dict[str, dict[str, NDArray[Any]]]:
    """The updates of a plain round, with what rounds average alone."""
    assert job.manifest is not None
    names = update_manifest(job.manifest).tensors
    return {
        who: {name: array for name, array in arrays.read(path).items() if name in names}
        for who, path in stored_updates(opened, job, number).items()
    }


def wrong_after(opened: Ground, job: JobView) -> list[str]:
    """What is not as it has to be after the job, once everybody had a moment to tidy up."""
    wrong: list[str] = []

    def settled() -> bool:
        if wrong:
            print(__import__("time").time(), wrong)
        with opened.record() as record:
            wrong[:] = check_job(record, job.id)
        return not wrong

    try:
        until(settled, "all invariants hold", 20)
    except AssertionError:
        return wrong
    return []


@contextmanager
def orders(opened: Ground) -> Iterator[None]:
    """Afterwards nobody has orders, and everybody runs."""
    try:
        yield
    finally:
        opened.take_all_back()
        for program in opened.programs.values():
            if not program.runs:
                program.start()


def sessions_at(opened: Ground, organization: str, job: JobView) -> list[dict[str, Any]]:
    """The sessions of a job in a worker's journal, in the order of rounds and attempts."""
    path = opened.journals[organization] / "journal.sqlite"
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute(
            "SELECT s.* FROM sessions s JOIN participations p USING (participation_id) WHERE p.job_id = ?"
            " ORDER BY s.round_number, s.attempt",
            [str(job.id)],
        )
        return [dict(row) for row in rows]


# --- who drops out ----------------------------------------------------------------------------------------------------


def test_of_ten_three_die_in_different_phases_and_the_model_is_moved_by_the_sum_of_the_rest(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(island, "write_patients", write_hearts)
    common = {**OF_HEARTS, "rounds": 1, "evaluation": {"holdout": 0}}
    plain = job_spec(**common, cohort={"min_updates": 10, "deadline_s": 120})
    secured = job_spec(
        **common,
        privacy={"unit": "none", "clip_norm": 0.5},
        secure_aggregation={"step_s": 8},
        cohort={"min_updates": 7, "deadline_s": 25},
    )
    with ground(tmp_path, database_url, 10) as opened:
        undisturbed = complete(opened, opened.submit(plain))  # it has everybody's training process warm as well
        opened.give("clinic-2", "keys-kept", 1, "kill")
        opened.give("clinic-5", "shares-kept", 1, "kill")
        opened.give("clinic-7", "survivors-kept", 1, "kill")
        job = complete(opened, opened.submit(secured))
        assert [opened.programs[f"clinic-{number}"].runs for number in (2, 5, 7)] == [False] * 3

        assert told(opened, job, "attempt-aborted") == []
        (keys,), (shares,) = told(opened, job, "keys-closed"), told(opened, job, "shares-closed")
        assert (len(keys["members"]), keys["missing"]) == (10, [])
        assert (len(shares["members"]), shares["missing"]) == (9, ["clinic-2/patients"])
        (frozen,), (signed,) = told(opened, job, "round-frozen"), told(opened, job, "survivors-signed")
        survivors = [f"{row['organization']}/{row['dataset']}" for row in frozen["updates"]]
        assert survivors == [f"clinic-{number}/patients" for number in (0, 1, 3, 4, 6, 7, 8, 9)]
        assert frozen["because"] == "deadline-with-enough"
        assert (len(signed["members"]), signed["missing"]) == (7, ["clinic-7/patients"])

        updates = updates_in(opened, undisturbed, 1)
        norms = [math.sqrt(sum(float((array**2).sum()) for array in update.values())) for update in updates.values()]
        assert len(updates) == 10
        assert max(norms) > 0.5, "some are clipped"
        expected = moved_by_sum(opened, job, secured, updates, survivors, tmp_path / "expected")
        assert job.model_digest == expected != undisturbed.model_digest


def moved_by_sum(
    opened: Ground, job: JobView, spec: JobSpec, updates: Mapping[str, Any], survivors: Sequence[str], path: Path
) -> str:
    """The digest of the model that the quantised sum of plain updates gives, after the first round."""
    assert job.manifest is not None
    with opened.record() as record:
        parts = record.rows(
            "SELECT p.declared_rows, o.name AS organization, d.name AS dataset FROM participations p"
            " JOIN datasets d ON d.id = p.dataset_id JOIN organizations o ON o.id = d.organization_id"
            " WHERE p.job_id = %s",
            job.id,
        )
        (initial,) = record.rows("SELECT digest FROM checkpoints WHERE job_id = %s AND round_number = 0", job.id)
    weights = {f"{row['organization']}/{row['dataset']}": row["declared_rows"] for row in parts}
    assert len(set(weights.values())) == 10, "they count differently"
    shares = {who: weights[who] / max(weights.values()) for who in survivors}  # the largest weight is the roster's
    total = np.sum([quantise(updates[who], spec, None, shares[who]) for who in survivors], axis=0, dtype=np.uint32)
    with (
        TensorFile(opened.blobs / checkpoint_key(initial["digest"])) as model,
        TensorFileWriter(path, job.manifest.tensors) as sink,
    ):
        aggregate_sum(
            job.manifest, model, MemorySource({SUM: total.view(np.int32)}), spec, None,
            math.fsum(shares.values()), strategy_of(spec.strategy), sink=sink,
        )  # fmt: skip
    return sink.digest


def test_below_the_threshold_the_attempt_is_given_up_and_the_next_one_has_new_keys(four: Ground) -> None:
    """Four need three. What the two who stayed had sent is of no use to anybody: the same updates are masked anew."""
    with orders(four):
        for dead in ("clinic-0", "clinic-3"):
            four.give(dead, "shares-kept", 1, "kill")
        job = four.submit(secured_job(rounds=1, cohort={"min_updates": 3, "deadline_s": 8, "attempts": 20}))
        until(lambda: told(four, job, "attempt-aborted"), "the attempt is given up")
        for dead in ("clinic-0", "clinic-3"):
            assert not four.programs[dead].runs
            four.programs[dead].start()
        complete(four, job)

        first, *_ = told(four, job, "attempt-aborted")
        assert (first["step"], first["because"], first["attempt"]) == ("update", "too-few-updates", 1)
        assert first["missing"] == ["clinic-0/patients", "clinic-3/patients"]
        for stayed in ("clinic-1", "clinic-2"):
            digests = [row["masked_digest"] for row in sessions_at(four, stayed, job) if row["masked_digest"]]
            assert len(digests) > 1
            assert len(set(digests)) == len(digests), "the same update under other masks"
    assert wrong_after(four, job) == [], "among others: one spend, whatever the attempts"


def test_a_worker_killed_after_its_shares_goes_on_with_the_same_secrets_and_is_in_the_sum(four: Ground) -> None:
    assert four.researcher is not None
    spec = secured_job(cohort={"min_updates": 4, "deadline_s": 60})
    undisturbed = complete(four, four.submit(spec))
    with orders(four):
        four.give("clinic-1", "shares-kept", 1, "kill")
        job = four.submit(spec)
        until(lambda: not four.programs["clinic-1"].runs, "the worker is killed")
        (before,) = sessions_at(four, "clinic-1", job)
        four.give("clinic-1", "survivors-came", 1, "hold")
        four.programs["clinic-1"].start()
        until(lambda: four.happened("clinic-1", "survivors-came"), "it has handed in")
        (now,) = sessions_at(four, "clinic-1", job)
        four.take_back("clinic-1", "survivors-came")
        done = complete(four, job)

    assert (before["state"], now["state"], now["attempt"]) == ("shared", "submitted", 1)
    assert before["secrets"] is not None
    assert before["secrets"] == now["secrets"]
    assert told(four, job, "attempt-aborted") == []
    assert [len(frozen["updates"]) for frozen in told(four, job, "round-frozen") if "attempt" in frozen] == [4, 4]
    assert done.model_digest == undisturbed.model_digest
    assert wrong_after(four, job) == []


# --- several jobs -----------------------------------------------------------------------------------------------------


def test_jobs_whose_tasks_were_claimed_in_opposite_order_do_not_wait_for_each_other(four: Ground) -> None:
    """Three workers are at the first job and one begins with the second; each job needs all four. A third is plain."""
    needs_all = {"min_updates": 4, "deadline_s": 300}
    with orders(four):
        four.give("clinic-1", "task-in-hand", 1, "kill")
        jobs = [four.submit(secured_job(name="first", cohort=needs_all))]
        until(lambda: not four.programs["clinic-1"].runs, "one has claimed of the first job, and lost it")
        jobs.append(four.submit(secured_job(name="second", cohort=needs_all)))
        until(lambda: offered_to(four, "clinic-1") == ["second", "first"], "it will be asked for the second before")
        four.programs["clinic-1"].start()
        jobs.append(four.submit(job_spec(name="plain")))
        for job in [complete(four, job) for job in jobs]:
            assert told(four, job, "attempt-aborted") == []
            assert wrong_after(four, job) == []


def offered_to(opened: Ground, organization: str) -> list[str]:
    """The jobs of the tasks that are on offer to an organization's worker, in the order in which it is given them."""
    with opened.record() as record:
        rows = record.rows(
            "SELECT j.name FROM tasks t JOIN jobs j ON j.id = t.job_id"
            " JOIN participations p ON p.id = t.participation_id JOIN datasets d ON d.id = p.dataset_id"
            " JOIN organizations o ON o.id = d.organization_id"
            " WHERE o.name = %s AND t.state = 'offered' ORDER BY t.offered_at, t.id",
            organization,
        )
    return [row["name"] for row in rows]


# --- with a claim -----------------------------------------------------------------------------------------------------


def test_shares_of_noise_are_spent_for_once_and_nothing_but_masked_bytes_reached_the_service(four: Ground) -> None:
    assert four.researcher is not None
    job_of_noise = secured_job(privacy=DISTRIBUTED, strategy=UNIFORM, model=WIDE, evaluation={"holdout": 0})
    with orders(four):
        four.give("service", "survivors-due", 1, "hold")
        job = four.submit(job_of_noise)
        until(lambda: four.happened("service", "survivors-due"), "all updates are in")
        bodies = {who: arrays.read(path)[MASKED] for who, path in bodies_on_disk(four).items()}
        vectors = [vector_at(state, job) for state in four.journals.values()]
        assert len(bodies) == len(vectors) == 4
        for body in bodies.values():
            assert looks_uniform(body)
            assert all(looks_uniform(body - vector) for vector in vectors), "nor is it one of them, moved or not"
        assert not any(looks_uniform(vector) for vector in vectors), "what is hidden would be seen"
        for vector in vectors:
            assert not is_on_disk(vector, four.folder / "service")
        four.take_back("service", "survivors-due")
        complete(four, job)

    report = four.researcher.jobs.privacy(job.id)
    assert "the claim needs 3 honest organizations in every round's sum" in report.adjacency + report.guarantee
    until(lambda: bodies_on_disk(four) == {}, "what was masked is deleted")
    for organization, state in four.journals.items():
        with four.record() as record:
            spends = record.rows(
                "SELECT e.rdp_nano, e.round_number FROM ledger_entries e JOIN ledgers l ON l.id = e.ledger_id"
                " JOIN datasets d ON d.id = e.dataset_id JOIN organizations o ON o.id = d.organization_id"
                " WHERE o.name = %s AND e.kind = 'spend'",
                organization,
            )
            rounds = record.rows(
                "SELECT e.round_number FROM ledger_entries e JOIN datasets d ON d.id = e.dataset_id"
                " JOIN organizations o ON o.id = d.organization_id"
                " WHERE o.name = %s AND e.kind = 'spend' AND e.job_id = %s AND e.release = 'train'",
                organization, job.id,
            )  # fmt: skip
        assert sorted(row["round_number"] for row in rounds) == [1, 2]
        shown = [sum(column) for column in zip(*(row["rdp_nano"] for row in spends), strict=True)]
        assert any(shown)
        assert own_spent(state) == shown, organization


def bodies_on_disk(opened: Ground) -> dict[str, Path]:
    """Everything in the service's store that is a masked update, by its name."""
    found = {}
    for path in (opened.blobs / "updates").rglob("*"):
        if path.is_file() and MASKED in arrays.read(path):
            found[str(path)] = path
    return found


def vector_at(state: Path, job: JobView) -> NDArray[np.uint32]:
    """What a worker keeps of its update: noised, and not masked."""
    path = state / "journal.sqlite"
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as connection:
        (name,) = connection.execute(
            "SELECT r.vector FROM releases r JOIN participations p USING (participation_id)"
            " WHERE p.job_id = ? AND r.kind = 'train' AND r.vector IS NOT NULL",
            [str(job.id)],
        ).fetchone()
    found: NDArray[np.uint32] = arrays.read(state / "releases" / name)["vector"]
    return found


def looks_uniform(numbers: NDArray[np.uint32]) -> bool:
    """Chi-squared over the values of each of the four bytes; off by chance once in a billion."""
    octets = np.ascontiguousarray(numbers, "<u4").view(np.uint8).reshape(-1, 4)
    expected = numbers.size / 256
    for place in range(4):
        counts = np.bincount(octets[:, place], minlength=256)
        if float(((counts - expected) ** 2 / expected).sum()) > 255 + 7 * math.sqrt(2 * 255):
            return False
    return True


def is_on_disk(vector: NDArray[np.uint32], folder: Path) -> bool:
    """Whether a stretch of the vector is in some file below the folder."""
    stretches = [vector[start : start + 8].tobytes() for start in range(0, vector.size - 8, vector.size // 16)]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if any(stretch in content for stretch in stretches):
                return True
    return False


def own_spent(state: Path) -> list[int]:
    """What a worker's own ledger says was spent of its one dataset, by order."""
    journal = Journal.look_into(StateDir.open(state))
    try:
        (lineage,) = journal.ledgers.lineages()
        return list(journal.spent(lineage).nano)
    finally:
        journal.close()


def test_claims_about_records_hold_under_masks_as_well(four: Ground) -> None:
    """Noise in every step, noised statistics and counts; and of the updates the sum alone."""
    assert four.researcher is not None
    spec = job_spec(
        rounds=2,
        data={
            "task": "classification", "target": "disease", "classes": 2, "standardize": "federated",
            "features": [{"name": "age", "range": [0, 120]}, {"name": "sex", "categories": ["Female", "Male"]}],
        },
        model=OF_PATIENTS["model"],
        privacy={"unit": "record", "epsilon": 3.0, "clip_norm": 1.0},
        secure_aggregation={"clip_norm": 5},
        evaluation={"holdout": 0.25, "release": "noised"},
    )  # fmt: skip
    job = complete(four, four.submit(spec))
    assert wrong_after(four, job) == []
    for steward in four.stewards:
        entries = steward.datasets.ledger(next(iter(steward.datasets.list())).id)
        mine = [entry for entry in entries if entry.job_id == job.id and entry.kind == "spend"]
        assert [entry.release for entry in mine] == ["statistics", "train", "train", "evaluate"]
        assert all(any(entry.rdp_nano) for entry in mine)
    for number in (1, 2):
        of = four.researcher.jobs.round(job.id, number)
        assert all(update.l2_norm is None for update in of.updates)
        assert len(of.updates) >= 3
