"""What privacy of records costs in accuracy: the job of the four hospitals at several epsilons, and without privacy.

The job is `examples/heart/job.yaml` with another epsilon and nothing else changed; without privacy it is the same job
with `privacy: none`. Every seed draws other hold-outs, initial weights and batches; noise and coins are the operating
system's, and drawn anew. Accuracy is that of the final model on everybody's held-out patients, whom nobody has trained
on.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure

from benchmarks.tables import Report, Spread, arguments
from examples.heart.hospitals import DATASET, HERE, HOSPITALS, JOB
from isthmus.jobfile import load_job
from isthmus.wire.jobs import JobSpec
from isthmus_worker.simulation.clients import Client, source_of
from isthmus_worker.simulation.engine import simulate

EPSILONS: Final = (0.5, 1.0, 3.0, 8.0)
PICTURE: Final = Path(__file__).parents[1] / "docs" / "accuracy-against-epsilon.png"
NONE: Final = "none"
_T_95: Final = {4: 2.776, 7: 2.365, 9: 2.262, 14: 2.145, 19: 2.093, 29: 2.045}
"""Student's t for a two-sided 95 % interval, by degrees of freedom."""


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("privacy_curve", __doc__)
    parser.add_argument("--seeds", type=int, default=20, help="runs for each epsilon (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="that train at once (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the curve goes (default: in docs)")
    options = parser.parse_args()
    clients = hospitals()
    report = Report(
        "privacy_curve",
        f"Accuracy of {sum(len(client.table.fingerprints) for client in clients)} patients' federated model by epsilon "
        "(delta 1e-5)",
        ("epsilon", "runs", "accuracy", "mean", "95 % of the mean", "loss", "noise in a step, of the clip"),
    )
    found: dict[str, Spread] = {}
    for epsilon in (*EPSILONS, None):
        name = NONE if epsilon is None else f"{epsilon:g}"
        runs = [one_run(job_of(epsilon, seed), clients, options.processes) for seed in range(options.seeds)]
        accuracies = Spread.of(run["holdout/accuracy"] for run in runs)
        found[name] = accuracies
        mean, half = interval(accuracies.samples)
        noises = [run["noise"] for run in runs if "noise" in run]
        report.row(
            name,
            len(runs),
            accuracies,
            round(mean, 4),
            f"{mean - half:.3f} to {mean + half:.3f}",
            Spread.of(run["holdout/loss"] for run in runs),
            round(noises[0], 4) if noises else None,
        )
    report.note("Hold-outs differ from seed to seed, in all rows alike; some 180 patients are held out in each run.")
    report.note("'none' holds the same share of each label out, the others each patient by itself.")
    draw(options.picture, found)
    report.note(f"Picture: {options.picture}")
    report.finish(options.json)


def hospitals() -> list[Client]:
    """The four hospitals' records."""
    columns = load_job(JOB).data.columns()
    return [
        Client(hospital.name, DATASET, source_of(HERE / "data" / hospital.file).load(columns)) for hospital in HOSPITALS
    ]


def job_of(epsilon: float | None, seed: int) -> JobSpec:
    """The demo's job with another epsilon and seed; None: without privacy."""
    plain: dict[str, Any] = json.loads(load_job(JOB).model_dump_json())
    plain["seed"] = hashlib.sha256(f"privacy curve {seed}".encode()).hexdigest()
    plain["evaluation"]["every"] = 0
    if epsilon is None:
        plain["privacy"], plain["evaluation"]["release"] = "none", "exact"
    else:
        plain["privacy"]["epsilon"] = epsilon
    return JobSpec.model_validate(plain)


def one_run(spec: JobSpec, clients: Sequence[Client], processes: int) -> dict[str, float]:
    """What the final model is worth on everybody's held-out patients."""
    from isthmus.privacy.outlook import outlook_of  # noqa: PLC0415 -- the numbers beside, not what is measured

    result = simulate(spec, clients, processes=processes)
    found = dict(result.rounds[-1].metrics)
    sites = [(client.organization, len(client.table.fingerprints), None) for client in clients]
    noise = outlook_of(spec, sites, sum(array.size for array in result.model.values())).mean_noise
    return found | ({} if noise is None else {"noise": noise})


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval by Student's t."""
    if len(samples) < 2:
        return samples[0], math.nan
    t = _T_95.get(len(samples) - 1, 1.96 + 2.5 / (len(samples) - 1))
    return statistics.mean(samples), t * statistics.stdev(samples) / math.sqrt(len(samples))


def draw(path: Path, found: dict[str, Spread]) -> None:
    """Every run as a point, means with their intervals, and the mean without privacy as a line."""
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.add_subplot()
    names = [name for name in found if name != NONE]
    chance = np.random.default_rng(1)
    for place, name in enumerate(found):
        samples = found[name].samples
        mean, half = interval(samples)
        color = "#7b8794" if name == NONE else "#1764ab"
        jitter = chance.uniform(-0.09, 0.09, len(samples))
        axes.plot(place + jitter, samples, ".", color=color, alpha=0.35, markersize=6)
        axes.errorbar(place, mean, yerr=half, color=color, marker="o", capsize=5, linewidth=2)
    without, _ = interval(found[NONE].samples)
    axes.axhline(without, color="#7b8794", linestyle="--", linewidth=1)
    axes.plot(range(len(names)), [interval(found[name].samples)[0] for name in names], color="#1764ab", linewidth=1)
    axes.set_xticks(range(len(found)), [name if name != NONE else "no privacy" for name in found])
    axes.set_xlabel("epsilon of the whole job for each patient, at delta 1e-5")
    axes.set_ylabel("accuracy on held-out patients")
    axes.set_title("Four hospitals, 920 patients: accuracy against privacy of records", loc="left")
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
