"""The child's part of a secured round: the vector that is kept, and the masked update that leaves. Block by block.

The vector's file is what is noised once, and its tensors have other names than those of an upload, so that the service
would not take it for one. With uniform weights it holds the whole numbers themselves. With declared weights these
depend on the largest weight of the roster, which is known later, and nothing is noised after training: so it holds the
update, of which the same numbers can be made again and again.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.codec.blocks import TensorFile, TensorFileWriter
from isthmus.codec.dtypes import NUMPY_DTYPE
from isthmus.codec.errors import CodecError
from isthmus.codec.header import check_manifest
from isthmus.federation.secured import quantise
from isthmus.secagg.derivation import Mask as MaskStream
from isthmus.secagg.masks import add_masks
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec, update_manifest
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.rounds import TaskOffer
from isthmus.wire.secured import MASKED
from isthmus.wire.strategies import Weighting
from isthmus_worker.messages import Done, Mask
from isthmus_worker.protection import require_finite
from isthmus_worker.refusals import WorkBroken

VECTOR: Final = "vector"
"""Whole numbers that are masked as they are: U32, all averaged elements in canonical order."""
UPDATE_PREFIX: Final = "update/"
"""Before the names of an update's tensors that have yet to be turned into whole numbers."""
BLOCK_ELEMENTS: Final = 1 << 18
"""So many are masked at a time. The result does not depend on it."""

Arrays = dict[str, NDArray[Any]]


def kept_of(update: Mapping[str, NDArray[Any]], spec: JobSpec, plan: PrivacyPlan | None) -> Arrays:
    """What is kept of an update after training, by tensor. Noised here, once, where the job has its members add noise.

    Args:
        update: trained minus received weights, for the tensors that rounds average. Not modified.
        spec, plan: the job, and what its privacy section becomes here.

    Raises:
        NonFiniteUpdate: some element is NaN or infinite.
    """
    if spec.strategy.weights is Weighting.UNIFORM:
        return {VECTOR: quantise(update, spec, plan)}
    require_finite(update)
    return {f"{UPDATE_PREFIX}{name}": array for name, array in update.items()}


def kept_manifest(offer: TaskOffer) -> Manifest:
    """What the vector's file holds: what is kept of the update, and the measures that leave as they are."""
    tensors = {name: tensor for name, tensor in offer.upload_manifest.tensors.items() if name != MASKED}
    if offer.spec.strategy.weights is Weighting.UNIFORM:
        shape = (offer.model_manifest.averaged_elements,)
        tensors[VECTOR] = TensorSpec(dtype=DType.U32, shape=shape, rule=AggregationRule.KEEP)
    else:
        moved = update_manifest(offer.model_manifest).tensors
        tensors.update({f"{UPDATE_PREFIX}{name}": tensor for name, tensor in moved.items()})
    return Manifest(tensors=tensors)


def write_masked(order: Mask, tell: Callable[[float], None]) -> Done:
    """Write the masked update to `order.masked_path`: the vector plus all masks, modulo 2^32, and the measures.

    The same order gives the same bytes. Memory: a block, and with declared weights the update and its numbers.

    Raises:
        WorkBroken: the vector's file does not hold what was kept.
    """
    masks = [MaskStream(bytes.fromhex(mask.key), mask.sign) for mask in order.masks]
    try:
        with TensorFile(order.vector_path) as source:
            check_manifest(source.header, kept_manifest(order.offer))
            return _write(source, order, masks, tell)
    except CodecError as error:
        raise WorkBroken(f"The vector that was kept is damaged: {error}") from None


def _write(source: TensorFile, order: Mask, masks: list[MaskStream], tell: Callable[[float], None]) -> Done:
    manifest = order.offer.upload_manifest.tensors
    numbers = None if VECTOR in source.tensors else _numbers(source, order)
    leaving = {name: manifest[name] for name in manifest if name == MASKED or name in source.tensors}
    elements = manifest[MASKED].elements
    room = np.empty(min(BLOCK_ELEMENTS, elements), np.uint32)
    with TensorFileWriter(order.masked_path, leaving, durable=False) as writer:
        for name in leaving.keys() - {MASKED}:
            writer.write_block(name, 0, _whole(source, name).reshape(-1))
        for start in range(0, elements, BLOCK_ELEMENTS):
            block = room[: elements - start]
            if numbers is None:
                source.read_block(VECTOR, start, block)
            else:
                block = numbers[start : start + BLOCK_ELEMENTS]
            add_masks(block, start, masks)
            writer.write_block(MASKED, start, block)
            tell(start / elements)
    order.masked_path.chmod(0o600)
    return Done(digest=writer.digest, size_bytes=writer.size_bytes, metrics={})


def _numbers(source: TensorFile, order: Mask) -> NDArray[np.uint32]:
    """The whole numbers of the update that was kept, counted by its share of weight."""
    names = [name for name in source.tensors if name.startswith(UPDATE_PREFIX)]
    update = {name.removeprefix(UPDATE_PREFIX): _whole(source, name) for name in names}
    return quantise(update, order.offer.spec, order.offer.plan, order.weight_share)


def _whole(source: TensorFile, name: str) -> NDArray[Any]:
    place = source.tensors[name]
    found = np.empty(place.shape, NUMPY_DTYPE[place.dtype])
    source.read_bytes(place.begin, found)
    return found
