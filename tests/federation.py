"""A federation for tests of the engine: sites whose workers do by hand what agents do, over the real service.

def test_a_round_is_the_weighted_mean(federation: Federation) -> None:
    job = federation.start(job_spec())
    for site in federation.sites:
        site.hand_in(site.claim(), filled(1.0))
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import numpy as np
import pytest
from numpy.typing import NDArray

from app.settings import Settings
from isthmus.client import Client
from isthmus.client.tasks import NoWork
from isthmus.codec import arrays
from isthmus.wire.datasets import AutomaticApproval, Budget, DatasetView, UsePolicy
from isthmus.wire.jobs import JobSpec, JobState, JobView
from isthmus.wire.organizations import OrganizationView
from isthmus.wire.privacy import LARGEST_EPSILON, PrivacyMode
from isthmus.wire.rounds import (
    METRICS_PREFIX,
    ClaimTask,
    FailTask,
    Heartbeat,
    HeartbeatReceipt,
    RefuseTask,
    TaskKind,
    TaskOffer,
    TaskView,
    UpdateReceipt,
)
from tests.running import PATIENCE_S, Platform, first_admin, serving

Arrays = dict[str, NDArray[Any]]
SEED = "5e" * 32
OPEN = UsePolicy(
    purposes=("research",),
    modes=(PrivacyMode.NONE, PrivacyMode.RECORD, PrivacyMode.CENTRAL, PrivacyMode.LOCAL),
    budget=Budget(epsilon=LARGEST_EPSILON),
    allow_exact_metrics=True,
    allow_exact_statistics=True,
    automatic_approval=AutomaticApproval(),
)
BY_HAND = OPEN.model_copy(update={"automatic_approval": None})

RECORD: dict[str, Any] = {"unit": "record", "clip_norm": 1.0, "noise_multiplier": 4.0}
CENTRAL: dict[str, Any] = {"unit": "organization", "where": "central", "clip_norm": 1.0, "noise_multiplier": 4.0}
LOCAL: dict[str, Any] = {**CENTRAL, "where": "local"}
"""Privacy sections. Those of organizations go with `strategy=UNIFORM`."""
UNIFORM: dict[str, Any] = {"fedavg": {"weights": "uniform"}}

Thing = TypeVar("Thing")


def job_spec(**changes: Any) -> JobSpec:
    """A small job that only trains: a linear model of two inputs and two classes."""
    spec: dict[str, Any] = {
        "name": "small",
        "model": {"layers": [{"linear": {"in": 2, "out": 2}}]},
        "data": {"task": "classification", "features": ["age", "chol"], "target": "disease", "classes": 2},
        "training": {"optimizer": {"sgd": {"lr": 0.1}}},
        "privacy": "none",
        "rounds": 1,
        "cohort": {"min_updates": 2, "deadline_s": 60},
        "evaluation": {"holdout": 0, "release": "local"},
        "seed": SEED,
    }
    return JobSpec.model_validate({**spec, **changes})


def initial() -> Arrays:
    """The initial model of `job_spec`, all zeros, so that a checkpoint tells the sum of what was handed in."""
    return filled(0.0)


def filled(value: float) -> Arrays:
    """An update, or a model, of `job_spec` with one value everywhere."""
    return {"0.bias": np.full(2, value, np.float32), "0.weight": np.full((2, 2), value, np.float32)}


class Site:
    """One organization with a steward, a worker and a dataset."""

    def __init__(self, platform: Platform, folder: Path, name: str, rows: int, policy: UsePolicy) -> None:
        self.platform = platform
        self.folder = folder
        self.organization: OrganizationView = platform.organization(name)
        self.steward: Client = platform.steward(self.organization)
        self.worker: Client = platform.worker(self.organization)
        self.dataset: DatasetView = self.announce(rows=rows)
        self.steward.datasets.confirm(self.dataset.id)
        self.steward.datasets.set_policy(self.dataset.id, policy)

    def announce(self, name: str = "heart", **told: Any) -> DatasetView:
        """Announce a dataset under the worker's signature; what is told is as `announcement` takes it."""
        return self.platform.announce(self.worker, name, **told)

    def try_claim(self, wait_s: int = 0) -> TaskOffer | None:
        """What is on offer now, if anything."""
        offer = self.worker.tasks.claim(ClaimTask(), wait_s=wait_s)
        return None if isinstance(offer, NoWork) else offer

    def claim(self, wait_s: int = 20) -> TaskOffer:
        """The next task, waited for."""
        offer = self.try_claim(wait_s)
        assert offer is not None, f"{self.organization.name} was offered nothing in {wait_s} s"
        return offer

    def body(self, offer: TaskOffer, tensors: Mapping[str, NDArray[Any]], name: str = "") -> tuple[Path, str]:
        """A file with the tensors, and its digest."""
        data = arrays.encode(dict(tensors))
        path = self.folder / f"{offer.task_id}{name}.safetensors"
        path.write_bytes(data)
        return path, hashlib.sha256(data).hexdigest()

    def hand_in(
        self, offer: TaskOffer, tensors: Mapping[str, NDArray[Any]], *, fence: int | None = None
    ) -> UpdateReceipt:
        """Upload tensors for a task."""
        path, digest = self.body(offer, tensors)
        return self.send(offer, path, digest, fence=fence)

    def send(self, offer: TaskOffer, path: Path, digest: str, *, fence: int | None = None) -> UpdateReceipt:
        """Upload a file for a task."""
        return self.worker.tasks.submit_update(
            offer.task_id, path, digest=digest, fence=fence or offer.fence, on_admitted=lambda: None
        )

    def heartbeat(self, offer: TaskOffer) -> HeartbeatReceipt:
        """Keep the lease."""
        return self.worker.tasks.heartbeat(offer.task_id, Heartbeat(fence=offer.fence))

    def refuse(self, offer: TaskOffer, reason: str = "the policy says no") -> TaskView:
        """Say no."""
        return self.worker.tasks.refuse(offer.task_id, RefuseTask(fence=offer.fence, reason=reason))

    def fail(self, offer: TaskOffer, reason: str = "out of memory") -> TaskView:
        """Give up."""
        return self.worker.tasks.fail(offer.task_id, FailTask(fence=offer.fence, reason=reason))


