"""Rounds to a target accuracy for local epochs E and batch sizes B, against FedSGD: the shape of the paper's table 2.

Ten clients share 4,000 handwritten digits, IID or with two classes each; half of them take part in a round, and 1,000
other digits say how good the model is. FedSGD is E = 1 with one batch of all records: one gradient a round. As in the
paper every row has its own learning rate, the best of a grid, which is widened for a row until its best is not the
grid's end; it is chosen on the same test digits, with a seed that is not reported.

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", table 2.
https://arxiv.org/abs/1602.05629
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.learning import CLIENTS, Federation, federation, job, rounds_to
from benchmarks.tables import Report, Spread, arguments, numbers
from examples.images.mnist_5k import mnist_5k

SHAPE: Final = (1, 28, 28)
MODEL: Final = (
    {"conv2d": {"in": 1, "out": 8, "kernel": 5, "stride": 2}},
    "relu",
    {"conv2d": {"in": 8, "out": 16, "kernel": 5, "stride": 2}},
    "relu",
    "flatten",
    {"linear": {"in": 256, "out": 10}},
)
"""5,994 parameters: small, so that the table takes minutes."""

TUNING_SEED: Final = 0
MOST_WIDENED: Final = 5
"""So many learning rates beyond a grid's ends are tried for a row."""
COLUMNS: Final = ("split", "E", "B", "steps a round", "learning rate", "rounds", "fewer than FedSGD")


@dataclass(frozen=True)
class Row:
    """A way to train locally."""

    epochs: int
    batch_size: int | None
    """None: all records in one batch."""

    @property
    def is_fedsgd(self) -> bool:
        """Whether it is one gradient a round."""
        return self.epochs == 1 and self.batch_size is None

    def __str__(self) -> str:
        """As `--rows` reads it."""
        return f"{self.epochs}x{self.batch_size or 'all'}"

    def steps(self, records: int) -> int:
        """Local steps of a client with so many records."""
        return self.epochs * math.ceil(records / (self.batch_size or records))


FEDSGD: Final = Row(1, None)
ROWS: Final = tuple(Row(epochs, size) for epochs in (1, 5, 20) for size in (None, 50, 10))


@dataclass
class Runs:
    """Accuracies by round of what was run, kept in a file if there is one, so that a long table can be made in pieces.

    A run ends at `target`, or after as many rounds as were asked for.
    """

    federation: Federation
    target: dict[str, float]
    file: Path | None
    kept: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            self.kept = json.loads(self.file.read_text(encoding="utf-8"))

    def rounds(self, split: str, row: Row, rate: float, seed: int, most: int) -> float:
        """Rounds to the target; infinity if `most` rounds do not reach it, or training diverged."""
        key = f"{split} {row} lr={rate:g} seed={seed}"
        found = self.kept.get(key, [])
        target = self.target[split]
        if len(found) < most and max(found, default=0.0) < target and found[-1:] != [0.0]:
            found = self._run(split, row, rate, seed, most)
            self.kept[key] = found
            self._keep()
        reached = rounds_to(found[:most], target)
        said = f"{reached:.1f}" if reached else f"more than {min(len(found), most)}"
        print(f"{key}: {said} rounds to {target}", file=sys.stderr, flush=True)
        return reached or math.inf

    def _run(self, split: str, row: Row, rate: float, seed: int, most: int) -> list[float]:
        spec = job(
            MODEL,
            SHAPE,
            training={
                "optimizer": {"sgd": {"lr": rate}}, "batch_size": row.batch_size or "all", "epochs": row.epochs,
            },
            rounds=most,
        )  # fmt: skip
        target = self.target[split]
        found = self.federation.run(
            spec, split, seed, on_accuracy=lambda _number, accuracy: True if accuracy >= target else None
        )
        diverged = len(found) < most and max(found, default=0.0) < target
        return [*found, 0.0] if diverged else found

    def _keep(self) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.kept), encoding="utf-8")
            unfinished.replace(self.file)


