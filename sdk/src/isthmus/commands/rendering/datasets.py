"""Datasets, their policies and their ledgers."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from isthmus.commands.rendering.text import fields, printable, table
from isthmus.wire.data import ColumnSchema
from isthmus.wire.datasets import DatasetView
from isthmus.wire.ledger import LedgerEntryView

MANY_COLUMNS = 60


def datasets_table(views: list[DatasetView]) -> Table:
    """Datasets."""
    return table(
        ["DATASET", "STATE", "ROWS", "COLUMNS", "WORKER", "PURPOSES", "ID"],
        [
            (
                f"{view.organization}/{view.name}",
                view.state,
                view.rows,
                len(view.data_schema.columns),
                view.worker,
                ", ".join(view.policy.purposes) or "none",
                str(view.id),
            )
            for view in views
        ],
    )


def dataset_text(view: DatasetView) -> Group:
    """One dataset with its columns and its policy."""
    columns = view.data_schema.columns
    listed = table(["COLUMN", "KIND", "MISSING"], [(c.name, _kind(c), c.missing) for c in columns[:MANY_COLUMNS]])
    more = [Text(f"  and {len(columns) - MANY_COLUMNS} more columns")] if len(columns) > MANY_COLUMNS else []
    head = fields(
        [
            ("dataset", f"{view.organization}/{view.name}"),
            ("description", view.description),
            ("state", view.state),
            ("rows", view.rows),
            ("worker", view.worker),
            ("id", str(view.id)),
        ]
    )
    return Group(head, listed, *more, policy_text(view))


def _kind(column: ColumnSchema) -> str:
    """`number`, `category`, or `tensor 1 x 28 x 28` with the shape of one record's array."""
    return column.kind.value if column.shape is None else f"{column.kind.value} {' x '.join(map(str, column.shape))}"


def policy_text(view: DatasetView) -> Group:
    """What a dataset may be used for."""
    policy = view.policy
    rule = policy.automatic_approval
    clauses = fields(
        [
            ("purposes", ", ".join(policy.purposes) or "none: no job passes"),
            ("principals", ", ".join(policy.principals) if policy.principals is not None else "any researcher"),
            ("model kinds", ", ".join(policy.model_kinds)),
            ("min noise multiplier", policy.min_noise_multiplier),
            ("max clip norm", policy.max_clip_norm),
            ("min cohort", policy.min_cohort),
            ("max rounds", policy.max_rounds),
            ("exact metrics", policy.allow_exact_metrics),
            ("exact statistics", policy.allow_exact_statistics),
            ("approval", f"by rule: {rule.grant_days} days, {rule.max_rounds} rounds" if rule else "by a steward"),
        ]
    )
    return Group(Text(printable(f"Policy of {view.organization}/{view.name}"), style="bold"), clauses)


def ledger_table(views: list[LedgerEntryView]) -> Table:
    """What was released."""
    return table(
        ["#", "AT", "KIND", "RELEASE", "ROUND", "CLIP NORM", "NOISE", "ELEMENTS", "DIGEST", "JOB"],
        [
            (
                view.sequence,
                view.created_at,
                view.kind,
                view.release,
                view.round_number,
                view.clip_norm,
                view.noise_multiplier,
                view.elements,
                view.digest[:12],
                str(view.job_id),
            )
            for view in views
        ],
    )
