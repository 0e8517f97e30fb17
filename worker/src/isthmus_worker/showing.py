"""Ledgers and results as people read them."""

from typing import Any

from rich.console import Console
from rich.table import Table

from isthmus.wire.datasets import Budget
from isthmus_worker.journal import Journal
from isthmus_worker.ledger import HANDOVER, costs_of

_PLACES = {"examples": "examples", "loss": "loss", "accuracy": "accuracy", "auc": "AUC"}
"""Measures in the order in which people read them."""


def standing(journal: Journal, name: str, budget: Budget | None) -> dict[str, Any]:
    """Where a dataset's budget stands, by this worker's own ledger.

    `spent_epsilon` counts what may have left unheard; None: there is no budget at whose delta to tell it.
    """
    found: dict[str, Any] = {
        "name": name,
        "lineage": (lineage := journal.lineages.find(name)),
        "handed_to": None,
        "epsilon": budget.epsilon if budget is not None else None,
        "delta": budget.delta if budget is not None else None,
        "spent_epsilon": None,
        "releases": 0,
        "unaccounted": 0,
    }
    if lineage is None:
        return found
    total = journal.ledgers.total(lineage)
    return {
        **found,
        "handed_to": journal.lineages.handed_to(lineage),
        "spent_epsilon": journal.spent(lineage).epsilon(budget.delta) if budget is not None else None,
        "releases": sum(entry.plain["kind"] != HANDOVER for entry in journal.ledgers.entries(lineage)),
        "unaccounted": total.unaccounted,
    }


def in_words(one: dict[str, Any]) -> str:
    """A standing as a line."""
    if one.get("handed_to"):
        return f"handed on to the worker {one['handed_to']}"
    if one.get("lineage") is None:
        return "not served yet"
    spent = (
        f"epsilon {one['spent_epsilon']:.4g} of {one['epsilon']:g} spent (delta {one['delta']:g})"
        if one["spent_epsilon"] is not None
        else "no budget"
    )
    bare = f", {one['unaccounted']} of them without any bound" if one["unaccounted"] else ""
    return f"{spent}, {one['releases']} releases{bare}"


def lines(journal: Journal, name: str) -> list[dict[str, Any]]:
    """The entries of a dataset's ledger."""
    lineage = journal.lineages.find(name)
    if lineage is None:
        return []
    return [
        {"sequence": entry.sequence, **entry.plain, "previous_hash": entry.previous_hash, "hash": entry.hash}
        for entry in journal.ledgers.entries(lineage)
    ]


def show_ledger(one: dict[str, Any]) -> None:
    """A ledger as a table."""
    table = Table(title=f"{one['name']}: {in_words(one)}", title_justify="left")
    for heading in ("#", "when", "job", "dataset", "round", "what", "mode"):
        table.add_column(heading)
    table.add_column("epsilon alone", justify="right")
    for entry in one["entries"]:
        at = entry["at"][:19].replace("T", " ")
        if entry["kind"] == HANDOVER:
            table.add_row(str(entry["sequence"]), at, "", "", "", f"handed on to {entry['taker'][:12]}…", "", "")
            continue
        alone = "no bound" if entry["unaccounted"] else f"{costs_of(entry)[0].epsilon(one['delta'] or 1e-5):.4g}"
        table.add_row(
            str(entry["sequence"]), at, entry["job"], entry["dataset"], str(entry["round_number"]), entry["kind"],
            entry["mode"], alone,
        )  # fmt: skip
    Console().print(table)


def show_results(found: list[dict[str, Any]]) -> None:
    """Measurements, a table for each job and dataset."""
    groups = dict[tuple[str, str], list[dict[str, Any]]]()
    for one in found:
        groups.setdefault((one["participation_id"], one["dataset"]), []).append(one)
    for (_participation, dataset), rows in groups.items():
        names = _ordered({name for row in rows for name in row["metrics"]})
        table = Table(title=f"{rows[0]['job']} at {dataset}", title_justify="left")
        for heading in ("round", "task", "model after round"):
            table.add_column(heading, justify="left" if heading == "task" else "right")
        for name in names:
            table.add_column(name, justify="right")
        for row in rows:
            held_out = any(name.startswith("holdout/") for name in row["metrics"])
            table.add_row(
                str(row["round_number"]),
                row["kind"],
                str(row["measured_round"]) if held_out else "",
                *(_number(row["metrics"].get(name)) for name in names),
            )
        Console().print(table)


def _ordered(names: set[str]) -> list[str]:
    """Of the hold-out first, then of training; counts before losses."""
    order = list(_PLACES)

    def place(name: str) -> tuple[bool, int, str]:
        last = name.rsplit("/", 1)[-1]
        return not name.startswith("holdout/"), order.index(last) if last in order else len(order), name

    return sorted(names, key=place)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value == int(value) else f"{value:.4f}"
