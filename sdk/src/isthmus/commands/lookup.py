"""From what a person types to an id. What looks like a UUID is an id and never a name."""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar
from uuid import UUID

from isthmus.client import Client, IsthmusError
from isthmus.wire.jobs import ParticipationState, ParticipationView


class NoSuch(IsthmusError):
    """Nothing that this key may see goes by that name."""


class Ambiguous(IsthmusError):
    """More than one thing goes by that name."""


class _Identified(Protocol):
    @property
    def id(self) -> UUID: ...


View = TypeVar("View", bound=_Identified)


def as_id(reference: str) -> UUID | None:
    """The id that `reference` is; None if it is a name."""
    try:
        return UUID(reference)
    except ValueError:
        return None


def only_one(reference: str, what: str, candidates: Iterable[View], names: Callable[[View], Iterable[str]]) -> UUID:
    """The id of the one candidate that goes by `reference`.

    Raises:
        NoSuch, Ambiguous: there is none, or more than one.
    """
    found = [candidate for candidate in candidates if reference in names(candidate)]
    if not found:
        raise NoSuch(f"There is no {what} {reference!r} that this key may see.")
    if len(found) > 1:
        ids = ", ".join(str(candidate.id) for candidate in found[:5])
        raise Ambiguous(f"{len(found)} {what}s go by {reference!r}; say which by its id: {ids}")
    return found[0].id


def organization_id(client: Client, reference: str | None) -> UUID:
    """An organization by name or id; None: the caller's own."""
    if reference is not None:
        known = as_id(reference)
        if known is not None:
            return known
    own = client.me().organization
    if own is not None and reference in (None, own.name):
        return own.id
    if reference is None:
        raise NoSuch("This key belongs to no organization: say which one is meant.")
    return only_one(reference, "organization", client.organizations.list(), lambda view: [view.name])


def principal_id(client: Client, reference: str) -> UUID:
    """A principal by name or id."""
    return as_id(reference) or only_one(reference, "principal", client.principals.list(), lambda view: [view.name])


def worker_id(client: Client, reference: str) -> UUID:
    """A worker by name, `organization/name` or id."""
    return as_id(reference) or only_one(
        reference, "worker", client.workers.list(), lambda view: [view.name, f"{view.organization}/{view.name}"]
    )


def dataset_id(client: Client, reference: str) -> UUID:
    """A dataset by name, `organization/name` or id."""
    return as_id(reference) or only_one(
        reference, "dataset", client.datasets.list(), lambda view: [view.name, f"{view.organization}/{view.name}"]
    )


def participation_id(
    client: Client, reference: str, *, job_id: UUID | None, states: Iterable[ParticipationState]
) -> UUID:
    """A participation by id, or by its dataset (`name`, `organization/name`) where only one in `states` is meant."""
    known = as_id(reference)
    if known is not None:
        return known
    wanted = frozenset(states)
    candidates = (view for view in client.participations.list(job_id=job_id) if view.state in wanted)
    words = " or ".join(sorted(wanted))
    return only_one(reference, f"participation ({words}) of dataset", candidates, _names_of_participation)


def _names_of_participation(view: ParticipationView) -> list[str]:
    return [view.dataset, f"{view.organization}/{view.dataset}"]
