"""Accuracy against epsilon: the four hospitals of examples/heart, with patients protected more or less.

    python -m benchmarks.privacy_curve --seeds 20 --picture docs/accuracy-against-epsilon.png

The engine of `isthmus simulate` runs examples/heart/job.yaml with each epsilon, and without a privacy unit, for several
seeds. A seed decides the initial weights and who is held out; coins and noise are secret and fresh in any case, so that
the same command gives other figures within the error bars. Measured is the final model on the records that the
hospitals hold out, pooled over them (with a privacy unit records are held out one by one, without one by shares of each
class: the same seed does not hold out the same ones in both). Error bars are 95 % intervals of the mean over seeds
(Student's t).
"""

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.tables import Report, Spread, arguments
from examples.heart.hospitals import DATASET, HERE, HOSPITALS, JOB
from isthmus.jobfile import load_job
from isthmus.wire.jobs import JobSpec
from isthmus_worker.settings import CsvSettings
from isthmus_worker.simulation.clients import ClientSettings, load_client
from isthmus_worker.simulation.engine import Simulation, simulate
from isthmus_worker.simulation.pool import Pool

MEASURES: Final = ("accuracy", "auc")
NONE: Final = "none"
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; from there on the normal distribution's is near.
_T: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_T_MANY: Final = 1.96


def main() -> None:
    """Run the simulations, print the table and draw the picture."""
    options = _options()
    epsilons = [text.strip() for text in options.epsilons.split(",")]
    job = load_job(JOB)
    clients = [load_client(_settings(hospital.name, hospital.file), job) for hospital in HOSPITALS]
    found: dict[str, list[Simulation]] = {epsilon: [] for epsilon in epsilons}
    with Pool(options.processes) as pool:
        for seed in range(options.seeds):  # a seed at a time, so that a broken run has as many of each
            for epsilon in epsilons:
                found[epsilon].append(simulate(_spec(job, epsilon, seed), clients, pool=pool))
    report = Report(
        "privacy_curve",
        f"Heart disease, four hospitals, {job.rounds} rounds, {options.seeds} seeds: final model on held-out records",
        ["epsilon", "accuracy", "± 95 %", "AUC", "± 95 %", "epsilon spent, largest", "noise multiplier, by hospital"],
    )
    figures = {epsilon: {measure: _figures(runs, measure) for measure in MEASURES} for epsilon, runs in found.items()}
    for epsilon, runs in found.items():
        accuracy, auc = (figures[epsilon][measure] for measure in MEASURES)
        spent = max((value for run in runs for value in run.epsilon_spent().values()), default=None)
        report.row(
            epsilon,
            Spread.of(accuracy),
            _half_width(accuracy),
            Spread.of(auc),
            _half_width(auc),
            spent,
            _noise(runs[0]),
        )
    report.note("Spreads are over the seeds: median, and [least..most]. The error is that of the mean over seeds.")
    report.note(f"delta is {job.privacy.claimed_delta:g}; the unit is one record, one more or less.")
    report.note("Epsilon covers the statistics of round 0 and all training rounds; evaluations stay at the sites.")
    if options.picture is not None:
        draw(options.picture, figures)
        report.note(f"Picture: {options.picture}")
    report.finish(options.json)


def draw(path: Path, figures: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Write a PNG: the mean of each measure by epsilon, with error bars; without privacy as a line across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - only where a picture is asked for
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(7.5, 4.4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    private = [epsilon for epsilon in figures if epsilon != NONE]
    for measure, color in zip(MEASURES, ("#1764ab", "#c4512d"), strict=True):
        means = [statistics.fmean(figures[epsilon][measure]) for epsilon in private]
        errors = [_half_width(figures[epsilon][measure]) or 0.0 for epsilon in private]
        label = {"accuracy": "accuracy", "auc": "area under the ROC curve"}[measure]
        places = [float(epsilon) for epsilon in private]
        axes.errorbar(places, means, yerr=errors, marker="o", capsize=4, color=color, label=label)
        if NONE in figures:
            mean, error = statistics.fmean(figures[NONE][measure]), _half_width(figures[NONE][measure]) or 0.0
            axes.axhline(mean, color=color, linestyle="--", linewidth=1, label=f"{label}, without privacy")
            axes.axhspan(mean - error, mean + error, color=color, alpha=0.08, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks([float(epsilon) for epsilon in private], private)
    axes.minorticks_off()
    axes.set_xlabel("epsilon of the whole job at each hospital (less: more privacy)")
    axes.set_ylabel("on the records that are held out")
    axes.set_ylim(0.4, 1.0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _spec(job: JobSpec, epsilon: str, seed: int) -> JobSpec:
    privacy: Any = NONE
    if epsilon != NONE:
        privacy = job.privacy.model_dump(exclude_none=True, mode="json") | {"epsilon": float(epsilon)}
        privacy.pop("noise_multiplier", None)
    plain = job.model_dump(mode="json", by_alias=True, exclude_none=True)
    return JobSpec.model_validate(
        {
            **plain,
            "privacy": privacy,
            "evaluation": {**plain["evaluation"], "every": 0, "release": "local"},
            "seed": hashlib.sha256(f"privacy curve {seed}".encode()).hexdigest(),
        }
    )


def _settings(organization: str, file: str) -> ClientSettings:
    source = CsvSettings(path=HERE / "data" / file)
    return ClientSettings(organization=organization, dataset=DATASET, source=source)


def _figures(runs: Sequence[Simulation], measure: str) -> list[float]:
    return [run.rounds[-1].metrics[f"holdout/{measure}"] for run in runs]


def _noise(run: Simulation) -> str:
    return ", ".join(f"{plan.noise_multiplier:.2f}" for _, plan in sorted(run.plans.items()) if plan is not None) or "-"


def _half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean; None for a single value, which tells nothing of it."""
    if len(values) < 2:
        return None
    quantile = _T[len(values) - 2] if len(values) - 2 < len(_T) else _T_MANY
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def _options() -> Any:
    parser = arguments("privacy_curve", __doc__)
    parser.add_argument("--epsilons", default="0.5,1,3,8,none", help="comma-separated (default: 0.5,1,3,8,none)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--processes", type=int, default=2, help="that train at once (default: 2)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the curve as PNG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
