"""Offers, records and settings as the tests of the worker need them. Nothing here imports torch."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np

from isthmus.codec.arrays import encode
from isthmus.codec.dtypes import NUMPY_DTYPE
from isthmus.privacy.planning import plan_of
from isthmus.wire.base import digest_of
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.datasets import Budget
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import Manifest
from isthmus.wire.rounds import ModelReference, TaskKind, TaskOffer, kind_of_round, task_manifest
from isthmus_worker.ledger import Account
from isthmus_worker.settings import Settings

JOB_SEED = "5e" * 32
ORGANIZATION = "geneva"
DATASET = "patients"

SPEC: Mapping[str, Any] = {
    "name": "heart",
    "purpose": "heart-research",
    "model": {"layers": [{"linear": {"in": 5, "out": 3}}, "relu", {"linear": {"in": 3, "out": 2}}]},
    "data": {
        "task": "classification",
        "features": [
            {"name": "age"},
            {"name": "pressure", "missing": "indicate"},
            {"name": "sex", "categories": ["F", "M"]},
        ],
        "target": "ill",
        "classes": 2,
        "standardize": "federated",
    },
    "training": {"optimizer": {"sgd": {"lr": 0.1, "momentum": 0.9}}, "batch_size": 8, "epochs": 2},
    "cohort": {"min_updates": 3},
    "privacy": "none",
    "rounds": 3,
    "evaluation": {"holdout": 0.2, "every": 1},
}

RECORD: Mapping[str, Any] = {
    "privacy": {"unit": "record", "clip_norm": 1.0, "epsilon": 3.0},
    "data": {
        **SPEC["data"],
        "features": [
            {"name": "age", "range": [0, 120]},
            {"name": "pressure", "missing": "indicate", "range": [50, 250]},
            {"name": "sex", "categories": ["F", "M"]},
        ],
    },
}
"""What makes the heart job one that protects records."""

LOCAL: Mapping[str, Any] = {
    "privacy": {"unit": "organization", "where": "local", "clip_norm": 1.0, "noise_multiplier": 1.0},
    "strategy": {"fedavg": {"weights": "uniform"}},
    "data": {
        "task": "classification", "features": ["age", {"name": "sex", "categories": ["F", "M"]}], "target": "ill",
        "classes": 2,
    },
    "model": {"layers": [{"linear": {"in": 3, "out": 2}}]},
}  # fmt: skip
"""What makes it one whose updates are noised by each worker."""

SECURED: Mapping[str, Any] = {
    **LOCAL,
    "privacy": {"unit": "none", "clip_norm": 5.0},
    "secure_aggregation": True,
}
"""What makes it one whose updates are only ever seen summed up."""

DISTRIBUTED: Mapping[str, Any] = {
    **SECURED,
    "privacy": {"unit": "organization", "where": "distributed", "clip_norm": 1.0, "noise_multiplier": 4.0},
}
"""What makes it one whose workers each add a share of the noise."""

BUDGET: Mapping[str, float] = {"epsilon": 10.0, "delta": 1e-5}

LINEAGE = "1e" * 32
ACCOUNT = Account(LINEAGE, Budget.model_validate(BUDGET))
"""What the releases of the dataset are charged to."""

ROWS = 40
"""Records of the dataset, as it was declared."""

STATISTICS = FeatureStatistics(
    names=["age", "pressure"], count=[100.0, 90.0], mean=[50.0, 120.0], variance=[100.0, 400.0], rows=100.0, sites=3
)

OPEN_POLICY: Mapping[str, Any] = {
    "principals": ["*"],
    "purposes": ["*"],
    "modes": ["none", "record", "organization-central", "organization-local", "organization-distributed"],
    "allow_exact_metrics": True,
    "allow_exact_statistics": True,
    "min_rows": 5,
}


def make_spec(**changes: Any) -> JobSpec:
    """The heart job, with sections replaced."""
    return JobSpec.model_validate({**SPEC, **changes})


def make_record_spec(**changes: Any) -> JobSpec:
    """The heart job with `unit: record` and epsilon 3, with sections replaced."""
    return make_spec(**{**RECORD, **changes})


def make_local_spec(**changes: Any) -> JobSpec:
    """The heart job with `unit: organization, where: local`, with sections replaced."""
    return make_spec(**{**LOCAL, **changes})


def make_secured_spec(**changes: Any) -> JobSpec:
    """The heart job under secure aggregation, without a privacy unit, with sections replaced."""
    return make_spec(**{**SECURED, **changes})


def make_model(spec: JobSpec, seed: int = 7) -> tuple[bytes, Manifest]:
    """An initial model as bytes, and its manifest."""
    manifest = spec.model.plan(spec.data.input_shape).manifest
    generator = np.random.default_rng(seed)
    arrays = {
        name: (generator.standard_normal(tensor.shape) * 0.3).astype(NUMPY_DTYPE[tensor.dtype])
        if "var" not in name
        else np.ones(tensor.shape, NUMPY_DTYPE[tensor.dtype])
        for name, tensor in manifest.tensors.items()
    }
    return encode(arrays), manifest


def make_offer(spec: JobSpec | None = None, number: int = 1, **changes: Any) -> TaskOffer:
    """A task as an honest service offers it, with fields replaced."""
    spec = spec or make_spec()
    kind = kind_of_round(number, spec.rounds)
    model, manifest = make_model(spec)
    digest = sha256(model).hexdigest()
    offer = TaskOffer(
        task_id=uuid4(),
        kind=kind,
        fence=1,
        lease_s=15.0,
        heartbeat_s=0.2,
        job_id=UUID(int=1),
        job=spec.name,
        spec=spec,
        spec_digest=digest_of(spec),
        requested_by="rosa",
        purpose=spec.purpose,
        grant_expires_at=datetime(2030, 1, 1, tzinfo=UTC),
        grant_rounds=100,
        participation_id=UUID(int=2),
        organization=ORGANIZATION,
        dataset=DATASET,
        round_number=number,
        attempt=1,
        closes_at=datetime(2030, 1, 1, tzinfo=UTC),
        job_seed=JOB_SEED,
        model=ModelReference(url=f"/v1/checkpoints/{digest}", digest=digest, size_bytes=len(model)),
        model_manifest=manifest,
        upload_manifest=task_manifest(kind, spec, number, manifest),
        statistics=None if kind is TaskKind.STATISTICS or spec.data.standardize == "none" else STATISTICS,
        plan=plan_of(spec, ROWS, sum(tensor.elements for tensor in manifest.averaged().values())),
    )
    return offer.model_copy(update=changes)


def write_patients(path: Path, rows: int = ROWS) -> Path:
    """A CSV file of made-up patients: some pressures are missing, and the elder ones are rather ill."""
    generator = np.random.default_rng(3)
    lines = ["age,pressure,sex,ill"]
    for number in range(rows):
        age = int(generator.integers(30, 80))
        pressure = "" if number % 7 == 0 else str(int(generator.integers(90, 180)))
        ill = int(age + generator.normal(0, 5) > 55)
        lines.append(f"{age},{pressure},{'F' if number % 3 == 0 else 'M'},{ill}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_settings(folder: Path, *, service_url: str = "http://127.0.0.1:1", **changes: Any) -> Settings:
    """A worker with one dataset in `folder`/patients.csv, whose policy lets everything pass, up to `BUDGET`."""
    plain: dict[str, Any] = {
        "service_url": service_url,
        "state_dir": folder / "state",
        "datasets": [{"name": DATASET, "source": {"kind": "csv", "path": folder / "patients.csv"}, "budget": BUDGET}],
        "policy": dict(OPEN_POLICY),
        "resources": {"max_memory_mb": 1500},
    }
    return Settings.model_validate({**plain, **changes})


def toml_of(settings: Settings) -> str:
    """The configuration file that gives these settings."""
    return "\n".join(_toml_lines(settings.model_dump(mode="json", exclude_none=True)))


def _toml_lines(plain: Mapping[str, Any]) -> Sequence[str]:
    return [f"{name} = {_toml_value(value)}" for name, value in plain.items()]


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml_value(one)}" for name, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(one) for one in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
