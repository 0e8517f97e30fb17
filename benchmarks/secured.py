"""What secure aggregation costs a round: the same job plain and secured, in turn, on the same processes.

Training is a wait, so that many workers can share a few cores. What a round takes beyond that wait is what the
federation costs; keys and shares travel while workers train, so only the last of the secured steps come on top.
"""

import statistics
from typing import Any

from benchmarks.federation import federation, trivial_job
from benchmarks.rounds import Measured, measure_job
from benchmarks.tables import Report, Spread, arguments, numbers

COLUMNS = (
    "model MB", "workers", "training s", "what", "s per round", "p90 s", "x plain", "beyond training s",
    "x plain beyond", "CPU s per round", "service peak MB",
)  # fmt: skip
CLIP_NORM = 10.0


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("secured", __doc__)
    parser.add_argument("--workers", default="10", help="numbers of workers (default: %(default)s)")
    parser.add_argument("--sizes", default="10", help="model sizes in MB of 10^6 bytes (default: %(default)s)")
    parser.add_argument("--training", type=int, default=1, help="seconds that training takes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each job (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=3, help="jobs of each kind, in turn (default: %(default)s)")
    options = parser.parse_args()
    report = Report("secured", "Seconds per round, plain and under secure aggregation", COLUMNS)
    for workers in (int(number) for number in numbers(options.workers)):
        for size in numbers(options.sizes):
            plain, secured = measure(size, workers, options.training, options.rounds, options.jobs)
            base = (size, workers, options.training)
            _row(report, base, "plain", plain, plain)
            _row(report, base, "secured", secured, plain)
    report.note(
        "Jobs of both kinds in turn, over the same processes; a round lasts from the last one's completion to its own."
    )
    report.note("Both clip the whole update to the same norm; the secured one rounds it to whole numbers and masks it.")
    report.finish(options.json)


def measure(
    model_mb: float, workers: int, training_s: int, rounds: int, jobs: int
) -> tuple[list[Measured], list[Measured]]:
    """Jobs of both kinds, in turn."""
    found: dict[bool, list[Measured]] = {False: [], True: []}
    with federation(workers) as running:
        for _ in range(jobs):
            for secured in (False, True):
                spec = trivial_job(
                    model_mb, rounds, workers,
                    privacy={"unit": "none", "clip_norm": CLIP_NORM},
                    training={"optimizer": {"sgd": {"lr": 0.1}}, "batch_size": 16, "epochs": 1 + training_s},
                    evaluation={"holdout": 0.25, "every": 0, "release": "local"},
                    secure_aggregation=secured,
                )  # fmt: skip
                found[secured].append(measure_job(running, spec, rounds))
    return found[False], found[True]


def _row(report: Report, base: tuple[Any, ...], what: str, found: list[Measured], plain: list[Measured]) -> None:
    took, took_plain = _seconds(found), _seconds(plain)
    training_s = base[2]
    beyond, beyond_plain = (Spread.of([one - training_s for one in each.samples]) for each in (took, took_plain))
    report.row(
        *base, what, took, took.percentile(0.9), took.median / took_plain.median, beyond,
        beyond.median / beyond_plain.median, statistics.median(one.cpu_s for one in found),
        max(one.peak_mb for one in found),
    )  # fmt: skip


def _seconds(found: list[Measured]) -> Spread:
    return Spread.of([second for one in found for second in one.seconds.samples])


if __name__ == "__main__":
    main()
