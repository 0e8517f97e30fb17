"""Rounds per minute of a simulation beside those of FedAvg written by hand in PyTorch, on the same cores.

    python -m benchmarks.simulation

100 clients with 500 images of 28 x 28 each, 10 of them a round, a network of 215,370 parameters, one epoch of SGD.
Three processes do this, each a round whenever its turn comes, one after another, so that whatever else the machine does
falls on all of them alike: `isthmus simulate`'s engine in two processes; a plain loop in one process whose operations
use two threads; and a plain loop in two processes of one thread each, which share images, model and results. The first
round is timed from the start of a process, with the reading of the images in it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.processes import cpu_s, family
from benchmarks.simulations.task import CLIENTS, SAMPLES
from benchmarks.tables import Report, Spread, arguments
from examples.images.fashion_mnist import ROOT, fashion_mnist

OURS: Final = "isthmus simulate, 2 processes"
VARIANTS: Final = {
    OURS: "benchmarks.simulations.ours",
    "plain PyTorch, 1 process, 2 threads": "benchmarks.simulations.plain",
    "plain PyTorch, 2 processes, 1 thread": "benchmarks.simulations.plain_pool",
}
WARM_UP: Final = 1


class Variant:
    """One way of doing the rounds, as a process."""

    def __init__(self, module: str, images: Path, batch_size: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(images), str(batch_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def round_s(self) -> float:
        """Have one round done; how long it took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        began = time.perf_counter()
        self._process.stdin.write("go\n")
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError("a variant ended before its time")
        return time.perf_counter() - began

    def cpu_s(self) -> float:
        """CPU seconds so far, of the process and those that it started."""
        return cpu_s([self._process.pid])

    def memory_mb(self) -> tuple[float, float]:
        """Resident memory of all its processes in MB: what is shared counted once, and once in each process."""
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii") for pid in family(self._process.pid)]
        once, each = (
            sum(
                int(line.split()[1]) * 1024 / 1e6
                for text in rollups
                for line in text.splitlines()
                if line.startswith(of)
            )
            for of in ("Pss:", "Rss:")
        )
        return once, each

    def close(self) -> None:
        """There are no more rounds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@contextmanager
def variant(module: str, images: Path, batch_size: int) -> Iterator[Variant]:
    """A variant that is ended afterwards."""
    made = Variant(module, images, batch_size)
    try:
        yield made
    finally:
        made.close()


def write_images(path: Path, root: Path) -> str:
    """The images as a file; where they are from."""
    count = CLIENTS * SAMPLES
    arrays: dict[str, np.ndarray[Any, Any]]
    if root.is_dir():
        train = fashion_mnist(root).train
        arrays = {"image": train.images[:count].reshape(-1, 1, 28, 28), "label": train.labels[:count]}
        told = "Fashion-MNIST, the first 50,000 training images."
    else:
        chance = np.random.default_rng(0)
        arrays = {
            "image": chance.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8),
            "label": chance.integers(0, 10, count),
        }
        told = f"Generated images of the shape of Fashion-MNIST's, since there is no {root}."
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return told


def first_rounds(images: Path, batch_size: int, times: int) -> dict[str, list[float]]:
    """Seconds from the start of a process to the end of its first round, each variant in turn."""
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(times):
        for name, module in VARIANTS.items():
            began = time.perf_counter()
            with variant(module, images, batch_size) as one:
                one.round_s()
                found[name].append(time.perf_counter() - began)
    return found


def measure(report: Report, images: Path, options: argparse.Namespace) -> None:
    """Fill the tables."""
    first = first_rounds(images, options.batch_size, options.starts - 1)
    with ExitStack() as stack:
        running: dict[str, Variant] = {}
        for name, module in VARIANTS.items():
            began = time.perf_counter()
            running[name] = stack.enter_context(variant(module, images, options.batch_size))
            running[name].round_s()
            first[name].append(time.perf_counter() - began)
        for one in running.values():
            for _ in range(WARM_UP):
                one.round_s()
        cpu_before = {name: one.cpu_s() for name, one in running.items()}
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for turn in range(options.rounds):
            names = list(running)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(running[name].round_s())
        for name, one in running.items():
            cpu = (one.cpu_s() - cpu_before[name]) / options.rounds
            once, each = one.memory_mb()
            report.row(
                name, Spread.of([60 / taken for taken in seconds[name]]), cpu, Spread.of(first[name]), once, each
            )
    report.section("Rounds per minute, turn by turn", ["isthmus simulate against", "ratio"])
    plain = [name for name in VARIANTS if name != OURS]
    for name in plain:
        report.row(name, Spread.of([a / b for a, b in zip(seconds[name], seconds[OURS], strict=True)]))
    better = min(plain, key=lambda name: statistics.median(seconds[name]))
    pairs = zip(seconds[better], seconds[OURS], strict=True)
    ratio = statistics.median(taken / ours for taken, ours in pairs)
    report.note(f"Against the better plain loop ({better}): {ratio:.3f} times its rounds per minute (wanted: 0.95).")


def main() -> None:
    """`python -m benchmarks.simulation`"""
    parser = arguments("simulation", __doc__)
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of each variant (default: 15)")
    parser.add_argument("--starts", type=int, default=3, help="how often each variant is started (default: 3)")
    parser.add_argument("--batch-size", type=int, default=32, help="of the local training (default: 32)")
    parser.add_argument("--fashion-mnist", type=Path, default=ROOT, metavar="DIR", help=f"its files (default: {ROOT})")
    options = parser.parse_args()
    report = Report(
        "simulation",
        "FedAvg over 100 clients, 10 a round",
        ["variant", "rounds per minute", "CPU s per round", "s to the first round", "MB, shared once", "MB, summed"],
    )
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npz"
        report.note(write_images(images, options.fashion_mnist))
        measure(report, images, options)
    report.finish(options.json)


if __name__ == "__main__":
    main()
