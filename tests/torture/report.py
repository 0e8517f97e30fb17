"""The summary table."""

from collections.abc import Sequence
from typing import Final

from rich.table import Table

from tests.torture.dead_worker import Cost
from tests.torture.driver import Outcome, spread_of

MOST_NAMED: Final = 6


def summary(outcomes: Sequence[Outcome]) -> Table:
    """One line a kind of disturbance, and one for all plans."""
    table = Table(title="What survived", title_justify="left")
    for heading in (
        "disturbance",
        "plans",
        "happened",
        "completed",
        "same model",
        "all held",
        "median",
        "p90",
        "max",
    ):
        table.add_column(heading, justify="left" if heading == "disturbance" else "right")
    table.add_column("failed")
    kinds = sorted({step.kind for outcome in outcomes for step in outcome.plan.steps})
    for kind in kinds:
        mine = [outcome for outcome in outcomes if any(step.kind == kind for step in outcome.plan.steps)]
        times = [
            seconds
            for outcome in mine
            for step, seconds in zip(outcome.happened, outcome.recovery_s, strict=True)
            if step.kind == kind and outcome.completed
        ]
        table.add_row(kind, *_row(mine, times, sum(step.kind == kind for outcome in mine for step in outcome.happened)))
    table.add_section()
    times = [seconds for outcome in outcomes if outcome.completed for seconds in outcome.recovery_s]
    table.add_row("all plans", *_row(outcomes, times, sum(len(outcome.happened) for outcome in outcomes)))
    return table


def _row(outcomes: Sequence[Outcome], times: list[float], happened: int) -> list[str]:
    comparable = [outcome for outcome in outcomes if outcome.same_model is not None]
    failed = [outcome.plan.name for outcome in outcomes if not outcome.ok]
    named = ", ".join(failed[:MOST_NAMED]) + (
        f" and {len(failed) - MOST_NAMED} more" if len(failed) > MOST_NAMED else ""
    )
    return [
        str(len(outcomes)),
        str(happened),
        str(sum(outcome.completed for outcome in outcomes)),
        f"{sum(outcome.same_model is True for outcome in comparable)}/{len(comparable)}",
        str(sum(outcome.ok for outcome in outcomes)),
        *(f"{seconds:.1f} s" for seconds in spread_of(times)),
        named,
    ]


def costs(measured: Sequence[Cost]) -> Table:
    """What dead workers cost."""
    table = Table(title="A worker dies and stays dead (default settings, lease 15 s)", title_justify="left")
    for heading in ("dies at", "over-selection", "round completed after", "promised", "its lease ended first", ""):
        table.add_column(heading)
    for cost in measured:
        table.add_row(
            cost.point,
            "yes" if cost.over_selected else "no, and it is started again",
            f"{cost.seconds:.2f} s",
            f"{cost.bound_s:.0f} s",
            "yes" if cost.lease_lost else "no",
            "ok" if cost.ok else "FAILED",
        )
    return table
