"""What protecting an update costs: clip, encode, noise and decode, in seconds and in memory.

The update is float32, drawn at random, in some tensors of different sizes, and four times as long as the bound, so that
it is really clipped. Memory is what a new process holds at most while it protects the update, above what it held with
the update before; the result is part of it. "Plain floats" is what is often seen instead: scaled, and NumPy's float
Gaussian added, in float32.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import forget_peak, peak_mb, resident_mb
from benchmarks.tables import Report, Spread, arguments, numbers
from isthmus.privacy.keystream import Keystream
from isthmus.privacy.lattice import UPDATE_SCALE, Lattice, variance_of

CLIP_NORM: Final = 1.0
NOISE_MULTIPLIER: Final = 1.1


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("protection", __doc__)
    parser.add_argument("--elements", default="1e6,25e6", help="of the update (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="measurements of each (default: %(default)s)")
    options = parser.parse_args()
    report = Report(
        "protection",
        "Clip, encode, noise, decode: one thread",
        ["million elements", "update MB", "s", "CPU s", "plain floats s", "peak MB above", "x the update"],
    )
    for elements in map(int, numbers(options.elements)):
        found = _in_a_process(elements, options.repetitions)
        size_mb = elements * 4 / 1e6
        report.row(
            elements / 1e6,
            size_mb,
            Spread.of(found["wall_s"]),
            Spread.of(found["cpu_s"]),
            Spread.of(found["plain_s"]),
            found["peak_mb"],
            found["peak_mb"] / size_mb,
        )
    report.note("Each row is a process of its own. The first call counts: its tables and buffers are in the figures.")
    report.finish(options.json)


def _in_a_process(elements: int, repetitions: int) -> dict[str, Any]:
    start = multiprocessing.get_context("spawn")
    here, there = start.Pipe()
    process = start.Process(target=_measure, args=(there, elements, repetitions), daemon=True)
    process.start()
    there.close()
    try:
        return dict(here.recv())
    finally:
        process.join(5)
        process.kill()


def _measure(pipe: Connection, elements: int, repetitions: int) -> None:
    update = _update(elements)
    lattice = Lattice(CLIP_NORM, UPDATE_SCALE, elements)
    variance = variance_of(NOISE_MULTIPLIER, lattice.sensitivity)
    before_mb = resident_mb(os.getpid())
    forget_peak(os.getpid())
    found: dict[str, Any] = {"wall_s": [], "cpu_s": [], "plain_s": []}

    for _ in range(repetitions):
        began, cpu_began = time.perf_counter(), time.process_time()
        lattice.noised(update, variance, Keystream())
        found["wall_s"].append(time.perf_counter() - began)
        found["cpu_s"].append(time.process_time() - cpu_began)
    found["peak_mb"] = peak_mb(os.getpid()) - before_mb
    generator = np.random.default_rng(1)
    found["plain_s"] = [_seconds(lambda: _plain(update, generator)) for _ in range(repetitions)]
    pipe.send(found)


def _update(elements: int) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    sizes = {"bias": 1000, "first": elements // 10, "second": elements - elements // 10 - 1000}
    scale = np.float32(4 * CLIP_NORM / elements**0.5)
    return {name: generator.standard_normal(size, dtype=np.float32) * scale for name, size in sizes.items()}


def _plain(update: dict[str, NDArray[np.float32]], generator: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """For comparison only: such noise supports no claim."""
    norm = sum(float(np.square(array, dtype=np.float64).sum()) for array in update.values()) ** 0.5
    factor = np.float32(min(1.0, CLIP_NORM / norm))
    return {
        name: array * factor + np.float32(NOISE_MULTIPLIER) * generator.standard_normal(array.shape, dtype=np.float32)
        for name, array in update.items()
    }


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
