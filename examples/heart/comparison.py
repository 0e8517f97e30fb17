"""The federated model beside each hospital's own and the pooled one, on the same held-out rows."""

import math

from examples.heart.baselines import EVERYBODY, Bench, Score, Scores, read_bench
from examples.heart.federation import Federation
from examples.heart.hospitals import RESEARCHER
from examples.heart.results import FEDERATED, POOLED, Results, alone
from isthmus.codec import arrays
from isthmus.wire.jobs import JobView
from isthmus.wire.rounds import RoundMetrics, TaskKind


class ReportsDiffer(Exception):
    """A hospital has reported other figures than its rows give here."""


def compare(federation: Federation, job: JobView) -> tuple[Results, list[Score]]:
    """How all models do, and how the federated one did on everybody after each round, the initial model first.

    Raises:
        ReportsDiffer: what a worker reported of the final model is not what its held-out rows give here: these would
            not be the same rows.
    """
    bench = read_bench(federation.sites, job.spec, job.statistics)
    by_round = _scores_by_round(federation, job, bench)
    final = by_round[-1]
    for view in federation.client(RESEARCHER).jobs.metrics(job.id):
        if view.kind is TaskKind.EVALUATE:
            _require_same(view, final)
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


def _require_same(reported: RoundMetrics, found: Scores) -> None:
    for site in reported.sites:
        here = found[site.organization]
        pairs = {"examples": here.rows, "accuracy": here.accuracy, "auc": here.auc}
        for name, value in pairs.items():
            told = site.metrics.get(f"holdout/{name}")
            same = told is value if None in (told, value) else math.isclose(told or 0, value or 0, abs_tol=1e-9)
            if not same:
                raise ReportsDiffer(f"{site.organization} reported {name} {told}; its held-out rows give {value} here.")
