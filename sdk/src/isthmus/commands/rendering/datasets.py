"""Datasets, their policies and their ledgers."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from isthmus.commands.rendering.text import Cell, fields, printable, table
from isthmus.wire.data import ColumnSchema
from isthmus.wire.datasets import Budget, DatasetState, DatasetView
from isthmus.wire.ledger import BudgetView, LedgerEntryView
from isthmus.wire.privacy import PrivacyMode

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
    budget = [budget_text(view.budget)] if view.budget is not None else []
    return Group(head, listed, *more, policy_text(view), *budget, *_other_lineage(view))


def _other_lineage(view: DatasetView) -> list[Text]:
    """That the worker tells another lineage than the ledger's, and what the steward's answer would do."""
    if view.lineage == view.ledger_lineage:
        return []
    if view.state is DatasetState.CONFIRMED:
        kept = "The worker announced another lineage than this budget began with; the budget was kept."
        return [Text(kept, style="yellow")]
    text = (
        "The worker does not know these data as the ones that this budget began with: it announced another lineage "
        f"({view.lineage[:12]}, before {view.ledger_lineage[:12]}). {_spent(view.budget)} `isthmus dataset confirm` "
        "keeps the budget and what was spent of it; `--other-records` has it begin anew, and is right only if these "
        "are other records than before."
    )
    return [Text(text, style="yellow")]


def _spent(budget: BudgetView | None) -> str:
    """What was spent before, in a sentence."""
    if budget is None:
        return "No budget was set before."
    spent = f"Spent before: epsilon {budget.spent_epsilon:.4g} of {budget.epsilon:g}"
    released = budget.unaccounted_releases
    return f"{spent}, and {released} releases of jobs without privacy." if released else f"{spent}."


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
            ("privacy modes", modes_text(policy.modes)),
            ("budget", _budget(policy.budget)),
            ("max epsilon of a job", policy.max_epsilon or "as far as the budget reaches"),
            ("max delta of a job", policy.max_delta),
            ("max clip norm", policy.max_clip_norm or "any (jobs without privacy)"),
            ("min cohort", policy.min_cohort),
            ("max rounds", policy.max_rounds),
            ("exact metrics", policy.allow_exact_metrics),
            ("exact statistics", policy.allow_exact_statistics),
            ("secure aggregation", "required" if policy.require_secure_aggregation else "not required"),
            ("approval", f"by rule: {rule.grant_days} days, {rule.max_rounds} rounds" if rule else "by a steward"),
        ]
    )
    return Group(Text(printable(f"Policy of {view.organization}/{view.name}"), style="bold"), clauses)


def modes_text(modes: Sequence[PrivacyMode]) -> Text:
    """Privacy modes that are allowed; `none` stands out."""
    if not modes:
        return Text("none at all: no job passes")
    shown = Text()
    for mode in modes:
        shown.append(", " if shown else "")
        shown.append(
            "no privacy" if mode is PrivacyMode.NONE else mode.value, "red" if mode is PrivacyMode.NONE else ""
        )
    return shown


def _budget(budget: Budget | None) -> str:
    if budget is None:
        return "none: no job with a privacy unit passes"
    return f"epsilon {budget.epsilon:g} at delta {budget.delta:g}, over all jobs"


def budget_text(budget: BudgetView | None) -> Group | Text:
    """Where a budget stands."""
    if budget is None:
        return Text("The dataset has no privacy budget.", style="yellow")
    pairs: list[tuple[str, Cell]] = [
        ("budget", f"epsilon {budget.epsilon:g} at delta {budget.delta:g}"),
        ("spent", f"epsilon {budget.spent_epsilon:.4g}"),
        ("spent and promised", f"epsilon {budget.reserved_epsilon:.4g}"),
    ]
    parts: list[Table | Text] = [fields(pairs)]
    if budget.closed:
        parts.append(Text("Closed: the budget was lowered below what was promised; nothing more passes.", style="red"))
    if budget.unaccounted_releases:
        text = f"{budget.unaccounted_releases} releases of jobs without privacy: nothing bounds what they tell."
        parts.append(Text(text, style="red"))
    return Group(*parts)


def ledger_text(view: DatasetView, entries: Sequence[LedgerEntryView]) -> Group:
    """A dataset's budget, and everything that it was reserved and spent for."""
    head = Text(printable(f"Ledger of {view.organization}/{view.name}"), style="bold")
    return Group(head, budget_text(view.budget), ledger_table(entries))


def ledger_table(views: Sequence[LedgerEntryView]) -> Table:
    """The entries of a ledger, with epsilon as it stood after each."""
    return table(
        ["#", "AT", "KIND", "RELEASE", "ROUND", "MODE", "SPENT", "SPENT AND PROMISED", "DIGEST", "JOB"],
        [
            (
                view.sequence,
                view.created_at,
                view.kind,
                view.release,
                view.round_number,
                Text(view.mode, style="red" if view.mode == PrivacyMode.NONE else ""),
                f"{view.spent_epsilon:.4g}",
                f"{view.reserved_epsilon:.4g}",
                view.digest and view.digest[:12],
                str(view.job_id),
            )
            for view in views
        ],
    )
