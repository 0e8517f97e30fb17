"""What the worker's journal adds to a task, as it grows to years of releases.

    python -m benchmarks.journal

The journal is the worker's own, on a disk, with its syncs. Its past is written straight into its database: one release
for each round of jobs of 500 rounds, all sent and acknowledged, as large as a release of one byte is. Then it is asked
and told what a training task asks and tells: whether the ledger allows it, what earlier rounds left, what was
computed, that admission is asked for, that it was given, the receipt; and what is tidied up whenever no task waits.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

from benchmarks.tables import Report, Spread, arguments, numbers
from isthmus.wire.rounds import TaskOffer, UpdateReceipt
from isthmus_worker.journal import Journal, Release, key_of
from isthmus_worker.ledger import charge_for
from isthmus_worker.state import StateDir
from tests.worker.factories import ACCOUNT, LINEAGE, make_offer, make_record_spec

ROUNDS: Final = 500
"""Of each job of the past."""
RECEIPT_BYTES: Final = 400
CONTENT: Final = b"x"
PAST: Final = (
    "INSERT INTO releases (participation_id, round_number, model_digest, spec_digest, kind, state, job, dataset,"
    " task_id, fence, digest, size_bytes, prepared_at, released_at, acknowledged_at, receipt, lineage, charge,"
    " clip_norm, noise_multiplier)"
    " VALUES (?, ?, ?, ?, 'train', 'acknowledged', ?, ?, ?, 1, ?, 1, ?, ?, ?, ?, ?, ?, 1.0, 1.0)"
)


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("journal", __doc__)
    parser.add_argument("--releases", default="0,10000,100000", help="of the past (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="tasks of each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the journal is kept meanwhile (default: the system's own)")
    options = parser.parse_args()
    report = Report("journal", "A task's part of the journal (ms)", ("releases before", "what", "ms", "p99 ms"))
    for releases in map(int, numbers(options.releases)):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            state = StateDir.open(Path(folder) / "state")
            with closing(Journal.open(state)) as journal:
                _fill(journal, releases)
                for what, samples in _tasks(journal, state, options.repeats).items():
                    spread = Spread.of(samples)
                    report.row(releases, what, spread, spread.percentile(0.99))
    report.note(f"The past: jobs of {ROUNDS} rounds. The tasks: the rounds of one more job.")
    report.finish(options.json)


def _fill(journal: Journal, releases: int) -> None:
    offer = make_offer(make_record_spec())
    charge, at = charge_for(offer, LINEAGE).to_json(), "2026-01-01T00:00:00+00:00"
    with journal.connection:
        journal.connection.execute("BEGIN")
        journal.connection.executemany(
            PAST,
            (
                (
                    str(UUID(int=1_000_000 + number // ROUNDS)), number % ROUNDS + 1, "a" * 64, offer.spec_digest,
                    offer.job, offer.dataset, str(uuid4()), "b" * 64, at, at, at, "x" * RECEIPT_BYTES, LINEAGE, charge,
                )
                for number in range(releases)
            ),
        )  # fmt: skip


def _tasks(journal: Journal, state: StateDir, repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    offer = make_offer(make_record_spec(rounds=repeats + 1), grant_rounds=repeats + 1)
    journal.pin(offer)
    for number in range(1, repeats + 1):
        task = offer.model_copy(update={"round_number": number})
        parts = _task(journal, state, task)
        if number > 1:  # the first opens what the others use
            for what, ms in {**parts, "all of it": sum(parts.values())}.items():
                found[what].append(ms)
    return found


def _task(journal: Journal, state: StateDir, offer: TaskOffer) -> dict[str, float]:
    took: dict[str, float] = {}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        answer = call()
        took[what] = took.get(what, 0.0) + 1000 * (time.perf_counter() - began)
        return answer

    def prepared() -> Release:
        draft = state.scratch / "upload.safetensors"
        draft.write_bytes(CONTENT)
        digest = sha256(CONTENT).hexdigest()
        return journal.prepare(offer, draft, digest=digest, size_bytes=len(CONTENT), metrics={}, account=ACCOUNT)

    assert timed("whether it is allowed", lambda: journal.ledger_objections(offer, offer.grant_rounds, ACCOUNT)) == []
    timed("what earlier rounds left", lambda: journal.retire_before(str(offer.participation_id), offer.round_number))
    assert timed("whether it is known", lambda: journal.find(key_of(offer))) is None
    release = timed("computed", prepared)
    timed("admission asked for", lambda: journal.note_asking(release, unanswered=True))
    timed("admitted, spent", lambda: journal.mark_released(release))
    receipt = UpdateReceipt(
        task_id=offer.task_id, digest=release.digest, received_at=datetime.now(UTC), signature="00" * 64
    )
    timed("receipt kept", lambda: journal.mark_acknowledged(release, receipt))
    timed("tidied up", journal.tidy)
    return took


if __name__ == "__main__":
    main()
