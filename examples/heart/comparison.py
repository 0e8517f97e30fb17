"""The federated model beside each hospital's own and the pooled one, on the same held-out rows."""

import json
import math
import subprocess
from collections.abc import Mapping

from examples.heart.baselines import EVERYBODY, Bench, Score, Scores, read_bench
from examples.heart.federation import Federation
from examples.heart.hospitals import RESEARCHER, Site
from examples.heart.processes import command
from examples.heart.results import FEDERATED, POOLED, Results, alone
from isthmus.codec import arrays
from isthmus.wire.jobs import JobView
from isthmus.wire.rounds import TaskKind


class ReportsDiffer(Exception):
    """A hospital has measured other figures than its rows give here."""


def compare(federation: Federation, job: JobView) -> tuple[Results, list[Score]]:
    """How all models do, and how the federated one did on everybody after each round, the initial model first.

    Raises:
        ReportsDiffer: what a worker measured of the final model is not what its held-out rows give here: these would
            not be the same rows.
    """
    bench = read_bench(federation.sites, job.spec, job.statistics)
    by_round = _scores_by_round(federation, job, bench)
    final = by_round[-1]
    for site in federation.sites:
        _require_same(site.hospital.name, final_results(site, job), final)
    results = {alone(name): bench.scores(bench.alone(name)) for name in bench.splits}
    results |= {FEDERATED: final, POOLED: bench.scores(bench.pooled())}
    return results, [scores[EVERYBODY] for scores in by_round]


def _scores_by_round(federation: Federation, job: JobView, bench: Bench) -> list[Scores]:
    client = federation.client(RESEARCHER)
    folder = federation.folder / "checkpoints"
    folder.mkdir()
    found = []
    for view in sorted(client.jobs.checkpoints(job.id), key=lambda view: view.round_number):
        path = folder / f"round-{view.round_number:02}.safetensors"
        client.checkpoints.download(view.digest, path)
        found.append(bench.scores(bench.model_of(arrays.read(path, job.manifest))))
    return found


def final_results(site: Site, job: JobView) -> Mapping[str, float]:
    """What a hospital's worker measured of the final model, read where it stays: from `isthmus-worker results`.

    Raises:
        ReportsDiffer: the worker has no such results.
    """
    words = [command("isthmus-worker"), "results", job.name, "--config", site.config, "--json"]
    found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=site.folder)
    for told in json.loads(found.stdout):
        if told["kind"] == TaskKind.EVALUATE:
            return {name: float(value) for name, value in told["metrics"].items()}
    raise ReportsDiffer(f"{site.hospital.name} has no results of the final model.")


def _require_same(organization: str, told: Mapping[str, float], found: Scores) -> None:
    here = found[organization]
    for name, value in {"examples": here.rows, "accuracy": here.accuracy, "auc": here.auc}.items():
        measured = told.get(f"holdout/{name}")
        same = measured is value if None in (measured, value) else math.isclose(measured or 0, value or 0, abs_tol=1e-9)
        if not same:
            raise ReportsDiffer(f"{organization} measured {name} {measured}; its held-out rows give {value} here.")
