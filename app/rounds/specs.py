"""A job's spec and manifests, parsed once a process: every step of every round asks for them, and they never change.

A spec is known by its digest; a manifest is fixed once its job was started. Whoever asks here asks about a round, so
the job was.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

from app.models import Job, Participation
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import Manifest
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.rounds import TaskKind, evaluates_in_round, task_manifest

KEPT: Final = 256
"""Jobs, or tasks, whose parsed parts are kept; those used longest ago are forgotten."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Kept(Generic[Key, Value]):
    """Values that are functions of their keys, the last KEPT of them."""

    def __init__(self) -> None:
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of `key`, made if it is not there."""
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = make()
            if len(self._values) > KEPT:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return value


_specs: _Kept[str, JobSpec] = _Kept()
_manifests: _Kept[object, Manifest] = _Kept()
_elements: _Kept[object, int] = _Kept()


def spec_of(job: Job) -> JobSpec:
    """The spec of a job, frozen."""
    return _specs.get(job.spec_digest, lambda: JobSpec.model_validate(job.spec))


def is_secured(job: Job, kind: TaskKind) -> bool:
    """Whether rounds of this kind show the service nothing but the sum of their updates."""
    return kind is TaskKind.TRAIN and spec_of(job).secure_aggregation is not None


def manifest_of(job: Job) -> Manifest:
    """The manifest of the model of a job that was started, frozen."""
    return _manifests.get(job.id, lambda: Manifest.model_validate(job.manifest))


def elements_in(job: Job) -> int:
    """How many parameters the rounds of a job average."""
    return _elements.get(job.id, lambda: manifest_of(job).averaged_elements)


def manifest_of_task(job: Job, kind: TaskKind, number: int) -> Manifest:
    """What an upload for round `number` of a job that was started must hold.

    Rounds differ in whether they measure the model, and in nothing else: kept by number, the manifests of a large model
    in a long job would take gigabytes.
    """
    spec = spec_of(job)
    key = (job.id, kind, evaluates_in_round(spec, number))
    return _manifests.get(key, lambda: task_manifest(kind, spec, number, manifest_of(job)))


def plan_of(participation: Participation) -> PrivacyPlan | None:
    """What the job's privacy section becomes at the participation's dataset; None: the job claims no privacy."""
    return None if participation.plan is None else PrivacyPlan.model_validate(participation.plan)
