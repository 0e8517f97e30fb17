"""A job over images, from the announcement to the evaluation, by a real training process; and what it measures on."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.codec.arrays import decode, encode
from isthmus.wire.data import ColumnKind, DatasetSchema
from isthmus.wire.jobs import JobSpec
from isthmus.wire.rounds import ModelReference
from isthmus_worker.loop import Agent, Outcome
from isthmus_worker.settings import Settings
from tests.worker.factories import DATASET, make_model, make_offer, make_settings, make_spec
from tests.worker.fake_service import FakeService

SIDE = 6
ROWS = 80


@pytest.fixture
def settings(tmp_path: Path, service: FakeService) -> Settings:
    """A worker that serves images without any meaning: their labels are drawn."""
    generator = np.random.default_rng(11)
    np.savez_compressed(
        tmp_path / "images.npz",
        image=generator.integers(0, 256, (ROWS, 1, SIDE, SIDE), dtype=np.uint8),
        label=generator.permutation(np.repeat([0, 1], ROWS // 2)),
        ward=np.array(["a", "b"] * (ROWS // 2)),
    )
    source = {"kind": "npz", "path": tmp_path / "images.npz"}
    return make_settings(tmp_path, service_url=service.url, datasets=[{"name": DATASET, "source": source}])


def _spec(**training: Any) -> JobSpec:
    return make_spec(
        model={
            "layers": [
                {"conv2d": {"in": 1, "out": 4, "kernel": 3, "padding": "same"}}, "relu", "flatten",
                {"linear": {"in": 4 * SIDE * SIDE, "out": 64}}, "relu", {"linear": {"in": 64, "out": 2}},
            ]
        },
        data={
            "task": "classification", "features": [{"name": "image", "shape": [1, SIDE, SIDE], "divide_by": 255}],
            "target": "label", "classes": 2,
        },
        training={"optimizer": "adam", "batch_size": 16, **training},
        evaluation={"holdout": 0.5, "every": 1},
    )  # fmt: skip


def test_images_are_announced_by_their_shape(agent: Agent, service: FakeService) -> None:
    agent.announce()

    told = DatasetSchema.model_validate(service.announced[DATASET]["data_schema"])
    assert {column.name: (column.kind, column.shape) for column in told.columns} == {
        "image": (ColumnKind.TENSOR, (1, SIDE, SIDE)),
        "label": (ColumnKind.NUMBER, None),
        "ward": (ColumnKind.CATEGORY, None),
    }
    assert service.announced[DATASET]["rows"] == ROWS


def test_a_job_over_images_is_trained_and_evaluated(agent: Agent, service: FakeService) -> None:
    spec = _spec(epochs=1)
    for number in (1, 4):
        offer = make_offer(spec, number)
        service.offer(offer)
        assert agent.step() is Outcome.SUBMITTED, service.refused
        upload = decode(service.updates[offer.task_id], offer.upload_manifest)
        assert upload["metrics/holdout/examples"] == ROWS / 2
        if number == 1:
            assert upload["metrics/train/examples"] == ROWS / 2
            assert np.abs(upload["0.weight"]).max() > 0


def test_the_rows_that_are_measured_on_are_never_trained_on(agent: Agent, service: FakeService) -> None:
    """A model that knows its training rows by heart does no better than chance where it is measured."""
    spec = _spec(epochs=200)
    offer = make_offer(spec)
    service.offer(offer)
    assert agent.step() is Outcome.SUBMITTED
    upload = decode(service.updates[offer.task_id], offer.upload_manifest)
    model = decode(make_model(spec)[0], offer.model_manifest)
    learnt = encode({name: model[name] + upload[name] for name in model})

    digest = sha256(learnt).hexdigest()
    reference = ModelReference(url=f"/v1/checkpoints/{digest}", digest=digest, size_bytes=len(learnt))
    last = make_offer(spec, number=4, model=reference)
    service.offer(last)
    service.models[digest] = learnt
    assert agent.step() is Outcome.SUBMITTED
    measured = decode(service.updates[last.task_id], last.upload_manifest)

    assert upload["metrics/train/loss"] < 0.05  # by heart
    assert 0.3 < measured["metrics/holdout/accuracy"] < 0.7


def test_images_of_another_shape_are_refused_by_column(agent: Agent, service: FakeService) -> None:
    data = {
        "task": "classification", "features": [{"name": "image", "shape": [1, SIDE * SIDE]}],
        "target": "label", "classes": 2, "shape": [1, SIDE, SIDE],
    }  # fmt: skip
    service.offer(make_offer(make_spec(**{**_spec().model_dump(mode="json"), "data": data})))

    assert agent.step() is Outcome.REFUSED

    assert "'image' must hold one array of shape" in service.refused[0]
