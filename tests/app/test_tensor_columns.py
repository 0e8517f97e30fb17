"""Datasets whose records are arrays: announced by their shape, and asked only where a job wants that shape."""

import numpy as np
import pytest

from isthmus.wire.data import ColumnKind, ColumnSchema
from isthmus.wire.datasets import DatasetState
from isthmus.wire.jobs import JobSpec, JobState
from isthmus.wire.problems import ProblemCode
from tests.federation import Federation, Site, job_spec
from tests.running import refused

SHAPE = (1, 4, 4)


def _announce(site: Site, shape: tuple[int, ...]) -> None:
    columns = (
        ColumnSchema(name="image", kind=ColumnKind.TENSOR, shape=shape),
        ColumnSchema(name="label", kind=ColumnKind.NUMBER),
    )
    site.dataset = site.steward.datasets.confirm(site.announce(columns=columns, rows=100, description="scans").id)


def _spec(shape: tuple[int, ...] = SHAPE) -> JobSpec:
    width = int(np.prod(shape))
    return job_spec(
        model={"layers": ["flatten", {"linear": {"in": width, "out": 2}}]},
        data={
            "task": "classification",
            "features": [{"name": "image", "shape": list(shape), "divide_by": 255}],
            "target": "label",
            "classes": 2,
        },
    )


def _model(shape: tuple[int, ...] = SHAPE) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    width = int(np.prod(shape))
    return {"1.weight": np.zeros((2, width), np.float32), "1.bias": np.zeros(2, np.float32)}


@pytest.fixture
def imaging(federation: Federation) -> Federation:
    """Three sites with images of one shape, and one with images of another."""
    federation.add(4)
    for site in federation.sites[:3]:
        _announce(site, SHAPE)
    _announce(federation.sites[3], (3, 4, 4))
    return federation


def test_a_job_over_images_asks_the_datasets_of_that_shape(imaging: Federation) -> None:
    job = imaging.start(_spec(), _model())
    assert imaging.job(job).state is JobState.RUNNING

    asked = {one.organization for one in imaging.researcher.jobs.participations(job.id)}

    assert asked == {site.organization.name for site in imaging.sites[:3]}
    offer = imaging.sites[0].claim()
    assert offer.spec.data.input_shape == SHAPE
    assert offer.model_manifest.tensors["1.weight"].shape == (2, 16)


def test_where_no_shape_fits_the_refusal_says_which_are_held(imaging: Federation) -> None:
    with refused(ProblemCode.NO_MATCHING_DATASET) as refusals:
        imaging.start(_spec((1, 5, 5)), _model((1, 5, 5)))

    detail = str(refusals[0])
    assert "Column 'image' holds arrays of shape [1, 4, 4]; the job wants arrays of shape [1, 5, 5]." in detail
    assert "Column 'image' holds arrays of shape [3, 4, 4]" in detail


def test_another_shape_of_its_arrays_has_a_dataset_confirmed_anew(imaging: Federation) -> None:
    site = imaging.sites[0]
    columns = (
        ColumnSchema(name="image", kind=ColumnKind.TENSOR, shape=(1, 8, 8)),
        ColumnSchema(name="label", kind=ColumnKind.NUMBER),
    )

    told = site.announce(columns=columns, rows=100, description="scans")

    assert told.state is DatasetState.ANNOUNCED
