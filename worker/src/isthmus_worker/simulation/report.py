"""What is kept and shown of a simulation: files in a folder, and a table of the clients."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table as Shown

from isthmus.codec.arrays import write
from isthmus.commands.rendering.text import Cell, table
from isthmus.federation.cohort import ParticipationKey
from isthmus.wire.base import digest_of
from isthmus.wire.jobs import JobSpec
from isthmus.wire.rounds import TaskKind
from isthmus_worker.simulation.clients import Client, labels_of
from isthmus_worker.simulation.engine import Round, Simulation
from isthmus_worker.simulation.pictures import can_draw, draw_curve, draw_holdings

_SHOWN_CLIENTS: Final = 40
_SHOWN_CLASSES: Final = 6


@dataclass(frozen=True)
class Holding:
    """What one client holds: records, and how many of each class (none for regression)."""

    key: ParticipationKey
    rows: int
    classes: Mapping[int, int]

    @property
    def name(self) -> str:
        """`organization/dataset`."""
        return f"{self.key.organization}/{self.key.dataset}"


def holdings_of(clients: Sequence[Client], spec: JobSpec) -> list[Holding]:
    """What everybody holds, in canonical order.

    Raises:
        DataRefused: a target is not what the job wants.
    """
    classifies = spec.data.task == "classification"
    return [
        Holding(
            client.key,
            client.table.rows,
            dict(sorted(Counter(labels_of(client.table, spec).tolist()).items())) if classifies else {},
        )
        for client in sorted(clients, key=lambda client: client.key)
    ]


def write_results(folder: Path, simulation: Simulation, holdings: Sequence[Holding]) -> list[Path]:
    """Write the model, what goes with it, the rounds and, where matplotlib is, the pictures; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = simulation.spec
    write(folder / "model.safetensors", simulation.model)
    about = {
        "name": spec.name,
        "simulated": True,
        "digest": simulation.digest,
        "spec": spec.model_dump(mode="json", by_alias=True),
        "spec_digest": digest_of(spec),
        "manifest": simulation.manifest.model_dump(mode="json"),
        "statistics": None if simulation.statistics is None else simulation.statistics.model_dump(mode="json"),
    }
    _write_json(folder / "model.json", about)
    _write_json(folder / "rounds.json", rounds_json(simulation, holdings))
    written = [folder / "model.safetensors", folder / "model.json", folder / "rounds.json"]
    if can_draw():
        measure = "accuracy" if spec.data.task == "classification" else "loss"
        curve = folder / f"{measure}.png"
        if draw_curve(curve, simulation.rounds, measure, spec.name):
            written.append(curve)
        names = spec.data.labels or [str(label) for label in range(spec.data.outputs)]
        held = {one.name: one.classes or {0: one.rows} for one in holdings}
        draw_holdings(folder / "clients.png", held, names if spec.data.task == "classification" else ["records"])
        written.append(folder / "clients.png")
    return written


def rounds_json(simulation: Simulation, holdings: Sequence[Holding]) -> dict[str, Any]:
    """The clients and the rounds, as JSON values."""
    return {
        "job": simulation.spec.name,
        "seed": simulation.spec.seed,
        "digest": simulation.digest,
        "privacy": _privacy_json(simulation),
        "clients": [
            {"client": one.name, "rows": one.rows, "classes": {str(label): n for label, n in one.classes.items()}}
            for one in holdings
        ],
        "rounds": [_round_json(one) for one in simulation.rounds],
    }


def clients_table(simulation: Simulation, holdings: Sequence[Holding], labels: Sequence[str] | None) -> Shown:
    """One line a client: what it holds, how many rounds it trained in, and what was measured there last."""
    trained = Counter(key for one in simulation.rounds if one.kind is TaskKind.TRAIN for key in one.cohort)
    epsilons = simulation.epsilon_spent()
    last: dict[ParticipationKey, dict[str, float]] = {}
    for one in simulation.rounds:
        for key, metrics in one.sites.items():
            last.setdefault(key, {}).update(metrics)
    lines: list[Sequence[Cell]] = [
        (
            one.name,
            one.rows,
            _classes(one.classes, labels),
            trained[one.key],
            last.get(one.key, {}).get("train/loss"),
            last.get(one.key, {}).get("holdout/loss"),
            last.get(one.key, {}).get("holdout/accuracy"),
            *([epsilons[one.key]] if epsilons else []),
        )
        for one in holdings[:_SHOWN_CLIENTS]
    ]
    if len(holdings) > _SHOWN_CLIENTS:
        lines.append((f"and {len(holdings) - _SHOWN_CLIENTS} more", None, "", *[None] * (5 if epsilons else 4)))
    columns = ["CLIENT", "RECORDS", "CLASSES", "ROUNDS", "TRAIN LOSS", "HELD-OUT LOSS", "HELD-OUT ACCURACY"]
    columns += ["EPSILON"] if epsilons else []
    return table(columns, lines)


def last_measure(rounds: Sequence[Round]) -> str:
    """The newest accuracy, or loss, in a few words, on the test set if there is one; empty if nothing was measured."""
    for tests in (one.test for one in reversed(rounds) if one.test is not None):
        measure = "accuracy" if "accuracy" in tests else "loss"
        return f"test {measure} {tests[measure]:.4f}"
    for metrics in (one.metrics for one in reversed(rounds)):
        for measure in ("holdout/accuracy", "holdout/loss", "train/loss"):
            if measure in metrics:
                return f"{measure.replace('holdout/', 'held-out ').replace('/', ' ')} {metrics[measure]:.4f}"
    return ""


def spent_sentence(simulation: Simulation) -> str:
    """What the clients' releases add up to, in words; of a simulation with a privacy unit."""
    epsilons, privacy = simulation.epsilon_spent(), simulation.spec.privacy
    return (
        f"Privacy {privacy.mode.value}: epsilon {min(epsilons.values()):.3g} to {max(epsilons.values()):.3g} was spent "
        f"at the clients, at delta {privacy.claimed_delta:g}."
    )


def _privacy_json(simulation: Simulation) -> dict[str, Any]:
    privacy, epsilons = simulation.spec.privacy, simulation.epsilon_spent()
    return {
        "mode": privacy.mode.value,
        "delta": privacy.claimed_delta,
        "repeatable": not epsilons,
        "epsilon_spent": {f"{key.organization}/{key.dataset}": epsilon for key, epsilon in sorted(epsilons.items())},
        "plans": {
            f"{key.organization}/{key.dataset}": plan.model_dump(mode="json")
            for key, plan in sorted(simulation.plans.items())
            if plan is not None
        },
    }


def _classes(held: Mapping[int, int], labels: Sequence[str] | None) -> str:
    if not held:
        return "-"
    named = [labels[label] if labels else str(label) for label in held]
    if len(named) > _SHOWN_CLASSES:
        return f"{len(named)} classes"
    return ", ".join(named)


def _round_json(one: Round) -> dict[str, Any]:
    return {
        "number": one.number,
        "kind": one.kind.value,
        "cohort": [f"{key.organization}/{key.dataset}" for key in one.cohort],
        "metrics": one.metrics,
        "test": one.test,
        "model_digest": one.model_digest,
        "seconds": round(one.seconds, 6),
        "sites": {f"{key.organization}/{key.dataset}": metrics for key, metrics in one.sites.items()},
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
