"""What is done to a job, and where: a plan is a function of its seed, so that a failure can be had again."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from isthmus.wire.jobs import JobSpec
from tests.acceptance.island import job_spec
from tests.torture.points import AGENT, CHILD, COORDINATOR, POINTS, SERVER, WIRE

ONE: Final = "one"
SPREAD: Final = "spread"
LAYOUTS: Final = (ONE, SPREAD)
SITES: Final = ("clinic-0", "clinic-1", "clinic-2")

KILL: Final = "kill"
FREEZE: Final = "freeze"  # SIGSTOP, for longer than a lease
CUT: Final = "cut"
STALL: Final = "stall"  # nothing goes through for longer than a lease
KILL_AGENT: Final = "kill agent"
KILL_SERVER: Final = "kill server"
POSTGRES_FAST: Final = "postgres fast"
POSTGRES_IMMEDIATE: Final = "postgres immediate"
CLOCK_FORWARD: Final = "clock forward"  # an hour, for good
CLOCK_BACK: Final = "clock back"  # an hour, for a few seconds
WALL_FORWARD: Final = "wall forward"  # the time of day of one role's processes, not Postgres's
WALL_BACK: Final = "wall back"

ANYWHERE: Final = (POSTGRES_FAST, POSTGRES_IMMEDIATE, CLOCK_FORWARD, CLOCK_BACK, WALL_FORWARD, WALL_BACK)
ON_THE_WIRE: Final = (CUT, STALL, KILL_AGENT, KILL_SERVER)

_MODEL: Final = {"layers": [{"linear": {"in": 5, "out": 4}}, "relu", {"linear": {"in": 4, "out": 2}}]}
_WIDE: Final = {
    "layers": [{"linear": {"in": 5, "out": 512}}, "relu", {"linear": {"in": 512, "out": 640}}, "relu",
               {"linear": {"in": 640, "out": 2}}]
}  # fmt: skip
_ALL: Final = {"min_updates": 3, "deadline_s": 600, "attempts": 8}

_SEX: Final = {"name": "sex", "categories": ["Female", "Male"]}
_RANGED: Final = {
    "task": "classification", "target": "disease", "classes": 2, "standardize": "federated",
    "features": [
        {"name": "age", "range": [0, 120]}, {"name": "chol", "range": [50, 500], "missing": "indicate"}, _SEX
    ],
}  # fmt: skip
_ORGANIZATIONS: Final = {
    "model": {"layers": [{"linear": {"in": 3, "out": 4}}, "relu", {"linear": {"in": 4, "out": 2}}]},
    "data": {"task": "classification", "target": "disease", "classes": 2, "features": ["age", _SEX]},
    "strategy": {"fedavg": {"weights": "uniform"}},
    "evaluation": {"holdout": 0.25},
}
_SECURED: Final = {**_ORGANIZATIONS, "strategy": "fedavg", "secure_aggregation": True}
_LOUD: Final = {"clip_norm": 0.5, "noise_multiplier": 20.0}
"""So that the budgets of a ground last for hundreds of jobs."""

VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "momentum": {"strategy": "fedavgm"},
    "adam": {"strategy": {"fedadam": {"lr": 0.05}}},
    "wide": {"model": _WIDE, "strategy": "fedavgm"},  # bodies of more than a megabyte
    "record": {
        "data": _RANGED,
        "privacy": {"unit": "record", "epsilon": 1.0, "clip_norm": 1.0},
        "evaluation": {"holdout": 0.25, "release": "noised"},
    },
    "local": {**_ORGANIZATIONS, "privacy": {"unit": "organization", "where": "local", **_LOUD}},
    "central": {**_ORGANIZATIONS, "privacy": {"unit": "organization", "where": "central", **_LOUD}},
    "secured": {**_SECURED, "strategy": "fedavgm", "privacy": {"unit": "none", "clip_norm": 1.0}},
    "hasty": {
        **_SECURED,
        "privacy": {"unit": "none", "clip_norm": 1.0},
        "secure_aggregation": {"step_s": 1.5},
    },
    "distributed": {
        **_ORGANIZATIONS,
        "secure_aggregation": True,
        "evaluation": {"holdout": 0},
        "privacy": {"unit": "organization", "where": "distributed", **_LOUD},
    },
    "over-selection": {"cohort": {**_ALL, "min_updates": 2, "fraction": 0.6, "over_selection": 1}},
}
EXACT: Final = ("plain", "momentum", "adam", "wide", "secured", "hasty")
"""Without noise, over-selection and missed deadlines: the model is that of an undisturbed job. All three sites are
needed under secure aggregation, so that whatever was given up and begun again has the same sum in the end."""
_PLAIN: Final = EXACT[:4]


def spec_of(variant: str) -> JobSpec:
    """The job of a variant: statistics, two rounds of training, evaluation."""
    return job_spec(**{"name": variant, "model": _MODEL, "rounds": 2, "cohort": _ALL, **VARIANTS[variant]})


@dataclass(frozen=True)
class Step:
    """At the n-th passage of `point` by `role`, do `action`; what dies is started again after `restart_s`."""

    point: str
    role: str
    """SERVER, COORDINATOR, or the organization whose agent, training process or wire it is."""
    passage: int
    action: str
    restart_s: float = 0.0

    @property
    def kind(self) -> str:
        """The line of the table that this step counts for."""
        if self.action != KILL:
            return self.action
        return f"kill {POINTS[self.point].program}"

    def __str__(self) -> str:
        words = WIRE[self.point].words if self.point in WIRE else POINTS[self.point].words
        where = f"passage {self.passage} of {self.point} at {self.role} ({words})"
        again = f", back after {self.restart_s:g} s" if self.action in (KILL, KILL_AGENT, KILL_SERVER) else ""
        return f"{self.action} at {where}{again}"


@dataclass(frozen=True)
class Plan:
    """One job, and what happens to it."""

    name: str
    layout: str
    variant: str
    steps: tuple[Step, ...]
    drawn: bool = False
    """Whether it came from a seed: then a step may never come to pass."""

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.name}: job {self.variant!r} on layout {self.layout!r}", *(f"  {s}" for s in self.steps)]
        )


def draw(seed: int) -> Plan:
    """The plan of a seed: one to three steps, at points that the job of its variant may pass."""
    chance = random.Random(f"isthmus torture {seed}")
    layout = chance.choice(LAYOUTS)
    variant = chance.choice(list(VARIANTS))
    count = chance.choice((1, 1, 2, 2, 3))
    steps: dict[tuple[str, str], Step] = {}
    while len(steps) < count:
        step = _step(chance, variant)
        steps[step.role, step.point] = step  # one order a point and role
    return Plan(f"seed {seed}", layout, variant, tuple(steps.values()), drawn=True)


def _step(chance: random.Random, variant: str) -> Step:
    passed = [name for name, point in POINTS.items() if _passes(variant, point.variant)]
    point = chance.choice([*passed, *(name for name, point in WIRE.items() if _passes(variant, point.variant))])
    if point in WIRE:
        actions: Sequence[str] = (CUT, CUT, STALL, KILL_AGENT, KILL_SERVER)
    elif POINTS[point].program == CHILD:
        actions = (KILL,)
    else:
        actions = (KILL,) * 8 + (FREEZE, *ANYWHERE)
    return Step(
        point=point,
        role=_role(point, chance.choice(SITES)),
        passage=chance.choice((1, 1, 2, 3)),
        action=chance.choice(actions),
        restart_s=chance.choice((0.0, 0.0, 0.3, 1.0, 2.5)),
    )


def _passes(variant: str, wanted: str) -> bool:
    """Whether the job of a variant may come to a point that not every job passes."""
    masks = "secure_aggregation" in VARIANTS[variant]
    return wanted in ("", "wide", variant) or (wanted == "secured" and masks)


def _role(point: str, site: str) -> str:
    if point in WIRE or POINTS[point].program in (AGENT, CHILD):
        return site
    return POINTS[point].program


def every_point() -> Iterator[Plan]:
    """Each named point once, by SIGKILL, in the middle of training; half of them in each layout."""
    for number, point in enumerate(POINTS.values()):
        first = 1 if point.needs or point.variant else 2
        steps = [Step(point.name, _role(point.name, SITES[number % 3]), first, KILL, 0.3)]
        if point.needs:
            steps.append(Step(point.needs, SITES[number % 3], 2, KILL, 2.5))
        layout = ONE if point.needs else LAYOUTS[number % 2]  # which process comes by then is decided by a race
        yield Plan(f"point {point.name}", layout, point.variant or _PLAIN[number // 2 % len(_PLAIN)], tuple(steps))


def every_disturbance() -> Iterator[Plan]:
    """Each other disturbance once in each layout: on every place of the wire, and at telling points elsewhere."""
    for number, (point, action) in enumerate([(point, action) for point in WIRE for action in ON_THE_WIRE]):
        layout = LAYOUTS[(number + number // len(ON_THE_WIRE)) % 2]
        steps = (Step(point, SITES[number % 3], 2, action, 0.3),)
        yield Plan(f"{action} at {point}", layout, WIRE[point].variant, steps)
    for layout in LAYOUTS:
        for action, point in (
            (POSTGRES_FAST, "spent"),
            (POSTGRES_IMMEDIATE, "update-durable"),
            (POSTGRES_IMMEDIATE, "aggregate-unpublished"),
            (CLOCK_FORWARD, "training-ordered"),
            (CLOCK_FORWARD, "spent"),
            (CLOCK_BACK, "training-ordered"),
            (WALL_FORWARD, "prepared"),
            (WALL_BACK, "update-durable"),
            (FREEZE, "spent"),
            (FREEZE, "task-in-hand"),
            (FREEZE, "update-durable"),
            (FREEZE, "aggregate-unpublished"),
            (FREEZE, "sweep-begun"),
            (POSTGRES_IMMEDIATE, "step-uncommitted"),
            (POSTGRES_IMMEDIATE, "survivors-kept"),
            (POSTGRES_FAST, "secrets-rebuilt"),
            (CLOCK_FORWARD, "shares-made"),
            (CLOCK_FORWARD, "survivors-kept"),
            (CLOCK_FORWARD, "revealed"),
            (CLOCK_BACK, "keys-made"),
            (FREEZE, "shares-kept"),
            (FREEZE, "masked-over"),
            (FREEZE, "step-uncommitted"),
            (FREEZE, "sum-half-written"),
        ):
            step = Step(point, _role(point, SITES[1]), 2, action)
            yield Plan(f"{action} at {point}", layout, POINTS[point].variant or "momentum", (step,))


__all__ = ["COORDINATOR", "SERVER", "Plan", "Step", "draw", "every_disturbance", "every_point", "spec_of"]
