"""A body in flight: what is refused, when it is refused, and that chunks may be cut anywhere."""

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.codec import arrays
from isthmus.codec.errors import CodecError, LengthMismatch, NonFinite, NotSafetensors, TensorsMismatch
from isthmus.codec.scanner import UpdateScanner
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec

UPDATE = {
    "layer.weight": np.linspace(-1, 1, 35, dtype="<f4").reshape(5, 7),
    "layer.bias": np.linspace(3, 4, 5, dtype="<f8"),
    "metrics/loss": np.array([0.25], "<f8"),
    "statistics/mean": np.arange(6, dtype="<f8").reshape(2, 3),
}
MANIFEST = arrays.manifest_of(UPDATE)
BODY = arrays.encode(UPDATE)
NORM = math.sqrt(sum(float((UPDATE[n].astype("<f8") ** 2).sum()) for n in ("layer.weight", "layer.bias")))


def scan(body: bytes, manifest: Manifest = MANIFEST, chunk: int = 1 << 16, length: int | None = None) -> UpdateScanner:
    scanner = UpdateScanner(manifest, len(body) if length is None else length)
    for start in range(0, len(body), chunk):
        scanner.feed(body[start : start + chunk])
    scanner.finish()
    return scanner


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 8, 9, 64, 1 << 16])
def test_norm_and_results_do_not_depend_on_where_chunks_are_cut(chunk: int) -> None:
    scanner = scan(BODY, chunk=chunk)
    assert scanner.l2_norm == pytest.approx(NORM, rel=1e-14)
    assert scanner.captured.keys() == {"metrics/loss", "statistics/mean"}
    assert scanner.captured["metrics/loss"].tolist() == [0.25]
    assert scanner.captured["statistics/mean"].tolist() == [[0, 1, 2], [3, 4, 5]]


@settings(deadline=None)
@given(st.lists(st.integers(0, len(BODY)), max_size=12))
def test_any_cuts_give_the_same(cuts: list[int]) -> None:
    scanner = UpdateScanner(MANIFEST, len(BODY))
    edges = [0, *sorted(cuts), len(BODY)]
    for begin, end in itertools.pairwise(edges):
        scanner.feed(memoryview(BODY)[begin:end])
    scanner.finish()
    assert scanner.l2_norm == pytest.approx(NORM, rel=1e-14)
    assert scanner.captured["statistics/mean"].tolist() == [[0, 1, 2], [3, 4, 5]]


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_flipped_bytes_raise_nothing_but_codec_errors(data: st.DataObject) -> None:
    body = bytearray(BODY)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        scanner = scan(bytes(body), chunk=data.draw(st.sampled_from([1, 13, 1 << 16])))
    except CodecError:
        return
    assert math.isfinite(scanner.l2_norm)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 99_999, 50_000])
@pytest.mark.parametrize("name", ["w", "metrics/w"])
def test_what_is_not_finite_is_refused_wherever_it_stands(dtype: str, bad: float, at: int, name: str) -> None:
    tensor = np.ones(100_000, dtype)
    tensor[at] = bad
    with pytest.raises(NonFinite, match=name):
        scan(arrays.encode({name: tensor}), arrays.manifest_of({name: tensor}), chunk=4099)


def test_every_nan_of_float32_is_refused() -> None:
    for bits in (0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF):  # signalling ones among them
        tensor = np.array([bits], "<u4").view("<f4")
        with pytest.raises(NonFinite):
            scan(arrays.encode({"w": tensor}), arrays.manifest_of({"w": tensor}))


@pytest.mark.parametrize("value", [1e200, 1e300, 1e-200, 1e145])
def test_huge_and_tiny_finite_doubles_pass_with_their_norm(value: float) -> None:
    tensor = np.full(100, value)
    scanner = scan(arrays.encode({"w": tensor}), arrays.manifest_of({"w": tensor}), chunk=33)
    assert scanner.l2_norm == pytest.approx(10 * value if value > 1e-100 else 0.0, rel=1e-12)


def test_the_largest_float32_passes_with_its_norm() -> None:
    tensor = np.full(4, np.finfo("<f4").max)
    scanner = scan(arrays.encode({"w": tensor}), arrays.manifest_of({"w": tensor}))
    assert scanner.l2_norm == pytest.approx(2 * float(np.finfo("<f4").max), rel=1e-12)


