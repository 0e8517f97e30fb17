"""One task, from the records to the bytes that may leave. Runs in the child; the agent only ever sees the result."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from isthmus.codec.arrays import read, types_of, write
from isthmus.codec.errors import CodecError
from isthmus.codec.header import Header, check_manifest
from isthmus.federation.cohort import round_seed
from isthmus.privacy.clipping import NonFiniteUpdate
from isthmus.torch import ArraysMisfit, UnsupportedTensor, views_of_arrays
from isthmus.wire.base import digest_of
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import DType, Manifest
from isthmus.wire.rounds import METRICS_PREFIX, STATISTICS_PREFIX, TaskKind, TaskOffer, evaluates_in_round
from isthmus_worker.data import open_source
from isthmus_worker.determinism import settle
from isthmus_worker.evaluation import NotMeasurable, evaluate
from isthmus_worker.features import Examples, require_enough_rows, require_two_classes
from isthmus_worker.measuring import measure_columns
from isthmus_worker.messages import Done, Work
from isthmus_worker.modules import loaded_module
from isthmus_worker.parts import Marked, Split, mark_holdout, split_examples
from isthmus_worker.protection import protect
from isthmus_worker.refusals import WorkBroken
from isthmus_worker.training import train

Tell = Callable[[float], None]
Arrays = dict[str, NDArray[Any]]


@dataclass
class Desk:
    """What the child keeps between tasks: the last dataset, encoded. Never a model, an optimizer or a generator."""

    _key: str | None = None
    _split: Split | None = field(default=None, repr=False)

    def split(self, order: Work) -> Split:
        """The encoded dataset of a training or evaluation task, from memory if neither data nor job changed."""
        stamp = open_source(order.dataset.source).stamp()
        key = _key_of(order, stamp) if stamp is not None else None
        if self._split is None or key is None or key != self._key:
            self._key, self._split = None, None  # not two datasets in memory at once
            self._split = _load_split(order)
            self._key = key
        _require_enough(order, len(self._split.training), len(self._split.holdout))
        return self._split

    def perform(self, order: Work, tell: Tell) -> Done:
        """Do a task and write its upload to `order.upload_path`. The agent makes it durable.

        Raises:
            DataRefused: the data cannot serve it.
            ModelRefused: the model cannot be built here.
            WorkBroken: it went wrong.
        """
        offer = order.offer
        settle(_seed(offer), offer.spec.training.threads)
        tell(0.0)
        if offer.kind is TaskKind.STATISTICS:
            tensors, metrics = _measure(order), dict[str, float]()
        elif offer.kind is TaskKind.TRAIN:
            tensors, metrics = _train(order, self, tell)
        else:
            model, _before = _model(order)
            tensors, metrics = {}, holdout_metrics(model, self.split(order).holdout, offer.spec, tell)
        tensors.update(_released(metrics, offer.upload_manifest))
        return _composed(tensors, order, metrics)


def _key_of(order: Work, stamp: str) -> str:
    statistics = order.offer.statistics
    return digest_of(
        {
            "dataset": order.dataset.model_dump(mode="json"),
            "stamp": stamp,
            "data": order.offer.spec.data.model_dump(mode="json"),
            "statistics": statistics.model_dump(mode="json") if statistics is not None else None,
            "holdout": order.offer.spec.evaluation.holdout,
        }
    )


def _train(order: Work, desk: Desk, tell: Tell) -> tuple[Arrays, dict[str, float]]:
    offer = order.offer
    split = desk.split(order)
    model, before = _model(order)
    return local_update(
        model,
        before,
        split,
        offer.spec,
        manifest=offer.model_manifest,
        round_number=offer.round_number,
        seed=_seed(offer),
        tell=tell,
    )


def local_update(
    model: nn.Module,
    before: Mapping[str, NDArray[Any]],
    split: Split,
    spec: JobSpec,
    *,
    manifest: Manifest,
    round_number: int,
    seed: str,
    tell: Tell,
) -> tuple[Arrays, dict[str, float]]:
    """One participation's part in a training round, from the round's model to the update that may leave.

    Args:
        model: holds `before`; trained in place.
        before: the round's model. Not modified.
        split: the dataset; only `split.training` is trained on.
        spec: the job.
        manifest: the model's.
        round_number: the round's; it decides whether the round's model is measured first.
        seed: the task's.
        tell: hears of progress; may raise to stop the work.

    Returns:
        The update, clipped and noised as the job says, and what was measured.

    Raises:
        DataRefused: the records cannot serve it.
        WorkBroken: training diverged.
    """
    metrics = dict[str, float]()
    require_two_classes(spec.data, np.concatenate([split.training.targets, split.holdout.targets]))
    if evaluates_in_round(spec, round_number):
        metrics.update(holdout_metrics(model, split.holdout, spec, tell))
    settle(seed, spec.training.threads)  # again: neither building the model nor measuring it may move the generators
    metrics["train/loss"] = train(
        model, split.training, spec.training, record_shape=spec.data.input_shape, seed=seed, tell=tell
    )
    metrics["train/examples"] = float(len(split.training))
    if not np.isfinite(metrics["train/loss"]):
        raise WorkBroken("Training diverged: the loss is NaN or infinite. A smaller learning rate helps.")
    update = difference(views_of_arrays(model), before, manifest)
    with _divergence_told():
        return protect(update, spec.privacy), metrics


def holdout_metrics(model: nn.Module, examples: Examples, spec: JobSpec, tell: Tell) -> dict[str, float]:
    """`holdout/loss` and the others of a model on records that it was not trained on.

    Raises:
        WorkBroken: the model has diverged.
    """
    with _divergence_told():
        found = evaluate(model, examples, spec.data, spec.training.loss, lambda: tell(0.0))
    return {f"holdout/{name}": value for name, value in found.items()}


@contextmanager
def _divergence_told() -> Iterator[None]:
    try:
        yield
    except NotMeasurable:
        raise WorkBroken("The model's loss on the held-out records is NaN or infinite: it has diverged.") from None
    except NonFiniteUpdate:
        raise WorkBroken(
            "Training diverged: the update holds NaN or an infinity. A smaller learning rate helps."
        ) from None


def _seed(offer: TaskOffer) -> str:
    return round_seed(offer.job_seed, offer.round_number, offer.organization, offer.dataset)


def _measure(order: Work) -> Arrays:
    marked = _load(order)
    _require_enough(order, int((~marked.holdout).sum()), int(marked.holdout.sum()))
    return measure_columns(marked.table, order.offer.spec.data, ~marked.holdout)


def difference(after: Mapping[str, NDArray[Any]], before: Mapping[str, NDArray[Any]], model: Manifest) -> Arrays:
    """Trained minus round model, tensor by tensor, for the tensors that rounds average; the others stay home."""
    return {
        name: np.subtract(after[name], before[name], dtype=np.float64 if spec.dtype is DType.F64 else np.float32)
        for name, spec in model.averaged().items()  # as `update_manifest`, which would be validated for every task
    }


def _require_enough(order: Work, training: int, holdout: int) -> None:
    leaving = order.offer.upload_manifest.tensors
    exact = any(name.startswith((METRICS_PREFIX, STATISTICS_PREFIX)) for name in leaving)
    require_enough_rows(training, holdout, order.min_rows, exact=exact)


def _model(order: Work) -> tuple[nn.Module, Arrays]:
    assert order.model_path is not None, "the agent fetches the model of every task that needs one"
    try:
        arrays = read(order.model_path, order.offer.model_manifest)
        model = loaded_module(order.offer.spec.model, order.entry_points, arrays)
    except (CodecError, ArraysMisfit, UnsupportedTensor) as error:
        raise WorkBroken(f"The round's model does not fit the job's: {error}") from None
    return model, arrays


def _load(order: Work) -> Marked:
    spec = order.offer.spec
    table = open_source(order.dataset.source).load(spec.data.columns())
    return mark_holdout(table, spec, bytes.fromhex(order.holdout_key))


def _load_split(order: Work) -> Split:
    return split_examples(_load(order), order.offer.spec, order.offer.statistics)


def _released(metrics: Mapping[str, float], manifest: Manifest) -> Arrays:
    """The measures that the manifest asks for; the rest stays with the worker."""
    asked = manifest.tensors.keys()
    return {
        f"{METRICS_PREFIX}{name}": np.array(value, dtype=np.float64)
        for name, value in metrics.items()
        if f"{METRICS_PREFIX}{name}" in asked
    }


def _composed(tensors: Arrays, order: Work, metrics: dict[str, float]) -> Done:
    """Write exactly what the manifest names, and nothing else."""
    try:
        check_manifest(Header(types_of(tensors)), order.offer.upload_manifest)
    except CodecError as error:
        raise WorkBroken(f"The result is not what the task's manifest names: {error}") from None
    digest = write(order.upload_path, tensors, durable=False)  # `Journal.prepare` syncs it
    order.upload_path.chmod(0o600)
    return Done(digest=digest, size_bytes=order.upload_path.stat().st_size, metrics=metrics)
