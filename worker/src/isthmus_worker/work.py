"""One task, from the records to the bytes that may leave. Runs in the child; the agent only ever sees the result."""

from collections.abc import Callable, Mapping
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
from isthmus.torch import ArraysMisfit, UnsupportedTensor, WholeNumberEmbedding, views_of_arrays
from isthmus.wire.base import digest_of
from isthmus.wire.jobs import EvaluationRelease, JobSpec
from isthmus.wire.manifest import DType, Manifest
from isthmus.wire.privacy import PrivacyPlan, PrivacyUnit
from isthmus.wire.rounds import METRICS_PREFIX, STATISTICS_PREFIX, TaskKind, TaskOffer, evaluates_in_round
from isthmus_worker.data import open_source
from isthmus_worker.determinism import settle
from isthmus_worker.evaluation import NotMeasurable, evaluate, right_answers
from isthmus_worker.features import Examples, require_enough_rows, require_two_classes
from isthmus_worker.measuring import measure_columns
from isthmus_worker.messages import Done, Work
from isthmus_worker.modules import loaded_module
from isthmus_worker.parts import Marked, Split, mark_holdout, split_examples
from isthmus_worker.private_evaluation import noised_quality
from isthmus_worker.private_statistics import measure_privately
from isthmus_worker.protection import protect
from isthmus_worker.refusals import WorkBroken
from isthmus_worker.secured.masking import kept_manifest, kept_of
from isthmus_worker.training import train

Tell = Callable[[float], None]
Arrays = dict[str, NDArray[Any]]
Leaving = Callable[[Mapping[str, NDArray[Any]], JobSpec, PrivacyPlan | None], Arrays]


@dataclass(frozen=True)
class Measures:
    """What was measured, by name: `holdout/loss`, `train/examples`, ...

    Attributes:
        local: as it was measured. It stays at the site; its own people may look at it.
        told: what leaves: the same, or noised counts, or nothing.
    """

    local: dict[str, float] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)

    def with_training(self, loss: float, examples: int, *, told: bool) -> "Measures":
        """With the loss of training, if it is a finite number, and the records behind it; `told`: both leave."""
        found = {"train/loss": loss, "train/examples": float(examples)}
        if not np.isfinite(loss):
            del found["train/loss"]
        return Measures({**self.local, **found}, {**self.told, **found} if told else self.told)


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
            tensors, measures = _measure(order), Measures()
        elif offer.kind is TaskKind.TRAIN:
            tensors, measures = _train(order, self, tell)
        else:
            model, _before = _model(order)
            measures = holdout_measures(model, self.split(order).holdout, offer.spec, offer.plan, tell)
            tensors = {}
        tensors.update(_released(measures.told, offer.upload_manifest))
        return _composed(tensors, order, measures.local)


def _key_of(order: Work, stamp: str) -> str:
    statistics = order.offer.statistics
    return digest_of(
        {
            "dataset": order.dataset.model_dump(mode="json"),
            "stamp": stamp,
            "data": order.offer.spec.data.model_dump(mode="json"),
            "statistics": statistics.model_dump(mode="json") if statistics is not None else None,
            "holdout": order.offer.spec.evaluation.holdout,
            "apart": order.offer.spec.privacy.unit is PrivacyUnit.RECORD,
        }
    )


def _train(order: Work, desk: Desk, tell: Tell) -> tuple[Arrays, Measures]:
    offer = order.offer
    split = desk.split(order)
    model, before = _model(order)
    return local_update(
        model,
        before,
        split,
        offer.spec,
        plan=offer.plan,
        manifest=offer.model_manifest,
        round_number=offer.round_number,
        seed=_seed(offer),
        tell=tell,
        leaving=kept_of if offer.secured is not None else None,
    )


def local_update(
    model: nn.Module,
    before: Mapping[str, NDArray[Any]],
    split: Split,
    spec: JobSpec,
    *,
    plan: PrivacyPlan | None,
    manifest: Manifest,
    round_number: int,
    seed: str,
    tell: Tell,
    leaving: Leaving | None = None,
) -> tuple[Arrays, Measures]:
    """One participation's part in a training round, from the round's model to the update that may leave.

    Args:
        model: holds `before`; trained in place.
        before: the round's model. Not modified.
        split: the dataset; only `split.training` is trained on.
        spec: the job.
        plan: what its privacy section becomes at this dataset; None if it has no privacy unit.
        manifest: the model's.
        round_number: the round's; it decides whether the round's model is measured first.
        seed: the task's.
        tell: hears of progress; may raise to stop the work.
        leaving: makes of the update, the job and the plan what is kept of it, clipped and noised as the job says;
            None: `protect`.

    Returns:
        The update, protected as the job says, and what was measured.

    Raises:
        DataRefused: the records cannot serve it; not with a privacy unit, where that would tell of them.
        ModelRefused: the model's records cannot be told apart, and the unit is the record.
        WorkBroken: training diverged; not with a privacy unit. An update that is NaN or infinite is one of zeros there,
            clipped and noised as any other.
    """
    _keep_in_range(model, plan)
    if plan is None:
        require_two_classes(spec.data, np.concatenate([split.training.targets, split.holdout.targets]))
    measures = Measures()
    if evaluates_in_round(spec, round_number):
        measures = holdout_measures(model, split.holdout, spec, plan, tell)
    settle(seed, spec.training.threads)  # again: neither building the model nor measuring it may move the generators
    loss = _trained(model, split.training, spec, plan, manifest=manifest, seed=seed, tell=tell)
    measures = measures.with_training(loss, len(split.training), told=spec.releases_exact_metrics)
    update = difference(views_of_arrays(model), before, manifest)
    keep = leaving or _protected
    try:
        return keep(update, spec, plan), measures
    except NonFiniteUpdate:
        if plan is None:
            raise WorkBroken(
                "Training diverged: the update holds NaN or an infinity. A smaller learning rate helps."
            ) from None
    still = {name: np.zeros_like(array) for name, array in update.items()}
    return keep(still, spec, plan), measures


