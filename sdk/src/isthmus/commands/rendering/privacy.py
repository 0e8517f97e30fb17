"""What a job's privacy costs and promises: tables for the terminal, and epsilon by round as a picture."""

from pathlib import Path

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from isthmus.commands.rendering.text import Cell, fields, printable, table
from isthmus.privacy.outlook import DatasetOutlook, Outlook
from isthmus.privacy.planning import noise_shares
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import NoisePlace, PrivacyReport, PrivacyUnit

NO_PRIVACY = "No privacy is claimed"
MOST_NAMED = 12
"""Datasets with a name in the picture; more would fill it."""
MISSING = "A picture needs matplotlib, which is not installed here: pip install 'isthmus[plots]'."


def outlook_text(spec: JobSpec, found: Outlook, elements: int) -> Group:
    """What a job would cost, before anybody is asked."""
    privacy = spec.privacy
    if privacy.unit is PrivacyUnit.NONE:
        hidden = [fields([("secured", secured)])] if (secured := _secured(spec)) else []
        return Group(Text(f"{NO_PRIVACY}.", style="bold red"), *hidden, *_advice(found))
    head: list[tuple[str, Cell]] = [
        ("job", spec.name),
        ("hides", f"one {privacy.unit.value}" + (f", noise {privacy.where.value}" if privacy.where else "")),
        ("target", _target(spec)),
        ("rounds", spec.rounds),
        ("parameters", f"{elements:,}"),
        ("clip norm", privacy.clip_norm),
    ]
    if found.mean_noise is not None:
        of_what = "one step's mean gradient" if privacy.unit is PrivacyUnit.RECORD else "the mean update"
        words = f"{found.mean_noise:.3g} of the clip, on every coordinate of {of_what} over {found.organizations} sites"
        head.append(("noise", words))
    if (secured := _secured(spec)) is not None:
        head.append(("secured", secured))
    return Group(fields(head), _datasets(found), *_epsilon_by_round(found), *_advice(found))


def _secured(spec: JobSpec) -> str | None:
    """What secure aggregation shows of a round, and whom its noise counts on; None for a job without it."""
    if spec.secure_aggregation is None:
        return None
    shown = (
        f"only the sum of {spec.cohort.min_updates} or more updates is opened, each bounded to {spec.update_bound:g}"
    )
    if spec.privacy.where is not NoisePlace.DISTRIBUTED:
        return shown
    return f"{shown}; the claim needs {noise_shares(spec)} honest organizations in it"


def _target(spec: JobSpec) -> str:
    privacy = spec.privacy
    if privacy.epsilon is not None:
        return f"epsilon {privacy.epsilon:g} at delta {privacy.claimed_delta:g}; the noise is computed"
    return f"noise multiplier {privacy.noise_multiplier:g}; epsilon at delta {privacy.claimed_delta:g} is computed"


def _datasets(found: Outlook) -> Table:
    return table(
        [
            "DATASET",
            "ROWS",
            "SAMPLED",
            "STEPS A ROUND",
            "NOISE MULTIPLIER",
            "NOISE A STEP",
            "EPSILON",
            "OF THE BUDGET",
            "JOBS IN BUDGET",
        ],
        [_row(one) for one in found.datasets],
    )


def _row(one: DatasetOutlook) -> tuple[Cell, ...]:
    if one.plan is None:
        return (one.name, one.rows, None, None, None, None, Text("out of reach", style="red"), None, None)
    records = one.plan.unit is PrivacyUnit.RECORD
    return (
        one.name,
        one.rows,
        f"{one.plan.sampling_probability:.3g}" if records else None,
        one.plan.steps_per_round if records else None,
        f"{one.plan.noise_multiplier:g}",
        None if one.step_noise is None else f"{one.step_noise:.3g} of the clip",
        f"{one.plan.epsilon:.4g}",
        f"{one.plan.budget_epsilon:.4g}",
        one.jobs_in_budget,
    )


