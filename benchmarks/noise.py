"""Samples a second of the exact discrete Gaussian, beside NumPy's float Gaussian, on one core.

Ours draws from an AES-256-CTR keystream and is exact; NumPy's draws doubles from PCG64 and is neither secret nor exact.
Both fill the same number of elements in turn. Tables are made before the clock starts; how long that takes is shown.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from benchmarks.tables import Report, Spread, arguments, numbers
from isthmus.privacy.discrete_gaussian import DiscreteGaussian, Noise
from isthmus.privacy.keystream import Keystream

SIGMAS: Final = "1,8,64,1000,1000000,4194304"


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("noise", __doc__)
    parser.add_argument("--sigmas", default=SIGMAS, help="in lattice steps (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4_000_000, help="of each measurement (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=7, help="measurements of each (default: %(default)s)")
    options = parser.parse_args()
    report = Report(
        "noise",
        "Million samples per second of CPU, one core",
        ["sigma", "table ms", "exact discrete M/s", "NumPy float M/s", "x NumPy"],
    )
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    floats, integers = np.empty(options.samples), np.empty(options.samples, np.int64)
    generator = np.random.default_rng(0)
    for sigma in numbers(options.sigmas):
        variance = round(sigma * sigma)
        table_s = _cpu_seconds(partial(DiscreteGaussian, variance))
        noise = Noise(variance, Keystream())
        ours, theirs = [], []
        for _ in range(options.repetitions):
            ours.append(options.samples / 1e6 / _cpu_seconds(partial(noise.fill, integers)))
            theirs.append(options.samples / 1e6 / _cpu_seconds(partial(generator.standard_normal, out=floats)))
        exact, plain = Spread.of(ours), Spread.of(theirs)
        report.row(f"{sigma:g}", 1e3 * table_s, exact, plain, exact.median / plain.median)
    report.note("int64 into an array in memory, and float64 likewise. CPU seconds of the thread, not wall time.")
    report.finish(options.json)


def _cpu_seconds(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


if __name__ == "__main__":
    main()
