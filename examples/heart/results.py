"""What came out, as a table and as sentences that follow from it."""

from collections.abc import Mapping
from typing import Final

from rich import box
from rich.table import Table
from rich.text import Text

from examples.heart.baselines import EVERYBODY, Score, Scores
from examples.heart.hospitals import HOSPITALS

FEDERATED: Final = "federated"
POOLED: Final = "pooled, no privacy"

Results = Mapping[str, Scores]
"""`<hospital> alone`, `federated`, `pooled, no privacy` -> how that model does at each hospital, and on everybody."""


def alone(hospital: str) -> str:
    """The row of a hospital's own model."""
    return f"{hospital} alone"


def results_table(results: Results) -> Table:
    """Accuracy and AUC on each hospital's held-out rows: a line a model, a column a hospital."""
    rows = results[FEDERATED]
    table = Table(box=box.SIMPLE_HEAD, header_style="", show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(Text("  model", style="bold"), no_wrap=True)
    titles = {hospital.name: hospital.short for hospital in HOSPITALS} | {EVERYBODY: EVERYBODY}
    for name, title in titles.items():
        head = Text.assemble((title, "bold"), f"\n{rows[name].rows} rows\n", ("acc.  AUC", "dim"))
        table.add_column(head, justify="right", no_wrap=True)
    for row, scores in results.items():
        style = "bold" if row == FEDERATED else ""
        own = {name: "underline" if row == alone(name) else "" for name in titles}
        cells = [Text(_cell(scores[name]), style=own[name]) for name in titles]
        table.add_row(_row_title(row), *cells, style=style, end_section=row == alone(HOSPITALS[-1].name))
    return table


def conclusions(results: Results) -> list[str]:
    """What the table says, and what it cannot say."""
    federated, pooled, swiss = results[FEDERATED], results[POOLED], results[alone("switzerland")]
    everybody, there = federated[EVERYBODY], federated["switzerland"]
    said = [
        f"On everybody's {everybody.rows} held-out patients the federated model is right for {_percent(everybody)}, a "
        f"model of all records in one place for {_percent(pooled[EVERYBODY])}, Switzerland's own for "
        f"{_percent(swiss[EVERYBODY])}. Only the federated one hides its patients; the others have no noise."
    ]
    own = swiss["switzerland"]
    if own.accuracy > there.accuracy:
        verdict = f"is better served by its own model: right for {_percent(own)}, against {_percent(there)}"
    elif own.accuracy == there.accuracy:
        verdict = f"is served as well by its own model: right for {_percent(own)} with either"
    else:
        verdict = f"is better served by the federated model this time: right for {_percent(there)}, not {_percent(own)}"
    said.append(
        f"Switzerland, on its own {own.rows} held-out patients, {verdict}. But 93 % of its patients are ill, so that "
        'answering "ill" for everybody is nearly always right there; and with 8 healthy patients in all it can neither '
        "learn nor measure what health looks like. Its AUC is noise."
    )
    said.append(
        f"{everybody.rows} patients are few: an accuracy of 0.80 on them has a standard error of 0.03. Hold-outs and "
        "noise are drawn anew in every run."
    )
    return said


def _row_title(row: str) -> Text:
    for hospital in HOSPITALS:
        if row == alone(hospital.name):
            return Text(f"  {hospital.short} alone")
    return Text(f"  {row}")


def _cell(score: Score) -> str:
    return f"{score.accuracy:.2f} " + (" n/a" if score.auc is None else f"{score.auc:.2f}")


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy:.0f} %"
