"""The curve: how the federated model grows round by round, between what each hospital reaches alone and all pooled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("Agg")  # no window, on any machine

from matplotlib import pyplot as plt
from matplotlib.ticker import MultipleLocator

from examples.heart.baselines import EVERYBODY, Score
from examples.heart.hospitals import HOSPITALS
from examples.heart.results import POOLED, Results, alone

INK: Final = "#22303c"
MUTED: Final = "#7b8794"
BLUE: Final = "#1764ab"
RED: Final = "#c4512d"
LEAST_SPAN: Final = 0.14
"""A panel shows at least so much from bottom to top, so that small differences look small."""
STYLE: Final[Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c5ced6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8edf1",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


@dataclass(frozen=True)
class Reference:
    """A model that does not change from round to round: a line across the panel."""

    title: str
    value: float
    color: str
    dashes: str


def draw(by_round: Sequence[Score], results: Results, path: Path) -> None:
    """Write the picture.

    Args:
        by_round: how the model after each round does on everybody's held-out rows; the first is the initial one.
        results: the other models, for the lines across.
    """
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(12.5, 5.4), dpi=140)
        panels = [figure.add_axes((left, 0.115, 0.3, 0.655)) for left in (0.05, 0.545)]
        accuracies = [score.accuracy for score in by_round]
        _panel(panels[0], "Accuracy", accuracies, _references(results, "accuracy"))
        areas = [score.auc for score in by_round if score.auc is not None]
        _panel(panels[1], "Area under the ROC curve", areas, _references(results, "auc"))
        figure.suptitle(
            "Four hospitals train one model, and no record leaves its hospital",
            x=0.05, y=0.965, ha="left", fontsize=15, fontweight="bold",
        )  # fmt: skip
        figure.text(
            0.05, 0.88,
            f"Measured on the {by_round[-1].rows} held-out patients of all four, after each round; "
            "0 is the model before training.",
            ha="left", color=MUTED,
        )  # fmt: skip
        figure.savefig(path)
        plt.close(figure)


def _references(results: Results, measure: str) -> list[Reference]:
    def of(row: str) -> float | None:
        value: float | None = getattr(results[row][EVERYBODY], measure)
        return value

    found = [Reference(POOLED, value, INK, "--") for value in [of(POOLED)] if value is not None]
    for hospital in HOSPITALS:
        color = RED if hospital.name == "switzerland" else MUTED
        value = of(alone(hospital.name))
        if value is not None:
            found.append(Reference(f"{hospital.short} alone", value, color, ":"))
    return found


def _panel(axes: Any, title: str, values: Sequence[float], references: Sequence[Reference]) -> None:
    rounds = len(values) - 1
    shown = [*values[1:], *(line.value for line in references)]  # before training a model may be anywhere
    top = max(shown) + 0.015
    bottom = min(min(shown) - 0.015, top - LEAST_SPAN)
    for line in references:
        axes.plot([0, rounds], [line.value] * 2, color=line.color, linestyle=line.dashes, linewidth=1.5, zorder=2)
    axes.plot(range(rounds + 1), values, color=BLUE, linewidth=2.6, marker="o", markersize=4.5, zorder=3)
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=10)
    axes.set_xlabel("round")
    axes.set_xlim(-0.4, rounds + 0.4)
    axes.set_ylim(bottom, top)
    axes.set_xticks(range(0, rounds + 1, max(1, rounds // 4)))
    axes.yaxis.set_major_locator(MultipleLocator(0.05))
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.tick_params(length=0)
    axes.grid(visible=False, axis="x")
    labels = [Reference("federated", values[-1], BLUE, "-"), *references]
    for line, height in zip(labels, _apart([line.value for line in labels], 0.062 * (top - bottom)), strict=True):
        axes.annotate(
            f"{line.value:.2f}  {line.title}",
            xy=(rounds, line.value),
            xytext=(rounds + 0.045 * rounds, height),
            color=line.color,
            fontsize=10,
            fontweight="bold" if line.title == "federated" else "normal",
            va="center",
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], distance: float) -> list[float]:
    """Heights moved as little as need be, so that any two are at least `distance` apart, in the same order."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    groups: list[list[int]] = []

    def middle(group: Sequence[int]) -> float:
        return sum(heights[place] for place in group) / len(group)

    for place in order:
        groups.append([place])
        while len(groups) > 1:
            below, above = groups[-2], groups[-1]
            if middle(above) - middle(below) >= distance * (len(above) + len(below)) / 2:
                break
            groups[-2:] = [below + above]
    moved = list(heights)
    for group in groups:
        for rank, place in enumerate(group):
            moved[place] = middle(group) + distance * (rank - (len(group) - 1) / 2)
    return moved