class Federation:
    """Sites and a researcher on one platform."""

    def __init__(self, platform: Platform, folder: Path) -> None:
        self.platform = platform
        self.folder = folder
        self.researcher = platform.researcher("ada")
        self.sites: list[Site] = []

    def add(self, count: int, *, policy: UsePolicy = OPEN, rows: Callable[[int], int] = lambda number: 100) -> None:
        """So many more sites, named in their canonical order."""
        for _ in range(count):
            number = len(self.sites)
            self.sites.append(Site(self.platform, self.folder, f"clinic-{number:02}", rows(number), policy))

    def draft(self, spec: JobSpec, model: Mapping[str, NDArray[Any]] | None = None) -> JobView:
        """A draft with its model."""
        job = self.researcher.jobs.create(spec)
        return self.researcher.jobs.upload_model(job.id, arrays.encode(dict(model or initial())))

    def start(self, spec: JobSpec | None = None, model: Mapping[str, NDArray[Any]] | None = None) -> JobView:
        """A job on its way."""
        return self.researcher.jobs.start(self.draft(spec or job_spec(), model).id)

    def job(self, job: JobView) -> JobView:
        """The job as it stands now."""
        return self.researcher.jobs.get(job.id)

    def until(self, what: Callable[[], Thing], *, patience_s: float = PATIENCE_S) -> Thing:
        """The first true answer of `what`."""
        deadline = time.monotonic() + patience_s
        while not (answer := what()):
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)
        return answer

    def until_state(self, job: JobView, *states: JobState) -> JobView:
        """The job, once it is in one of these states."""

        def there() -> JobView | None:
            now = self.job(job)
            return now if now.state in states else None

        found = self.until(there)
        assert found is not None
        return found

    def finish(self, job: JobView) -> JobView:
        """The job, once it has ended."""
        return self.until_state(job, JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)

    def model(self, job: JobView) -> Arrays:
        """The newest checkpoint."""
        path = self.folder / f"model-{job.id}.safetensors"
        self.researcher.jobs.download_model(job.id, path)
        return arrays.read(path)

    def blobs(self, prefix: str = "") -> list[Path]:
        """Every file that the service keeps under a prefix."""
        root = self.folder / "data" / "blobs" / prefix
        return sorted(path for path in root.rglob("*") if path.is_file())


def measured(offer: TaskOffer, **values: float) -> Arrays:
    """The metrics that an upload of this task must hold: 100 examples and the values given, else 0.5."""
    found = {}
    for name in offer.upload_manifest.tensors:
        if name.startswith(METRICS_PREFIX):
            measure = name.rpartition("/")[2]
            found[name] = np.array(100.0 if measure == "examples" else values.get(measure, 0.5))
    return found


def open_federation(
    database_url: str, folder: Path, stack: ExitStack, *, sites: int = 3, policy: UsePolicy = OPEN, **settings: Any
) -> Federation:
    """A service with its coordinator and so many sites."""
    configured = Settings(
        **{
            "database_url": database_url,
            "data_dir": folder / "data",
            "coordinate": True,
            "sweep": timedelta(milliseconds=100),
            "lease": timedelta(minutes=10),  # no lease lapses because the machine is slow; tests end them by hand
            **settings,
        }
    )
    base_url = stack.enter_context(serving(configured))
    federation = Federation(Platform(base_url, database_url, first_admin(database_url), stack), folder)
    federation.add(sites, policy=policy)
    return federation


@pytest.fixture
def make_federation(database_url: str, tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    """Opens a federation with settings of the test's own."""
    with ExitStack() as stack:
        yield lambda **settings: open_federation(database_url, tmp_path, stack, **settings)


@pytest.fixture
def federation(make_federation: Callable[..., Federation]) -> Federation:
    """Three sites that approve by rule, on a service with its coordinator."""
    return make_federation()


def round_id_of(federation: Federation, job: JobView, number: int) -> UUID:
    """The id of a round, as people see it."""
    return federation.researcher.jobs.round(job.id, number).id


__all__ = ["TaskKind", "federation", "make_federation"]
