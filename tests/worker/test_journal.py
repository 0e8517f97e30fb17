"""The journal: one noising a round, and nothing left without a record of it, killed at every step."""

import os
import signal
import sqlite3
import warnings
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import isthmus_worker.journal as journal_module
from isthmus.client import Client, Refused, Unreachable
from isthmus.wire.problems import Problem, ProblemCode, problem
from isthmus.wire.rounds import TaskOffer, UpdateReceipt, receipt_bytes
from isthmus_worker.journal import BytesDamaged, Journal, Release, ReleaseState, TransitionRefused, key_of
from isthmus_worker.ledger import Ledgers, charge_for
from isthmus_worker.release import ATTEMPTS, LONGEST_PAUSE_S, HandedIn, hand_in
from isthmus_worker.state import StateDir, StateInUse
from tests.worker.factories import ACCOUNT, LINEAGE, make_offer, make_record_spec, make_secured_spec
from tests.worker.fake_service import NOW

KEY = Ed25519PrivateKey.generate()
PINNED = KEY.public_key().public_bytes_raw().hex()
OFFER = make_offer()
PRIVATE = make_offer(make_record_spec())
SMALL = (
    "releases USING INDEX held_releases",
    "releases USING INDEX prepared_releases",
    "USING INDEX open_sessions",
    "CONSTANT ROW",
)
"""What a statement may look through: only what is not over yet."""
COST = charge_for(PRIVATE, LINEAGE).cost
"""Of one round of it."""


def _prepare(journal: Journal, state: StateDir, content: bytes = b"noised", offer: TaskOffer = OFFER) -> Release:
    draft = state.scratch / "upload.safetensors"
    draft.write_bytes(content)
    return journal.prepare(
        offer, draft, digest=sha256(content).hexdigest(), size_bytes=len(content), metrics={"train/loss": 0.5},
        account=ACCOUNT,
    )  # fmt: skip


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """An empty state directory."""
    return StateDir.open(tmp_path / "state")


@pytest.fixture
def journal(state: StateDir) -> Journal:
    """Its journal."""
    return Journal.open(state)


class Desk:
    """A service that keeps what it heard in a folder, so that it outlives its workers."""

    def __init__(self, folder: Path) -> None:
        self._admitted, self._stored, self.log = folder / "admitted", folder / "stored", folder / "sent"

    def submit_update(
        self, task_id: UUID, path: Path, *, digest: str, fence: int, on_admitted: Callable[[], None], progress: object
    ) -> UpdateReceipt:
        """Admission, body, receipt, as the real one."""
        if not (self._stored.exists() and self._stored.read_text() == digest):
            if self._admitted.exists() and self._admitted.read_text() != digest:
                raise Refused(problem(ProblemCode.UPDATE_CONFLICT, "other bytes were admitted"))
            self._admitted.write_text(digest)
            on_admitted()
            with self.log.open("a") as log:
                log.write(digest + "\n")
            assert sha256(path.read_bytes()).hexdigest() == digest
            self._stored.write_text(digest)
        signature = KEY.sign(receipt_bytes(task_id, digest, NOW)).hex()
        return UpdateReceipt(task_id=task_id, digest=digest, received_at=NOW, signature=signature)

    def admitted(self) -> bool:
        """Whether it has spent what the bytes cost."""
        return self._admitted.exists() and bool(self._admitted.read_text())

    def sent(self) -> list[str]:
        """Digests of which bytes have left."""
        return self.log.read_text().split() if self.log.exists() else []


def _live(folder: Path) -> None:
    """What an agent does with one offer, from its start on, with fresh noise wherever it computes."""
    state = StateDir.open(folder / "state")
    journal = Journal.open(state)
    client = cast(Client, SimpleNamespace(tasks=Desk(folder)))
    journal.verify()
    journal.recover()
    for left in journal.unsettled():
        hand_in(client, journal, left, service_public_key=PINNED)
    release = journal.find(key_of(PRIVATE)) or _prepare(journal, state, os.urandom(32), PRIVATE)
    if release.path is not None:
        assert journal.ledger_objections(PRIVATE, 9, ACCOUNT) == []
        hand_in(client, journal, journal.readdress(release, PRIVATE), service_public_key=PINNED)
    journal.close()


