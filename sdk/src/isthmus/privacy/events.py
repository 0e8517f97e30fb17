"""What was released, as immutable data. What it costs is a function of it: `rdp_of`.

An event names a mechanism and its parameters, nothing of the data. Events live in ledgers for ever: a kind is never
renamed and never changes its meaning; it gains optional parameters only.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Final, TypeAlias

from isthmus.privacy.rdp import ZERO, Curve, distributed_gaussian_rdp, gaussian_rdp, poisson_gaussian_rdp

MAX_DEPTH: Final = 16
"""How deep events may stand within events, where they are read from JSON."""


@dataclass(frozen=True)
class GaussianRelease:
    """One vector with Gaussian noise, to which everybody's part was added.

    Attributes:
        noise_multiplier: the noise's standard deviation divided by the bound on one unit's part; > 0.
        sensitivity: how far two neighbouring sums lie apart, in that same bound: 1 where a unit's part is there or
            zero, 2 where it is replaced by another.
    """

    kind: ClassVar[str] = "gaussian"
    noise_multiplier: float
    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what is not finite and above zero."""
        _check_positive("noise_multiplier", self.noise_multiplier)
        _check_positive("sensitivity", self.sensitivity)

    def to_json(self) -> dict[str, Any]:
        """The event as plain values."""
        return _plain(self)


@dataclass(frozen=True)
class PoissonGaussianRelease:
    """A noised sum over units drawn by independent, secret coins: a step of DP-SGD. Neighbours: one unit more or less.

    Attributes:
        sampling_probability: with which each unit takes part; 0 to 1.
        noise_multiplier: the noise's standard deviation divided by the bound on one unit's part; > 0.
    """

    kind: ClassVar[str] = "poisson-gaussian"
    sampling_probability: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        """Refuses a probability outside of 0 to 1, and noise that is not finite and above zero."""
        _check_positive("noise_multiplier", self.noise_multiplier)
        if not (_is_number(self.sampling_probability) and 0 <= self.sampling_probability <= 1):
            raise ValueError(f"sampling_probability is {self.sampling_probability!r}; it must be between 0 and 1")

    def to_json(self) -> dict[str, Any]:
        """The event as plain values."""
        return _plain(self)


@dataclass(frozen=True)
class DistributedGaussianRelease:
    """A sum to which several organizations each added a discrete Gaussian of their own. Neighbours: one part or zero.

    Attributes:
        sensitivity: bound on the norm of one organization's integers, in lattice units; >= 1.
        local_variance: sigma^2 of each organization's noise, in lattice units; >= 1.
        shares: organizations whose noise is surely in the sum; >= 1.
        dimension: number of coordinates; >= 1.
    """

    kind: ClassVar[str] = "distributed-gaussian"
    sensitivity: int
    local_variance: int
    shares: int
    dimension: int

    def __post_init__(self) -> None:
        """Refuses what is not a whole number from 1."""
        for field in fields(self):
            _check_count(field.name, getattr(self, field.name))

    def to_json(self) -> dict[str, Any]:
        """The event as plain values."""
        return _plain(self)


@dataclass(frozen=True)
class Repeated:
    """The same event so many times, each with noise (and coins) of its own."""

    kind: ClassVar[str] = "repeated"
    event: "Event"
    times: int

    def __post_init__(self) -> None:
        """Refuses a number of times that is not a whole number from 1."""
        _check_count("times", self.times)

    def to_json(self) -> dict[str, Any]:
        """The event as plain values."""
        return {"kind": self.kind, "event": self.event.to_json(), "times": self.times}


@dataclass(frozen=True)
class Together:
    """Several events over the same units, each chosen freely after those before. None: nothing was released."""

    kind: ClassVar[str] = "together"
    events: tuple["Event", ...]

    def to_json(self) -> dict[str, Any]:
        """The event as plain values."""
        return {"kind": self.kind, "events": [event.to_json() for event in self.events]}


Simple: TypeAlias = GaussianRelease | PoissonGaussianRelease | DistributedGaussianRelease
Event: TypeAlias = Simple | Repeated | Together

_SIMPLE: Final[dict[str, type[Simple]]] = {
    event.kind: event for event in (GaussianRelease, PoissonGaussianRelease, DistributedGaussianRelease)
}


@lru_cache(maxsize=4096)
def rdp_of(event: Event) -> Curve:
    """What an event costs: a bound on the Rényi divergence between neighbours, at each of `rdp.ORDERS`."""
    match event:
        case GaussianRelease():
            return gaussian_rdp(event.noise_multiplier / event.sensitivity)
        case PoissonGaussianRelease():
            return poisson_gaussian_rdp(event.sampling_probability, event.noise_multiplier)
        case DistributedGaussianRelease():
            return distributed_gaussian_rdp(event.sensitivity, event.local_variance, event.shares, event.dimension)
        case Repeated():
            return tuple(value * event.times for value in rdp_of(event.event))
        case Together():
            return tuple(map(math.fsum, zip(ZERO, *map(rdp_of, event.events), strict=True)))


def event_from_json(value: Any) -> Event:
    """The event that `to_json` wrote.

    Args:
        value: what a JSON document held; it is not trusted.

    Raises:
        ValueError: it is no event: an unknown kind or parameter, one that is missing or outside of its range, or more
            than `MAX_DEPTH` events within each other.
    """
    return _read(value, MAX_DEPTH)


def _read(value: Any, depth: int) -> Event:
    if not (isinstance(value, dict) and isinstance(value.get("kind"), str)):
        raise ValueError("a privacy event is an object with a kind")
    if depth == 0:
        raise ValueError(f"privacy events stand more than {MAX_DEPTH} deep within each other")
    given = {name: part for name, part in value.items() if name != "kind"}
    match value["kind"]:
        case Repeated.kind:
            _check_names(given, {"event", "times"})
            return Repeated(_read(given["event"], depth - 1), given["times"])
        case Together.kind:
            _check_names(given, {"events"})
            if not isinstance(given["events"], list):
                raise ValueError("the events of a privacy event of the kind together are a list")
            return Together(tuple(_read(part, depth - 1) for part in given["events"]))
        case kind if kind in _SIMPLE:
            try:
                return _SIMPLE[kind](**given)
            except TypeError:
                raise ValueError(
                    f"a privacy event of the kind {kind} has other parameters than {sorted(given)}"
                ) from None
        case kind:
            raise ValueError(f"{kind!r} is no kind of privacy event that this version knows; a newer version may")


def _plain(event: Simple) -> dict[str, Any]:
    return {"kind": event.kind} | {field.name: getattr(event, field.name) for field in fields(event)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_positive(name: str, value: Any) -> None:
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(f"{name} is {value!r}; it must be a finite number above zero")


def _check_count(name: str, value: Any) -> None:
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ValueError(f"{name} is {value!r}; it must be a whole number from 1")


def _check_names(given: dict[str, Any], expected: set[str]) -> None:
    if set(given) != expected:
        raise ValueError(f"a privacy event has the parameters {sorted(expected)}, not {sorted(given)}")