def test_kept_tensors_do_not_count_in_the_norm_but_must_be_finite() -> None:
    model = {"w": np.full(4, 3.0, "<f4"), "running": np.full(4, 100.0, "<f4"), "n": np.array([1 << 60])}
    manifest = arrays.manifest_of(model, keep={"running"})
    assert scan(arrays.encode(model), manifest).l2_norm == 6.0
    model["running"][2] = np.nan
    with pytest.raises(NonFinite, match="running"):
        scan(arrays.encode(model), manifest)


def test_a_boolean_that_is_neither_0_nor_1_is_refused() -> None:
    mask = {"mask": np.array([True, False])}
    with pytest.raises(NotSafetensors, match="mask"):
        scan(arrays.encode(mask)[:-1] + b"\x02", arrays.manifest_of(mask))


def test_wrong_tensors_are_refused_with_the_chunk_that_completes_the_header() -> None:
    other = arrays.encode({"layer.weight": np.zeros((7, 5), "<f4")})
    scanner = UpdateScanner(MANIFEST, 10**9)
    head = 8 + int.from_bytes(other[:8], "little")
    scanner.feed(other[: head - 1])
    with pytest.raises(TensorsMismatch):
        scanner.feed(other[head - 1 : head])


def test_a_huge_header_is_refused_by_its_first_8_bytes() -> None:
    scanner = UpdateScanner(MANIFEST, 3_000_000_000)
    scanner.feed((2_000_000_000).to_bytes(8, "little")[:7])
    with pytest.raises(NotSafetensors, match="2000000000"):
        scanner.feed(b"\x00")


@pytest.mark.parametrize("declared", [len(BODY) - 1, len(BODY) + 1, len(BODY) + 1000])
def test_a_declared_length_that_the_header_contradicts_is_refused_with_the_header(declared: int) -> None:
    head = 8 + int.from_bytes(BODY[:8], "little")
    scanner = UpdateScanner(MANIFEST, declared)
    with pytest.raises(LengthMismatch):
        scanner.feed(BODY[:head])


def test_a_header_that_cannot_fit_the_declared_length_is_refused() -> None:
    with pytest.raises(LengthMismatch):
        UpdateScanner(MANIFEST, 100).feed((1000).to_bytes(8, "little"))


def test_a_body_cut_short_is_refused_at_its_end() -> None:
    for cut in (0, 3, 8, 100, len(BODY) - 1):
        with pytest.raises(LengthMismatch):
            scan(BODY[:cut], length=len(BODY))


def test_a_body_that_goes_on_is_refused() -> None:
    with pytest.raises(LengthMismatch):
        scan(BODY + b"x", length=len(BODY))
    with pytest.raises(NotSafetensors):
        scan(b"abc")


def test_optional_tensors_may_be_absent() -> None:
    tensors = {**MANIFEST.tensors, "metrics/auc": TensorSpec(dtype=DType.F64, shape=(1,), optional=True)}
    assert "metrics/auc" not in scan(BODY, Manifest(tensors=tensors)).captured


def test_empty_tensors_and_empty_files_pass() -> None:
    for tensors in ({}, {"a": np.zeros((0, 3), "<f4")}, {"a": np.zeros(0, "<f4"), "b": np.ones(1, "<f4")}):
        body: dict[str, NDArray[Any]] = dict(tensors)
        scan(arrays.encode(body), arrays.manifest_of(body), chunk=1)


def test_results_too_large_to_capture_are_a_mistake_of_the_manifest() -> None:
    large = TensorSpec(dtype=DType.U8, shape=(3 << 20,), rule=AggregationRule.KEEP)
    with pytest.raises(ValueError, match="captured"):
        UpdateScanner(Manifest(tensors={"statistics/histogram": large}), 10)


def test_memory_does_not_grow_with_the_body() -> None:
    tensor = np.ones(4 << 20, "<f4")
    body = arrays.encode({"w": tensor})
    scanner = UpdateScanner(arrays.manifest_of({"w": tensor}), len(body))
    tracemalloc.start()
    for start in range(0, len(body), 1 << 20):
        scanner.feed(memoryview(body)[start : start + (1 << 20)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
