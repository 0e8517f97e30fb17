"""The local epochs: what they depend on, and what must not leak from one task to the next."""

from typing import Any

import numpy as np
import pytest
import torch

from isthmus.privacy.clipping import NonFiniteUpdate, global_norm
from isthmus.torch import build, to_arrays
from isthmus.wire.data import DataSpec
from isthmus.wire.jobs import TrainingSpec
from isthmus.wire.manifest import Manifest
from isthmus.wire.models import ModelSpec
from isthmus.wire.privacy import PrivacySpec, PrivacyUnit
from isthmus_worker.determinism import settle
from isthmus_worker.evaluation import NotMeasurable, evaluate
from isthmus_worker.features import Examples
from isthmus_worker.modules import module_of
from isthmus_worker.protection import protect
from isthmus_worker.refusals import DataRefused, ModelRefused
from isthmus_worker.training import train
from isthmus_worker.work import difference

SEED = "0123456789abcdef" * 4
MODEL = {"layers": [{"linear": {"in": 3, "out": 8}}, "relu", {"dropout": {"p": 0.5}}, {"linear": {"in": 8, "out": 2}}]}
SGD = {"optimizer": {"sgd": {"lr": 0.1, "momentum": 0.9}}, "batch_size": 4, "epochs": 2}


def _examples(rows: int = 21) -> Examples:
    generator = np.random.default_rng(1)
    inputs = generator.standard_normal((rows, 3)).astype(np.float32)
    return Examples(inputs=inputs, targets=(inputs[:, 0] > 0).astype(np.int64))


def _trained(training: dict[str, Any] = SGD, seed: str = SEED, rows: int = 21, model: Any = None) -> dict[str, Any]:
    settle(SEED, 1)
    module = build(ModelSpec.model_validate(model or MODEL))
    settle(seed, 1)
    train(
        module,
        _examples(rows),
        TrainingSpec.model_validate(training),
        record_shape=(3,),
        seed=seed,
        tell=lambda _: None,
    )
    return to_arrays(module)


class InPlace(torch.nn.Module):
    """A model that works in the batch that it is given."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Two columns of it, doubled."""
        return batch.mul_(2)[:, :2]


def test_measuring_leaves_the_records_as_they_are_whatever_the_model_does() -> None:
    data = DataSpec.model_validate({"task": "classification", "features": ["a", "b", "c"], "target": "y", "classes": 2})
    examples, untouched = _examples(), _examples()

    evaluate(InPlace(), examples, data, "cross_entropy", lambda: None)

    assert np.array_equal(examples.inputs, untouched.inputs)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize("optimizer", [{"sgd": {"lr": 0.1, "momentum": 0.9}}, "adam", {"adamw": {"weight_decay": 0.1}}])
def test_a_task_done_again_gives_the_same_bytes_whatever_ran_before(optimizer: Any) -> None:
    training = {**SGD, "optimizer": optimizer}
    first = _trained(training)
    torch.rand(7)  # generators move, optimizers gather momentum
    _trained({**SGD, "batch_size": "all"}, seed="ff" * 32)

    assert _same(_trained(training), first)


def test_the_seed_decides_batches_and_dropout() -> None:
    assert not _same(_trained(seed="ab" * 32), _trained())


def test_the_size_of_the_batches_matters() -> None:
    assert not _same(_trained({**SGD, "batch_size": "all"}), _trained())


def test_progress_is_told_after_every_batch_and_may_stop_the_work() -> None:
    told: list[float] = []
    module = build(ModelSpec.model_validate(MODEL))
    train(module, _examples(), TrainingSpec.model_validate(SGD), record_shape=(3,), seed=SEED, tell=told.append)

    assert len(told) == 12  # 6 batches in each of 2 epochs
    assert told[-1] == 1.0


def test_a_last_batch_of_one_is_left_out_where_it_cannot_be_normalized() -> None:
    normed = {
        "layers": [{"linear": {"in": 3, "out": 4}}, {"batch_norm": {"features": 4}}, {"linear": {"in": 4, "out": 2}}]
    }

    assert np.isfinite(_trained(rows=21, model=normed)["0.weight"]).all()  # 21 = 5 * 4 + 1
    with pytest.raises(DataRefused, match="this model needs 2"):
        _trained(rows=1, model=normed)


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataRefused, match="Too few records"):
        _trained(rows=0)


def test_only_averaged_tensors_leave_and_the_difference_is_taken_in_their_own_type() -> None:
    model = Manifest.model_validate(
        {
            "tensors": {
                "w": {"dtype": "F32", "shape": [2]},
                "n": {"dtype": "I64", "shape": [], "rule": "keep"},
                "h": {"dtype": "F16", "shape": [1]},
            }
        }
    )
    before = {"w": np.array([1, 2], np.float32), "n": np.array(3), "h": np.array([1], np.float16)}
    after = {"w": np.array([1.5, 2], np.float32), "n": np.array(9), "h": np.array([3], np.float16)}

    update = difference(after, before, model)

    assert {name: (array.tolist(), str(array.dtype)) for name, array in update.items()} == {
        "h": ([2.0], "float32"), "w": ([0.5, 0.0], "float32"),
    }  # fmt: skip


def test_without_a_privacy_unit_an_update_is_clipped_as_one_vector_if_the_job_has_a_bound() -> None:
    update = {"a": np.full(50, 3, np.float32), "b": np.full(50, 4, np.float32)}

    none = PrivacySpec(unit=PrivacyUnit.NONE)
    clipped = protect(update, PrivacySpec(unit=PrivacyUnit.NONE, clip_norm=1.0), None)

    assert global_norm(clipped) == pytest.approx(1.0, abs=1e-6)
    assert clipped["a"][0] / clipped["b"][0] == pytest.approx(0.75)
    assert _same(protect(update, none, None), update)
    for broken in ([np.nan, 1], [np.inf, 1], [np.inf, -np.inf]):
        with pytest.raises(NonFiniteUpdate):
            protect({"a": np.array(broken, np.float32)}, none, None)
    large = {"a": np.full(4, 3e38, np.float32)}  # finite, though its sum is not
    assert _same(protect(large, none, None), large)


def test_measures_are_finite_also_without_rows_and_auc_needs_both_classes() -> None:
    data = DataSpec.model_validate({"task": "classification", "features": ["a", "b", "c"], "target": "y", "classes": 2})
    model, examples = build(ModelSpec.model_validate(MODEL)), _examples()

    def measured(rows: Examples) -> dict[str, float]:
        return evaluate(model, rows, data, "cross_entropy", lambda: None)

    assert set(measured(examples)) == {"examples", "loss", "accuracy", "auc"}
    assert measured(examples) == measured(examples)  # no dropout
    assert "auc" not in measured(examples.only(examples.targets == 1))
    assert measured(examples.only(examples.targets == 9)) == {"examples": 0, "loss": 0, "accuracy": 0}
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(NotMeasurable):
        measured(examples)


def test_an_entry_point_is_imported_only_if_it_is_allowed() -> None:
    spec = ModelSpec.model_validate(
        {"entry_point": "torch.nn:Linear", "options": {"in_features": 3, "out_features": 2}}
    )

    assert isinstance(module_of(spec, ["torch.nn:Linear"]), torch.nn.Linear)
    with pytest.raises(ModelRefused, match="not allowed"):
        module_of(spec, [])
    with pytest.raises(ModelRefused, match="not installed"):
        module_of(ModelSpec(entry_point="no_such_package:net"), ["no_such_package:net"])
