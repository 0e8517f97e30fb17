"""What rounds measured."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from isthmus.commands.rendering.text import Cell, table
from isthmus.wire.rounds import RoundMetrics, TaskKind


def metrics_table(views: Sequence[RoundMetrics]) -> Table:
    """One line a round, pooled over the sites."""
    names = measured_names([view.pooled for view in views])
    return table(
        ["ROUND", "KIND", "MODEL OF", "UPDATES", "SECONDS", *(name.upper() for name in names)],
        [
            (
                view.round_number,
                view.kind,
                view.measured_round,
                view.accepted,
                view.duration_s,
                *(view.pooled.get(name) for name in names),
            )
            for view in views
        ],
    )


def sites_table(view: RoundMetrics) -> Table:
    """One line a site, and all of them together."""
    names = measured_names([view.pooled, *(site.metrics for site in view.sites)])
    rows: list[Sequence[Cell]] = [
        (f"{site.organization}/{site.dataset}", *(site.metrics.get(name) for name in names)) for site in view.sites
    ]
    rows.append(("all", *(view.pooled.get(name) for name in names)))
    what = "final model" if view.kind is TaskKind.EVALUATE else f"model of round {view.measured_round}"
    return table(["SITE", *(name.upper() for name in names)], rows, title=f"The {what} at each site")


def measured_names(found: Sequence[Mapping[str, float]]) -> list[str]:
    """Every metric that occurs, those of the hold-out first."""
    names = {name for metrics in found for name in metrics}
    return sorted(names, key=lambda name: (not name.startswith("holdout/"), name))


def last_with_sites(views: Sequence[RoundMetrics]) -> RoundMetrics | None:
    """The newest round whose sites told what they measured."""
    return max((view for view in views if view.sites), key=lambda view: view.round_number, default=None)
