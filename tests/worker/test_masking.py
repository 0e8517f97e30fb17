"""The child's part of a secured round: what is kept, and what is masked, block by block."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from isthmus.codec.arrays import decode, encode, read, write
from isthmus.federation.secured import quantise
from isthmus.privacy.clipping import NonFiniteUpdate
from isthmus.secagg.derivation import Mask as MaskStream
from isthmus.secagg.masks import add_masks
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import Manifest, TensorSpec
from isthmus.wire.rounds import TaskKind, TaskOffer, task_manifest
from isthmus.wire.secured import MASKED
from isthmus_worker.messages import Mask, MaskKey
from isthmus_worker.refusals import WorkBroken
from isthmus_worker.secured import masking
from isthmus_worker.secured.masking import UPDATE_PREFIX, VECTOR, kept_manifest, kept_of, write_masked
from tests.worker.factories import DISTRIBUTED, make_secured_spec
from tests.worker.secured_round import SecuredRound

STREAMS = (MaskStream(b"a" * 32, 1), MaskStream(b"b" * 32, -1))
DECLARED = make_secured_spec(strategy={"fedavg": {"weights": "declared"}})


def offer_of(spec: JobSpec | None = None) -> TaskOffer:
    return dataclasses.replace(SecuredRound(bytes(32), spec) if spec else SecuredRound(bytes(32))).offer()


def order_of(offer: TaskOffer, folder: Path, weight_share: float = 1.0) -> Mask:
    keys = tuple(MaskKey(key=mask.key.hex(), sign=1 if mask.sign > 0 else -1) for mask in STREAMS)
    return Mask(
        number=0, offer=offer, vector_path=folder / "vector", masked_path=folder / "masked", masks=keys,
        weight_share=weight_share,
    )  # fmt: skip


def update_of(offer: TaskOffer) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {
        name: generator.standard_normal(tensor.shape).astype(np.float32)
        for name, tensor in offer.model_manifest.averaged().items()
    }


@pytest.mark.parametrize("block", [1, 3, 4, 1 << 18])
def test_the_masked_update_is_the_vector_and_all_masks_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(masking, "BLOCK_ELEMENTS", block)
    offer = offer_of()
    update = update_of(offer)
    write(tmp_path / "vector", kept_of(update, offer.spec, None))
    order, told = order_of(offer, tmp_path), list[float]()

    done = write_masked(order, told.append)

    expected = quantise(update, offer.spec, None)
    add_masks(expected, 0, STREAMS)
    assert np.array_equal(decode(order.masked_path.read_bytes(), offer.upload_manifest)[MASKED], expected)
    assert write_masked(order, told.append) == done
    assert done.size_bytes == order.masked_path.stat().st_size == len(encode({MASKED: expected}))
    assert order.masked_path.stat().st_mode & 0o077 == 0


def test_with_declared_weights_the_update_is_kept_and_counted_by_its_share_later(tmp_path: Path) -> None:
    offer = offer_of(DECLARED)
    update = update_of(offer)
    write(tmp_path / "vector", kept_of(update, offer.spec, None))
    assert set(read(tmp_path / "vector", kept_manifest(offer))) == {f"{UPDATE_PREFIX}{name}" for name in update}

    for share in (1.0, 0.25):
        order = order_of(offer, tmp_path, share)
        write_masked(order, lambda _share: None)
        found = read(order.masked_path)[MASKED]
        add_masks(found, 0, [MaskStream(mask.key, -mask.sign) for mask in STREAMS])
        assert np.array_equal(found, quantise(update, offer.spec, None, share))


def test_noise_is_drawn_when_the_vector_is_made_and_not_when_it_is_masked(tmp_path: Path) -> None:
    offer = offer_of(make_secured_spec(**DISTRIBUTED))
    update = update_of(offer)

    first, second = (kept_of(update, offer.spec, offer.plan)[VECTOR] for _ in range(2))
    assert not np.array_equal(first, second)
    write(tmp_path / "vector", {VECTOR: first})
    digests = {write_masked(order_of(offer, tmp_path), lambda _share: None).digest for _ in range(2)}
    assert len(digests) == 1


@pytest.mark.parametrize("spec", [make_secured_spec(), DECLARED])
def test_an_update_that_is_not_finite_is_not_kept(spec: JobSpec) -> None:
    offer = offer_of(spec)
    update = update_of(offer)
    next(iter(update.values())).reshape(-1)[0] = np.nan

    with pytest.raises(NonFiniteUpdate):
        kept_of(update, offer.spec, None)


def test_a_vector_that_is_damaged_is_not_masked(tmp_path: Path) -> None:
    offer = offer_of()
    write(tmp_path / "vector", {VECTOR: np.zeros(3, np.uint32)})

    with pytest.raises(WorkBroken, match="damaged"):
        write_masked(order_of(offer, tmp_path), lambda _share: None)


def test_masking_holds_a_block_and_not_the_update(tmp_path: Path) -> None:
    elements = 6_000_000
    offer = offer_of()
    manifest = Manifest(tensors={"w": TensorSpec(dtype="F32", shape=(elements,))})
    upload = task_manifest(TaskKind.TRAIN, offer.spec, 1, manifest)
    offer = offer.model_copy(update={"model_manifest": manifest, "upload_manifest": upload})
    write(tmp_path / "vector", {VECTOR: np.arange(elements, dtype=np.uint32)}, durable=False)

    tracemalloc.start()
    write_masked(order_of(offer, tmp_path), lambda _share: None)
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 4 << 20  # of 24 MB
    found = read(tmp_path / "masked")[MASKED]
    add_masks(found, 0, [MaskStream(mask.key, -mask.sign) for mask in STREAMS])
    assert np.array_equal(found, np.arange(elements))