def _protected(update: Mapping[str, NDArray[Any]], spec: JobSpec, plan: PrivacyPlan | None) -> Arrays:
    return protect(update, spec.privacy, plan)


def _trained(
    model: nn.Module,
    examples: Examples,
    spec: JobSpec,
    plan: PrivacyPlan | None,
    *,
    manifest: Manifest,
    seed: str,
    tell: Tell,
) -> float:
    """Train `model` in place; the mean loss."""
    shape = spec.data.input_shape
    if plan is not None and plan.unit is PrivacyUnit.RECORD:
        from isthmus_worker.private_training import train_privately  # noqa: PLC0415 - Opacus costs a second to import

        averaged = manifest.averaged().keys()
        return train_privately(model, examples, spec.training, plan, averaged=averaged, record_shape=shape, tell=tell)
    loss = train(model, examples, spec.training, record_shape=shape, seed=seed, tell=tell)
    if plan is None and not np.isfinite(loss):
        raise WorkBroken("Training diverged: the loss is NaN or infinite. A smaller learning rate helps.")
    return loss


def _keep_in_range(model: nn.Module, plan: PrivacyPlan | None) -> None:
    """With a privacy unit no number is outside of an embedding: an error would tell that some record holds it."""
    for layer in model.modules():
        if isinstance(layer, WholeNumberEmbedding):
            layer.clamps = plan is not None


def holdout_measures(
    model: nn.Module, examples: Examples, spec: JobSpec, plan: PrivacyPlan | None, tell: Tell
) -> Measures:
    """`holdout/loss` and the others of a model on records that it was not trained on, and what of it may be told.

    Raises:
        WorkBroken: the model has diverged; not with a privacy unit, where that would tell of the records.
    """
    _keep_in_range(model, plan)
    try:
        found = evaluate(model, examples, spec.data, spec.training.loss, lambda: tell(0.0), strict=plan is None)
    except NotMeasurable:
        raise WorkBroken("The model's loss on the held-out records is NaN or infinite: it has diverged.") from None
    told: Mapping[str, float] = {}
    if spec.evaluation_release is EvaluationRelease.EXACT:
        told = found
    elif plan is not None and plan.evaluation_noise_multiplier is not None:
        right = right_answers(model, examples, spec.data, lambda: tell(0.0))
        told = noised_quality(len(examples), right, plan.evaluation_noise_multiplier)
    return Measures(_named("holdout", found), _named("holdout", told))


def _named(group: str, measures: Mapping[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in measures.items()}


def _seed(offer: TaskOffer) -> str:
    return round_seed(offer.job_seed, offer.round_number, offer.organization, offer.dataset)


def _measure(order: Work) -> Arrays:
    marked, plan, data = _load(order), order.offer.plan, order.offer.spec.data
    _require_enough(order, int((~marked.holdout).sum()), int(marked.holdout.sum()))
    if plan is not None and plan.statistics_noise_multiplier is not None:
        return measure_privately(marked.table, data, ~marked.holdout, plan.statistics_noise_multiplier)
    return measure_columns(marked.table, data, ~marked.holdout)


def difference(after: Mapping[str, NDArray[Any]], before: Mapping[str, NDArray[Any]], model: Manifest) -> Arrays:
    """Trained minus round model, tensor by tensor, for the tensors that rounds average; the others stay home."""
    return {
        name: np.subtract(after[name], before[name], dtype=np.float64 if spec.dtype is DType.F64 else np.float32)
        for name, spec in model.averaged().items()  # as `update_manifest`, which would be validated for every task
    }


def _require_enough(order: Work, training: int, holdout: int) -> None:
    plan = order.offer.plan
    if plan is not None and plan.unit is PrivacyUnit.RECORD:  # what everybody knows is asked: a refusal tells nothing
        training = round(plan.expected_batch / plan.sampling_probability)
        require_enough_rows(training, 0, order.min_rows, exact=False)
        return
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
    """Write exactly what the manifest names, and nothing else; of a secured round, what is kept to be masked."""
    offer = order.offer
    manifest = offer.upload_manifest if offer.secured is None else kept_manifest(offer)
    try:
        check_manifest(Header(types_of(tensors)), manifest)
    except CodecError as error:
        raise WorkBroken(f"The result is not what the task's manifest names: {error}") from None
    digest = write(order.upload_path, tensors, durable=False)  # `Journal.prepare` syncs it
    order.upload_path.chmod(0o600)
    return Done(digest=digest, size_bytes=order.upload_path.stat().st_size, metrics=metrics)
