"""Two pictures of a simulation: how good the model became, and who held what. They need matplotlib.

Nothing here opens a window or keeps a global state: a figure is drawn into a file and forgotten.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus_worker.simulation.engine import Round

MISSING: Final = "Pictures need matplotlib, which is not installed here: pip install 'isthmus-worker[plots]'."
_MOST_NAMES: Final = 30
"""More clients than these are not named along the axis."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def curves(rounds: Sequence[Round], measure: str) -> dict[str, list[tuple[int, float]]]:
    """A measure over the rounds, as (rounds of training that the model had, value): on the test set and on what the
    clients hold out, as far as either was measured.

    Args:
        rounds: of one simulation, in order.
        measure: `accuracy` or `loss`.
    """
    tested = [(one.number, one.test[measure]) for one in rounds if one.test is not None and measure in one.test]
    held = [
        (one.number - 1, one.metrics[f"holdout/{measure}"])
        for one in rounds
        if one.metrics.get("holdout/examples") and f"holdout/{measure}" in one.metrics
    ]
    named = {"on the test set": tested, "on what the clients hold out": held}
    return {name: points for name, points in named.items() if points}


def draw_curve(path: Path, rounds: Sequence[Round], measure: str, title: str) -> bool:
    """Write a PNG of a measure over the rounds; False, and no file, if it was never measured."""
    found = curves(rounds, measure)
    if not found:
        return False
    figure = _figure(7.0, 4.2)
    axes = figure.add_subplot()
    for name, points in found.items():
        numbers, values = zip(*points, strict=True)
        axes.plot(numbers, values, marker="o" if len(points) <= 50 else None, markersize=3, label=name)
    axes.set_xlabel("rounds of training")
    axes.set_ylabel(measure)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if measure == "accuracy":
        axes.set_ylim(0, 1)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    return True


def draw_holdings(path: Path, held: Mapping[str, Mapping[int, int]], classes: Sequence[str]) -> None:
    """Write a PNG of who holds how many records of which class: a column of stacked bars for each client.

    Args:
        path: of the file.
        held: client -> class -> records.
        classes: names of the classes, from 0.
    """
    counts = np.array([[of.get(label, 0) for label in range(len(classes))] for of in held.values()], dtype=np.int64)
    figure = _figure(max(7.0, min(20.0, 0.35 * len(held) + 3)), 4.2)
    axes = figure.add_subplot()
    places = np.arange(len(held))
    below: NDArray[np.int64] = np.zeros(len(held), dtype=np.int64)
    colours: Any = _colours(len(classes))
    for label, name in enumerate(classes):
        axes.bar(places, counts[:, label], bottom=below, color=colours[label], width=0.85, label=name)
        below = below + counts[:, label]
    axes.set_ylabel("records")
    if len(held) <= _MOST_NAMES:
        axes.set_xticks(places, list(held), rotation=60, ha="right", fontsize="small")
    else:
        axes.set_xlabel(f"{len(held)} clients, in their order")
    axes.set_title("Who holds what")
    if 1 < len(classes) <= _MOST_NAMES:
        axes.legend(title="class", fontsize="small", ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path)


def _figure(width: float, height: float) -> Any:
    """A figure that knows how to write PNG files, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra, and slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colours(classes: int) -> Any:
    from matplotlib import colormaps  # noqa: PLC0415

    if classes <= 10:
        return colormaps["tab10"](np.arange(classes))
    return colormaps["turbo"](np.linspace(0, 1, classes))
