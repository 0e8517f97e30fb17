"""How a benchmark reports: a table for people, the same figures with all samples as JSON, and the machine beside them.

report = Report("rounds", "Seconds per round", ["model MB", "workers", "s per round"])
report.row(0.25, 5, Spread.of(seconds))
report.note("Peers were left out.")
report.finish(arguments.json)
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing, in one unit."""

    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> "Spread":
        """The spread of at least one sample.

        Raises:
            ValueError: there is none.
        """
        found = tuple(float(sample) for sample in samples)
        if not found:
            raise ValueError("no sample was taken")
        return cls(found)

    @property
    def median(self) -> float:
        """The middle, or the mean of the two in the middle."""
        return statistics.median(self.samples)

    @property
    def least(self) -> float:
        """The smallest sample."""
        return min(self.samples)

    @property
    def most(self) -> float:
        """The largest sample."""
        return max(self.samples)

    def percentile(self, share: float) -> float:
        """The smallest sample that at least this share (0 to 1) of all samples do not exceed (nearest rank)."""
        ordered = sorted(self.samples)
        rank = max(1, -int(-share * len(ordered) // 1))
        return ordered[min(rank, len(ordered)) - 1]

    def __str__(self) -> str:
        """The median, and [least..most] if there is more than one sample."""
        if len(self.samples) == 1:
            return shown(self.median)
        return f"{shown(self.median)} [{shown(self.least)}..{shown(self.most)}]"

    def as_json(self) -> dict[str, Any]:
        """Median, 90th and 99th percentile, extremes, and every sample."""
        return {
            "median": self.median,
            "p90": self.percentile(0.9),
            "p99": self.percentile(0.99),
            "min": self.least,
            "max": self.most,
            "samples": list(self.samples),
        }


Cell = str | int | float | Spread | None


class Report:
    """One table, or several under their headings, printed when `finish` is called."""

    def __init__(self, name: str, title: str, columns: Sequence[str]) -> None:
        """Begin a report.

        Args:
            name: the command's own, as in `python -m benchmarks.<name>`; the JSON file is named after it.
            title: what the first table shows.
            columns: its headings, with their units.
        """
        self._name = name
        self._sections: list[tuple[str, list[str], list[list[Cell]]]] = [(title, list(columns), [])]
        self._notes: list[str] = []
        self._began = datetime.now(UTC)
        self._machine = machine()  # the load average is of interest before we add ours

    def section(self, title: str, columns: Sequence[str]) -> None:
        """Begin another table; what follows goes there."""
        self._sections.append((title, list(columns), []))

    def row(self, *values: Cell) -> None:
        """Add a row. None is shown as a dash. The row is echoed at once, so that a long run shows where it is.

        Raises:
            ValueError: it has more or fewer values than the table has columns.
        """
        _, columns, rows = self._sections[-1]
        if len(values) != len(columns):
            raise ValueError(f"{len(values)} values for {len(columns)} columns")
        rows.append(list(values))
        said = ", ".join(f"{column}: {shown(value)}" for column, value in zip(columns, values, strict=True))
        print(said, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Add a sentence below the tables."""
        self._notes.append(text)

    def finish(self, json_path: Path | None = None) -> None:
        """Print everything and write it as JSON, to `benchmarks/results/<name>.json` unless told otherwise."""
        # A pipe has no width of its own: a table cut to 80 columns could not be read.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
        for title, columns, rows in self._sections:
            table = Table(title=title, title_justify="left")
            for number, column in enumerate(columns):
                numeric = all(not isinstance(row[number], str) for row in rows)
                table.add_column(column, justify="right" if numeric else "left")
            for row in rows:
                table.add_row(*(shown(value) for value in row))
            if rows:
                console.print(table)
        for note in self._notes:
            console.print(f"- {note}", markup=False)
        console.print("Machine: " + ", ".join(f"{key} {value}" for key, value in self._machine.items()), markup=False)
        console.print(f"Command: {command()}", markup=False)
        path = json_path or RESULTS / f"{self._name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        console.print(f"JSON: {path}", markup=False)

    def as_json(self) -> dict[str, Any]:
        """The report as plain values; a spread keeps all its samples."""
        return {
            "benchmark": self._name,
            "began": self._began.isoformat(timespec="seconds"),
            "command": command(),
            "machine": self._machine,
            "tables": [
                {
                    "title": title,
                    "rows": [
                        {column: _plain(value) for column, value in zip(columns, row, strict=True)} for row in rows
                    ],
                }
                for title, columns, rows in self._sections
            ],
            "notes": self._notes,
        }


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for the command `python -m benchmarks.<name>`, with the options that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help=f"where the figures go (default: benchmarks/results/{name}.json)"
    )
    return parser


def numbers(text: str) -> list[float]:
    """The values of an option such as `--sizes 0.25,10`."""
    return [float(part) for part in text.split(",") if part.strip()]


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    load = os.getloadavg()
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": f"{load[0]:.2f} {load[1]:.2f} {load[2]:.2f}",
    }


def command() -> str:
    """How to run this again."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    how = ["python", "-m", spec.name.removesuffix(".__main__")] if spec is not None else ["python", sys.argv[0]]
    return shlex.join([*how, *sys.argv[1:]])


def shown(value: Cell) -> str:
    """A cell as people read it: three significant digits, no exponent."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        size = abs(value)
        digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 or size == 0 else 4
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value)


def _plain(value: Cell) -> Any:
    return value.as_json() if isinstance(value, Spread) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