def _killed_at(step: int, folder: Path) -> bool:
    """Live in a process that is killed at the given step; whether it came to that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads; the child starts none
        pid = os.fork()
    if pid == 0:
        try:
            _count_down(step)
            _live(folder)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the agent itself failed"
    return os.WIFSIGNALED(status)


def _count_down(step: int) -> None:
    left = [step]

    def tick() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            tick()
            result = real(*args, **more)
            tick()
            return result

        setattr(owner, name, wrapped)

    for owner, name in (
        (journal_module, "sync_file"), (journal_module, "move_durably"), (journal_module._Transaction, "__enter__"),
        (journal_module._Transaction, "__exit__"), (Journal, "readdress"), (Journal, "note_asking"),
        (Journal, "_advance"), (Ledgers, "append"), (Ledgers, "put"), (Journal, "_drop_bytes"), (Journal, "recover"),
        (Desk, "submit_update"),
        (Path, "write_text"), (Path, "unlink"), (Path, "read_bytes"),
    ):  # fmt: skip
        around(owner, name)


def test_killed_at_any_step_nothing_leaves_unrecorded_and_only_one_noising_ever_leaves(tmp_path: Path) -> None:
    step, killed = 0, True
    while killed:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        killed = _killed_at(step, folder)
        desk, state = Desk(folder), StateDir.open(folder / "state")
        journal = Journal.open(state)
        journal.verify()
        if desk.sent():
            release = journal.find(key_of(PRIVATE))
            assert release is not None
            assert release.state in journal_module.SPENT
            assert desk.sent() == [release.digest]
            assert [entry.plain["digest"] for entry in journal.ledgers.entries(LINEAGE)] == [release.digest]
        if desk.admitted():  # spent at the service: here it is at least counted
            assert journal.spent(LINEAGE) == COST
        journal.close()

        _killed_at(step + 3, folder)  # and killed once more, somewhere else
        _killed_at(0, folder)

        journal = Journal.open(state)
        journal.verify()
        release = journal.find(key_of(PRIVATE))
        assert release is not None
        assert release.state is ReleaseState.ACKNOWLEDGED
        assert set(desk.sent()) == {release.digest}
        assert [entry.plain["digest"] for entry in journal.ledgers.entries(LINEAGE)] == [release.digest]
        assert journal.ledgers.total(LINEAGE).cost == journal.spent(LINEAGE) == COST
        assert not list(state.releases.iterdir())
        journal.close()
    assert step > 25


def test_every_transition_but_the_first_is_on_the_disk_when_it_returns(journal: Journal, state: StateDir) -> None:
    def synced() -> int:
        return int(journal._connection.execute("PRAGMA synchronous").fetchone()[0])

    levels = list[int]()
    journal._connection.set_trace_callback(lambda said: levels.append(synced()) if said == "COMMIT" else None)
    release = _prepare(journal, state)
    journal._connection.set_trace_callback(None)

    assert levels == [1]  # NORMAL: asking, which comes next, takes it to the disk
    assert synced() == 2  # FULL: each statement that stands alone is a transaction
    with pytest.raises(sqlite3.IntegrityError):
        _prepare(journal, state)
    assert synced() == 2
    journal.note_asking(release, unanswered=True)
    assert synced() == 2


def test_a_spend_is_on_the_disk_also_after_a_prepare_that_somebody_kept_from_writing(
    journal: Journal, state: StateDir
) -> None:
    journal._connection.execute("PRAGMA busy_timeout = 0")
    other = sqlite3.connect(state.journal, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError):
        _prepare(journal, state)
    other.close()

    assert journal._connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_participation_that_is_pinned_is_not_written_again(journal: Journal) -> None:
    offer = make_offer(number=0)
    assert offer.statistics is None
    journal.pin(offer)
    before = journal._connection.total_changes

    journal.pin(offer)

    assert journal._connection.total_changes == before


def test_a_release_is_unique_and_every_later_offer_of_its_round_finds_it(journal: Journal, state: StateDir) -> None:
    release = _prepare(journal, state)

    later = OFFER.model_copy(update={"task_id": UUID(int=99), "fence": 7, "attempt": 2})
    found = journal.find(key_of(later))

    assert found == release
    assert journal.readdress(release, later).fence == 7
    with pytest.raises(sqlite3.IntegrityError):
        _prepare(journal, state, b"noised again")


def test_what_was_released_cannot_be_discarded_and_what_was_not_cannot_be_acknowledged(
    journal: Journal, state: StateDir
) -> None:
    release = _prepare(journal, state)
    receipt = UpdateReceipt(task_id=OFFER.task_id, digest=release.digest, received_at=NOW, signature="")

    with pytest.raises(TransitionRefused):
        journal.mark_acknowledged(release, receipt)
    journal.mark_released(release)
    with pytest.raises(TransitionRefused):
        journal.discard(release, "no")
    with pytest.raises(TransitionRefused):
        journal.mark_released(release)
    journal.mark_acknowledged(release, receipt)

    found = journal.find(key_of(OFFER))
    assert found is not None
    assert (found.state, found.path, found.digest) == (ReleaseState.ACKNOWLEDGED, None, release.digest)


def test_bytes_of_another_length_than_named_are_not_taken_over(journal: Journal, state: StateDir) -> None:
    draft = state.scratch / "upload.safetensors"
    draft.write_bytes(b"half of it")

    with pytest.raises(BytesDamaged):
        journal.prepare(OFFER, draft, digest="0" * 64, size_bytes=20, metrics={}, account=ACCOUNT)


class Moody:
    """A service that raises or, when nothing is left to raise, accepts."""

    def __init__(self, desk: Desk, *moods: Exception, admits: bool = False) -> None:
        self._desk, self._moods, self._admits = desk, list(moods), admits
        self.calls = 0

    def submit_update(self, task_id: UUID, path: Path, **more: Any) -> UpdateReceipt:
        """One call."""
        self.calls += 1
        if self._moods:
            if self._admits:
                more["on_admitted"]()
            raise self._moods.pop(0)
        return self._desk.submit_update(task_id, path, **more)


def _refused(code: ProblemCode | str, retry_after_s: float | None = None) -> Refused:
    if isinstance(code, ProblemCode):
        return Refused(problem(code, "because"), retry_after_s=retry_after_s)
    return Refused(Problem(type="?", code=code, status=409, title="?", detail="because"), retry_after_s=retry_after_s)


@pytest.mark.parametrize(
    ("code", "admitted", "becomes"),
    [
        (ProblemCode.ROUND_NOT_COLLECTING, False, ReleaseState.DISCARDED),
        (ProblemCode.GRANT_WITHDRAWN, False, ReleaseState.DISCARDED),
        (ProblemCode.TASK_NOT_OPEN, False, ReleaseState.DISCARDED),
        (ProblemCode.UPDATE_CONFLICT, False, ReleaseState.DISCARDED),
        (ProblemCode.LEASE_LOST, False, ReleaseState.PREPARED),
        ("made-up-tomorrow", False, ReleaseState.PREPARED),
        (ProblemCode.KEY_REVOKED, False, ReleaseState.PREPARED),
        (ProblemCode.ROUND_NOT_COLLECTING, True, ReleaseState.RELEASED),
        (ProblemCode.NON_FINITE, True, ReleaseState.RELEASED),
    ],
)
def test_only_what_was_never_admitted_is_discarded(
    state: StateDir, tmp_path: Path, code: ProblemCode | str, admitted: bool, becomes: ReleaseState
) -> None:
    journal = Journal.open(state)
    release = _prepare(journal, state)
    moods = [_refused(code) for _ in range(ATTEMPTS)]
    client = cast(Client, SimpleNamespace(tasks=Moody(Desk(tmp_path), *moods, admits=admitted)))

    hand_in(client, journal, release, service_public_key=PINNED, sleep=lambda _s: None)

    assert journal.counts()[becomes] == 1
    assert bool(list(state.releases.iterdir())) == (becomes is not ReleaseState.DISCARDED)


def test_an_admission_that_may_have_been_given_unheard_is_counted_as_spent(
    journal: Journal, state: StateDir, tmp_path: Path
) -> None:
    moods = [Unreachable("there", "cut before the answer"), _refused(ProblemCode.ROUND_NOT_COLLECTING)]
    client = cast(Client, SimpleNamespace(tasks=Moody(Desk(tmp_path), *moods)))

    outcome, _ = hand_in(client, journal, _prepare(journal, state), service_public_key=PINNED, sleep=lambda _s: None)

    assert outcome is HandedIn.KEPT
    assert journal.counts()["released"] == 1


def test_a_service_that_cannot_be_reached_or_is_busy_gets_the_same_bytes_until_it_answers(
    journal: Journal, state: StateDir, tmp_path: Path
) -> None:
    moods = [Unreachable("there", "down"), _refused(ProblemCode.NOT_READY), Unreachable("there", "cut")]
    tasks = Moody(Desk(tmp_path), *moods, admits=True)
    release = _prepare(journal, state)
    waits: list[float] = []

    outcome, _ = hand_in(
        cast(Client, SimpleNamespace(tasks=tasks)), journal, release, service_public_key=PINNED, sleep=waits.append
    )

    assert outcome is HandedIn.ACKNOWLEDGED
    assert (tasks.calls, len(waits)) == (4, 3)
    assert all(wait > 0 for wait in waits)


def test_a_later_round_frees_the_bytes_of_earlier_ones_and_keeps_their_spend(journal: Journal, state: StateDir) -> None:
    prepared = _prepare(journal, state, b"first")
    second = make_offer(number=2)
    released = _prepare(journal, state, b"second", second)
    journal.mark_released(released)

    journal.retire_before(str(OFFER.participation_id), 3)

    assert journal.find(prepared.key) is None
    found = journal.find(released.key)
    assert found is not None
    assert (found.state, found.path) == (ReleaseState.RELEASED, None)
    assert not list(state.releases.iterdir())
    assert "no longer held" in journal.ledger_objections(second, 100, ACCOUNT)[0]


def test_no_more_rounds_are_released_than_the_grant_and_the_policy_say(journal: Journal, state: StateDir) -> None:
    for number in (1, 2):
        journal.mark_released(_prepare(journal, state, b"%d" % number, make_offer(number=number)))
    third = make_offer(number=3)

    assert journal.ledger_objections(third, 3, ACCOUNT) == []
    assert "at most 2 pass" in journal.ledger_objections(third, 2, ACCOUNT)[0]
    assert "at most 2 pass" in journal.ledger_objections(third.model_copy(update={"grant_rounds": 2}), 3, ACCOUNT)[0]
    assert journal.ledger_objections(make_offer(number=2), 2, ACCOUNT) == []  # the same round again
    assert journal.ledger_objections(make_offer(number=4), 2, ACCOUNT) == []  # evaluation is no training round


def test_a_code_that_nobody_knows_is_tried_again_and_leaves_the_admission_unanswered(
    journal: Journal, state: StateDir, tmp_path: Path
) -> None:
    tasks = Moody(Desk(tmp_path), *[_refused("made-up-tomorrow") for _ in range(ATTEMPTS)])
    release = _prepare(journal, state)

    outcome, _ = hand_in(
        cast(Client, SimpleNamespace(tasks=tasks)), journal, release, service_public_key=PINNED, sleep=lambda _s: None
    )

    assert (outcome, tasks.calls) == (HandedIn.KEPT, ATTEMPTS)
    assert [one.unanswered for one in journal.unsettled()] == [True]


def test_whatever_the_service_asks_for_the_pause_has_a_bound(journal: Journal, state: StateDir, tmp_path: Path) -> None:
    tasks, waits = Moody(Desk(tmp_path), _refused(ProblemCode.NOT_READY, retry_after_s=1e9)), list[float]()

    hand_in(
        cast(Client, SimpleNamespace(tasks=tasks)), journal, _prepare(journal, state), service_public_key=PINNED,
        sleep=waits.append,
    )  # fmt: skip

    assert waits == [LONGEST_PAUSE_S]


def test_a_service_that_cannot_be_reached_is_left_alone_once_the_task_is_lost(
    journal: Journal, state: StateDir, tmp_path: Path
) -> None:
    tasks = Moody(Desk(tmp_path), *[Unreachable("there", "down") for _ in range(9)])
    wanted = iter([True, True, False])

    outcome, _ = hand_in(
        cast(Client, SimpleNamespace(tasks=tasks)), journal, _prepare(journal, state), service_public_key=PINNED,
        sleep=lambda _s: None, wanted=lambda: next(wanted),
    )  # fmt: skip

    assert (outcome, tasks.calls) == (HandedIn.KEPT, 3)
    assert journal.unsettled()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"job_id": UUID(int=8)}, "job_id"),
        ({"dataset": "others"}, "dataset"),
        ({"spec_digest": "ab" * 32}, "spec_digest"),
        ({"job_seed": "ab" * 32}, "job_seed"),
        ({"participation_id": UUID(int=9)}, "another participation"),
    ],
)
def test_a_participation_stays_what_it_was_when_it_was_first_seen(
    journal: Journal, change: dict[str, Any], word: str
) -> None:
    assert journal.ledger_objections(OFFER, 9, ACCOUNT) == []
    journal.pin(OFFER)

    assert journal.ledger_objections(OFFER, 9, ACCOUNT) == []
    assert word in journal.ledger_objections(OFFER.model_copy(update=change), 9, ACCOUNT)[0]


def test_the_statistics_of_a_participation_become_known_once(journal: Journal) -> None:
    statistics = OFFER.statistics
    assert statistics is not None
    other = OFFER.model_copy(update={"statistics": statistics.model_copy(update={"mean": [1.0, 2.0]})})
    journal.pin(make_offer(number=0))
    assert journal.ledger_objections(other, 9, ACCOUNT) == []
    journal.pin(OFFER)
    journal.pin(make_offer(number=0))  # says nothing of statistics, and forgets none

    assert journal.ledger_objections(OFFER, 9, ACCOUNT) == []
    assert "statistics" in journal.ledger_objections(other, 9, ACCOUNT)[0]


@pytest.mark.parametrize("number", [0, 4])
def test_statistics_and_the_final_evaluation_are_released_once(journal: Journal, state: StateDir, number: int) -> None:
    once = make_offer(number=number)
    journal.mark_released(_prepare(journal, state, offer=once))

    again = once.model_copy(update={"round_number": 7})
    assert "there is one in a job" in journal.ledger_objections(again, 9, ACCOUNT)[0]
    assert journal.ledger_objections(once, 9, ACCOUNT) == []


def test_a_release_that_may_have_been_admitted_counts_as_spent_and_one_that_was_only_prepared_does_not(
    journal: Journal, state: StateDir
) -> None:
    release = _prepare(journal, state)
    other = OFFER.model_copy(update={"model": OFFER.model.model_copy(update={"digest": "ab" * 32})})
    assert (journal.unsettled(), journal.ledger_objections(other, 9, ACCOUNT), journal.spends()) == ([], [], [])

    journal.note_asking(release, unanswered=True)

    assert [one.id for one in journal.unsettled()] == [release.id]
    assert "another model" in journal.ledger_objections(other, 9, ACCOUNT)[0]
    assert journal.spends() == [
        {"job": "heart", "dataset": "patients", "kind": "train", "mode": "none", "clip_norm": None,
         "noise_multiplier": 0.0, "releases": 1}
    ]  # fmt: skip


def test_files_without_a_row_are_removed_at_the_start(journal: Journal, state: StateDir) -> None:
    kept = _prepare(journal, state)
    (state.releases / "orphan.safetensors").write_bytes(b"never prepared")

    journal.recover()

    assert list(state.releases.iterdir()) == [kept.path]


def test_a_second_agent_on_the_same_state_is_refused(state: StateDir) -> None:
    with state.locked(), pytest.raises(StateInUse, match="another agent"), StateDir.open(state.root).locked():
        pass
    with state.locked():
        pass


def test_keys_are_for_their_owner_only_and_stay_the_same(state: StateDir) -> None:
    Journal.open(state).close()
    identity, holdout = state.identity().public_key().public_bytes_raw(), state.holdout_key()

    assert state.identity().public_key().public_bytes_raw() == identity
    assert state.holdout_key() == holdout
    assert state.root.stat().st_mode & 0o077 == 0
    assert {path.name: path.stat().st_mode & 0o077 for path in state.root.iterdir() if path.is_file()} == {
        "identity.key": 0, "holdout.key": 0, "journal.sqlite": 0,
    }  # fmt: skip


def test_no_question_of_a_task_reads_all_that_a_worker_ever_released(journal: Journal, state: StateDir) -> None:
    """A worker runs for years: SQLite says of every statement that it finds its rows by an index."""
    asked = set[str]()
    journal.ledgers.claimed("")  # reads every entry, once a start
    journal.connection.set_trace_callback(asked.add)
    for spec in (OFFER.spec, PRIVATE.spec, make_secured_spec()):
        offer = make_offer(spec, participation_id=uuid4(), job_id=uuid4())
        journal.pin(offer)
        assert journal.ledger_objections(offer, 100, ACCOUNT) == []
        journal.retire_before(str(offer.participation_id), offer.round_number)
        release = _prepare(journal, state, offer=offer)
        journal.note_asking(release, unanswered=True)
        journal.mark_released(release)
        receipt = UpdateReceipt(task_id=offer.task_id, digest=release.digest, received_at=NOW, signature="00" * 64)
        journal.mark_acknowledged(journal.readdress(release, offer), receipt)
        journal.tidy()
        journal.sessions.newest(str(offer.participation_id))
        journal.sessions.end_before(str(offer.participation_id), 1)
    assert not journal.unsettled()
    assert not journal.sessions.past(timedelta(0))
    assert not journal.sessions.masked()
    assert not journal.sessions.uploaded()
    journal.connection.set_trace_callback(None)

    statements = [one for one in asked if one.startswith(("SELECT", "UPDATE", "DELETE"))]
    assert len(statements) > 20
    for statement in statements:
        plan = [row[3] for row in journal.connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
        whole = [step for step in plan if step.startswith("SCAN") and not step.endswith(SMALL)]
        assert whole == [], statement
