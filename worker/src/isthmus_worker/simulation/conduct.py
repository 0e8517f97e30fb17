"""One `isthmus simulate`, from the files that it was given to those that it leaves behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Shown
from rich.text import Text

from isthmus.codec.arrays import read
from isthmus.codec.errors import CodecError
from isthmus.commands.rendering.text import printable
from isthmus.commands.session import Surroundings
from isthmus.wire.jobs import EvaluationRelease, JobSpec
from isthmus.wire.privacy import PrivacyUnit
from isthmus_worker.data import Table, open_source
from isthmus_worker.refusals import DataRefused
from isthmus_worker.simulation.clients import (
    Client,
    ClientsRefused,
    cut,
    load_client,
    read_clients,
    require_same_columns,
    source_of,
    without_shared,
)
from isthmus_worker.simulation.engine import Round, SimulationFailed, simulate
from isthmus_worker.simulation.partitions import Partition, PartitionRefused
from isthmus_worker.simulation.pictures import MISSING, can_draw
from isthmus_worker.simulation.pool import Pool
from isthmus_worker.simulation.report import (
    clients_table,
    holdings_of,
    last_measure,
    rounds_json,
    spent_sentence,
    write_results,
)

_TOLD: Final = {
    EvaluationRelease.EXACT: "the same",
    EvaluationRelease.LOCAL: "none of them",
    EvaluationRelease.NOISED: "noised counts of right answers",
}
REFUSALS: Final = (ClientsRefused, PartitionRefused, DataRefused)
"""What is wrong with what was given."""


@dataclass(frozen=True)
class Cut:
    """One file of records, and how it becomes clients."""

    data: Path
    clients: int
    partition: str
    seed: int
    min_rows: int


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. `source` is what is cut, or the file that lists the clients."""

    spec: JobSpec
    source: Cut | Path
    test: Path | None
    drop_shared: bool
    model: Path | None
    out: Path
    processes: int


@dataclass(frozen=True)
class Told:
    """What is said in the end: to people, or to machines."""

    table: Shown
    lines: list[Text]
    json: dict[str, Any]


def conduct(plan: Plan, around: Surroundings) -> Told:
    """Read the records, simulate with a progress bar, write the results.

    Raises:
        REFUSALS: the clients, the cut or the records are not what the job wants.
        SimulationFailed: it was begun and went wrong.
    """
    spec = plan.spec
    if not can_draw():
        around.note(MISSING)
    for note in notes(spec):
        around.note(note)
    with Pool(plan.processes) as pool:  # imports torch while records are read here
        initial = None if plan.model is None else _initial(plan.model)
        clients, test = _read(plan, around)
        holdings = holdings_of(clients, spec)
        with _bar(around, spec) as bar:
            simulation = simulate(
                spec, clients, test=test, initial=initial, pool=pool, on_round=bar.round_done, on_task=bar.task_done
            )
    written = write_results(plan.out, simulation, holdings)
    lines = [Text(f"{last_measure(simulation.rounds)}  after {spec.rounds} rounds")]
    if spec.seed is None:
        repeat = "With it the run can be repeated." if spec.privacy.unit is PrivacyUnit.NONE else ""
        lines.append(Text(f"The job names no seed; it got {simulation.spec.seed}. {repeat}".rstrip()))
    if simulation.epsilon_spent():
        lines.append(Text(spent_sentence(simulation)))
    lines += [Text(printable(f"{path}")) for path in written]
    lines.append(Text(f"sha256 of the model: {simulation.digest}"))
    told = rounds_json(simulation, holdings) | {"files": [str(path) for path in written]}
    return Told(clients_table(simulation, holdings, spec.data.labels), lines, told)


def sentence(refusal: Exception) -> str:
    """A refusal in words, with the place: the records are the user's own."""
    if isinstance(refusal, DataRefused):
        return f"{refusal.told(counts=True)}" + (f" ({refusal.where})" if refusal.where else "")
    return str(refusal)


def notes(spec: JobSpec) -> list[str]:
    """What differs from a real run of this job, in sentences."""
    found = []
    cohort = spec.cohort
    if cohort.over_selection:
        found.append("cohort.over_selection is left out: nobody is late in a simulation.")
    if cohort.target_updates != "all":
        found.append(
            "cohort.target_updates: of a cohort that is larger, those drawn first take part; in a federation it is "
            "those that are fastest."
        )
    if spec.privacy.unit is not PrivacyUnit.NONE:
        found.append(
            "The job has a privacy unit: its noise and coins are secret, as in a federation, so that no two runs give "
            "the same model, whatever the seed. Measures are shown as they are, since the records are yours; in a "
            f"federation the sites would tell {_TOLD[spec.evaluation_release]}."
        )
    return found


def _initial(path: Path) -> dict[str, Any]:
    try:
        return read(path)
    except OSError as error:
        raise ClientsRefused(f"{path}: cannot be read ({error.strerror}).") from error
    except CodecError as error:
        raise ClientsRefused(f"{path}: {error}") from error


def _read(plan: Plan, around: Surroundings) -> tuple[list[Client], Table | None]:
    """The clients and the test set."""
    spec = plan.spec
    if isinstance(plan.source, Cut):
        wanted = plan.source
        source = source_of(wanted.data)
        table = source.load(spec.data.columns())
        partition = Partition.parse(wanted.partition)
        clients = cut(table, spec, partition, wanted.clients, seed=wanted.seed, min_rows=wanted.min_rows)
    else:
        listed = read_clients(plan.source).clients
        source = open_source(listed[0].source)
        clients = [load_client(settings, spec) for settings in listed]
    if plan.test is None:
        return clients, None
    tested = source_of(plan.test)
    require_same_columns(source, tested)
    test = tested.load(spec.data.columns())
    if plan.drop_shared:
        test, dropped = without_shared(clients, test)
        around.note(f"{dropped} records of the test set are left out: clients hold them too.")
    return clients, test


class _Bar:
    """The progress bar: one step a task."""

    def __init__(self, progress: Progress, spec: JobSpec) -> None:
        self._progress, self._rounds = progress, spec.rounds
        self._task = progress.add_task("reading and encoding", total=spec.rounds, measure="")
        self._done = 0

    def round_done(self, one: Round) -> None:
        """A round is over."""
        self._done = min(one.number, self._rounds)
        self._progress.update(
            self._task,
            completed=self._done,
            description=f"round {self._done}/{self._rounds}",
            measure=last_measure([one]),
        )

    def task_done(self, done: int, of: int) -> None:
        """A task of the present round is."""
        self._progress.update(self._task, completed=min(self._rounds, self._done + done / of))


@contextmanager
def _bar(around: Surroundings, spec: JobSpec) -> Iterator[_Bar]:
    """The bar on the terminal's stderr; nothing where that is no terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[measure]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=around.err,
        disable=not around.err.is_terminal,
    ) as progress:
        yield _Bar(progress, spec)


__all__ = ["REFUSALS", "Cut", "Plan", "SimulationFailed", "Told", "conduct", "sentence"]