def best_rate(runs: Runs, split: str, row: Row, rates: Sequence[float], most: int) -> tuple[float, float]:
    """The learning rate that needs fewest rounds with the tuning seed, and those rounds.

    The grid is walked from its middle, and no run goes on for longer than the best before it took. Where an end of the
    grid is the best, the grid goes on there by doubling or halving: nobody is beaten for want of a learning rate. A
    single rate is no grid, and is taken as it is.
    """
    best, least = rates[len(rates) // 2], math.inf
    tried: list[float] = []
    waiting = sorted(rates, key=lambda rate: abs(math.log(rate / best)))
    while waiting:
        rate = waiting.pop(0)
        limit = most if math.isinf(least) else math.ceil(least)
        needed = runs.rounds(split, row, rate, TUNING_SEED, limit)
        tried.append(rate)
        if needed < least:
            best, least = rate, needed
        if not waiting and len(rates) > 1 and math.isfinite(least) and len(tried) < len(rates) + MOST_WIDENED:
            waiting = [best * 2] if best == max(tried) else [best / 2] if best == min(tried) else []
    return best, least


def measure(runs: Runs, split: str, rows: Sequence[Row], options: Any, report: Report) -> None:
    """All rows of one split, FedSGD first: what it needs is as many rounds as the others may take in tuning."""
    records = runs.federation.train.rows // CLIENTS
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + options.seeds)
    base = math.inf
    for row in rows:
        rate, _ = best_rate(runs, split, row, options.rates, _most(options.most, base, 1.0))
        found = [runs.rounds(split, row, rate, seed, _most(options.most, base, 2.0)) for seed in seeds]
        median = statistics.median(found)
        if row.is_fedsgd:
            base = median
        reached = all(map(math.isfinite, found))
        rounds = Spread.of(found) if reached else f"{sum(map(math.isfinite, found))} of {len(found)} seeds got there"
        report.row(
            split, row.epochs, str(row.batch_size or "all"), row.steps(records), rate, rounds,
            base / median if math.isfinite(median) and math.isfinite(base) else None,
        )  # fmt: skip


def _most(most: int, base: float, times: float) -> int:
    return most if math.isinf(base) else min(most, math.ceil(base * times))


def parse_rows(text: str) -> list[Row]:
    """`5x10,20xall` as rows, FedSGD first."""
    asked = {Row(int(epochs), None if size == "all" else int(size)) for epochs, _, size in _parts(text)}
    return [row for row in ROWS if row in asked | {FEDSGD}]


def _parts(text: str) -> list[tuple[str, str, str]]:
    return [one.strip().partition("x") for one in text.split(",") if one.strip()]


def main() -> None:
    """Make the table that the command line asks for."""
    parser = arguments("fedavg", __doc__)
    parser.add_argument("--splits", default="iid:0.9,classes:2:0.85", help="each with its target (%(default)s)")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="as ExB, FedSGD always (default: all nine)")
    parser.add_argument("--seeds", type=int, default=3, help="how many are reported (default: %(default)s)")
    parser.add_argument("--rates", type=numbers, default=[0.05, 0.1, 0.2, 0.5], help="the grid (0.05,0.1,0.2,0.5)")
    parser.add_argument("--most", type=int, default=400, help="rounds after which a run is given up (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="how many train at once (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep every run here, and go on from what is there")
    parser.add_argument("--quick", action="store_true", help="IID, E=5 B=10 against FedSGD, one seed, one rate")
    options = parser.parse_args()
    if options.quick:
        options.splits, options.rows, options.seeds, options.rates = "iid:0.9", "5x10", 1, [0.2]
    targets = {split: float(target) for split, _, target in (one.rpartition(":") for one in options.splits.split(","))}
    report = Report("fedavg", "Rounds to the target accuracy, and how many times fewer than FedSGD", COLUMNS)
    report.note("Targets: " + ", ".join(f"{target:g} for {split}" for split, target in targets.items()) + ".")
    report.note("E = 1 with B = all is FedSGD. Rounds: median [least..most] over the seeds; learning rates as chosen.")
    report.note("Between two rounds the curve is a straight line; what the first round reaches counts as one round.")
    report.note("Learning rates are chosen on the same test digits, with a seed of their own.")
    with federation(mnist_5k(), options.processes) as running:
        runs = Runs(running, targets, options.keep)
        for split in targets:
            measure(runs, split, parse_rows(options.rows), options, report)
    report.finish(options.json)


if __name__ == "__main__":
    main()