def _epsilon_by_round(found: Outlook) -> list[Table | Text]:
    """Epsilon at some rounds, at the dataset where it ends highest."""
    planned = [one for one in found.datasets if one.plan is not None and one.epsilon_by_round]
    if not planned:
        return []
    most = max(planned, key=lambda one: one.epsilon_by_round[-1][1])
    points = most.epsilon_by_round
    chosen = sorted({0, *(len(points) * part // 5 for part in range(1, 5)), len(points) - 1})
    shown = [(number, f"{epsilon:.4g}") for number, epsilon in (points[place] for place in chosen)]
    heading = Text(printable(f"Epsilon by round, at {most.name}"), style="bold")
    return [heading, table(["AFTER ROUND", "EPSILON"], shown)]


def _advice(found: Outlook) -> list[Text]:
    if not found.advice:
        return []
    return [Text("Advice", style="bold"), *(Text(f"  {printable(sentence)}") for sentence in found.advice)]


def draw_outlook(path: Path, spec: JobSpec, found: Outlook) -> None:
    """Epsilon by round at every dataset, as a PNG.

    Raises:
        typer.BadParameter: matplotlib is not installed, or there is no epsilon to draw.
    """
    planned = [one for one in found.datasets if one.epsilon_by_round]
    if not planned:
        raise typer.BadParameter("the job has no epsilon to draw: it claims no privacy, or its target is out of reach")
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - slow, and not always installed
        from matplotlib.ticker import MaxNLocator  # noqa: PLC0415
    except ImportError:
        raise typer.BadParameter(MISSING) from None
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for place, one in enumerate(planned):
        label = one.name if place < MOST_NAMED else None
        axes.plot(*zip(*one.epsilon_by_round, strict=True), marker=".", label=label)
    if spec.privacy.epsilon is not None:
        axes.axhline(spec.privacy.epsilon, color="black", linestyle="--", linewidth=1, label="the job's target")
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"epsilon at delta {spec.privacy.claimed_delta:g}")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{spec.name}: what each dataset has spent after every round")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def report_text(report: PrivacyReport) -> Group:
    """A job's privacy report."""
    claims = report.unit is not PrivacyUnit.NONE
    title = Text(printable(f"Privacy of {report.job}"), style="bold")
    promise = Text(printable(report.guarantee), style="" if claims else "bold red")
    head: list[tuple[str, Cell]] = [
        ("hides", f"one {report.unit.value}" if claims else Text(NO_PRIVACY, style="red")),
        ("mechanism", report.mechanism),
        ("neighbours", report.adjacency),
        ("accountant", report.accountant),
    ]
    if claims:
        head.append(("delta", f"{report.delta:g}"))
    parts: list[Table | Text] = [title, promise, fields(head)]
    if report.datasets:
        parts.append(_report_table(report))
    for heading, sentences in (
        ("What leaves a site", report.released),
        ("Assumed", report.assumptions),
        ("Not protected", report.not_protected),
    ):
        if sentences:
            parts.append(Text(heading, style="bold"))
            parts.extend(Text(f"  {printable(sentence)}") for sentence in sentences)
    return Group(*parts)


def _report_table(report: PrivacyReport) -> Table:
    return table(
        ["DATASET", "STATE", "ROWS", "NOISE", "EPSILON OF THE JOB", "SPENT", "PER PERSON", "REFERENCE", "RELEASES"],
        [
            (
                f"{one.organization}/{one.dataset}",
                one.state,
                one.declared_rows,
                None if one.plan is None else f"{one.plan.noise_multiplier:g}",
                Text("unbounded", style="red") if one.plan is None else f"{one.plan.epsilon:.4g}",
                Text("unbounded", style="red") if one.epsilon_spent is None else f"{one.epsilon_spent:.4g}",
                None if one.epsilon_person is None else f"{one.epsilon_person:.4g}",
                None if one.epsilon_reference is None else f"{one.epsilon_reference:.4g}",
                one.releases,
            )
            for one in report.datasets
        ],
    )
