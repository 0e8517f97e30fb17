"""Whole files against the safetensors library as an oracle, in both directions; blocks on disk."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors import numpy as oracle

from isthmus.codec import arrays
from isthmus.codec.blocks import TensorFile, TensorFileWriter
from isthmus.codec.errors import CodecError, LengthMismatch, NotSafetensors, TensorsMismatch
from isthmus.codec.header import manifest_of, read_header
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec

DTYPES = ["<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1", "<u8", "<u4", "<u2", "u1", "?"]
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=10).filter(lambda name: name != "__metadata__"),
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    ),
    max_size=5,
)
EXAMPLE = {
    "weight": np.arange(6, dtype="<f4").reshape(2, 3),
    "count": np.array(7, dtype="<i8"),
    "empty": np.zeros((0, 4), "<f2"),
    "mask": np.array([True, False, True]),
}


def same(a: dict[str, NDArray[Any]], b: dict[str, NDArray[Any]]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


@settings(deadline=None)
@given(TENSORS)
def test_the_library_reads_what_we_write(tensors: dict[str, NDArray[Any]]) -> None:
    assert same(oracle.load(arrays.encode(tensors, {"k": "v"})), tensors)


@settings(deadline=None)
@given(TENSORS)
def test_we_read_what_the_library_writes(tensors: dict[str, NDArray[Any]]) -> None:
    assert same(arrays.decode(oracle.save(tensors, {"k": "v"})), tensors)


@settings(deadline=None)
@given(TENSORS)
def test_what_is_encoded_is_decoded_again(tensors: dict[str, NDArray[Any]]) -> None:
    assert same(arrays.decode(arrays.encode(tensors), arrays.manifest_of(tensors)), tensors)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_flipped_bytes_and_cuts_raise_nothing_but_codec_errors(data: st.DataObject) -> None:
    body = bytearray(arrays.encode(EXAMPLE, {"k": "v"}))
    for _ in range(data.draw(st.integers(0, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    for hostile in (body, body[:cut], body + b"x"):
        with contextlib.suppress(CodecError):
            arrays.decode(bytes(hostile))


def test_equal_values_give_equal_bytes_whatever_the_layout() -> None:
    plain = np.arange(12, dtype="<f4").reshape(3, 4)
    body = arrays.encode({"a": plain, "b": plain})
    assert arrays.encode({"b": plain.astype(">f4"), "a": np.asfortranarray(plain)}) == body
    assert arrays.encode({"b": np.repeat(plain, 2, axis=1)[:, ::2], "a": plain}) == body


def test_files_of_one_element_type_are_the_librarys_to_the_byte() -> None:
    tensors = {"b": np.ones((2, 2), "<f4"), "a": np.zeros(3, "<f4"), "é": np.ones(1, "<f4")}
    assert arrays.encode(tensors, {"k": "v"}) == oracle.save(tensors, {"k": "v"})


def test_decoded_arrays_are_writable_and_share_no_memory() -> None:
    body = arrays.encode({"a": np.zeros(2, "<f4")})
    arrays.decode(body)["a"][0] = 1
    assert arrays.decode(body)["a"][0] == 0


def test_a_manifest_is_checked_on_decoding() -> None:
    manifest = Manifest(tensors={"a": TensorSpec(dtype=DType.F32, shape=(2,))})
    with pytest.raises(TensorsMismatch):
        arrays.decode(arrays.encode({"a": np.zeros(2, "<f8")}), manifest)


def test_a_boolean_that_is_neither_0_nor_1_is_refused() -> None:
    body = arrays.encode({"mask": np.array([True, False])})
    with pytest.raises(NotSafetensors, match="'mask'"):
        arrays.decode(body[:-1] + b"\x02")


@pytest.mark.parametrize("array", [np.zeros(1, "c8"), np.array(["a"]), np.array([None]), np.zeros(1, "M8[s]")])
def test_an_array_without_a_safetensors_name_is_a_type_error(array: NDArray[Any]) -> None:
    with pytest.raises(TypeError):
        arrays.encode({"a": array})


def test_a_file_on_disk_is_what_is_encoded_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "model"
    digest = arrays.write(path, EXAMPLE, {"k": "v"})
    assert path.read_bytes() == arrays.encode(EXAMPLE, {"k": "v"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(arrays.read(path), EXAMPLE)
    assert manifest_of(read_header(path)) == arrays.manifest_of(EXAMPLE)
    assert arrays.manifest_of(EXAMPLE).tensors["count"].rule is AggregationRule.KEEP


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_blocks_are_the_stretches_of_the_flat_tensor(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model"
    arrays.write(path, EXAMPLE)
    with TensorFile(path) as file:
        for start in range(7 - size):
            out = np.empty(size, "<f4")
            file.read_block("weight", start, out)
            assert out.tolist() == list(range(start, start + size))
        scalar = np.empty(1, "<i8")
        file.read_block("count", 0, scalar)
        assert scalar[0] == 7
        file.read_block("empty", 0, np.empty(0, "<f2"))


def test_a_block_outside_of_its_tensor_or_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    arrays.write(path, EXAMPLE)
    with TensorFile(path) as file:
        for start, out in ((5, np.empty(2, "<f4")), (-1, np.empty(1, "<f4")), (0, np.empty(1, "<f8"))):
            with pytest.raises(ValueError, match="weight"):
                file.read_block("weight", start, out)


def test_a_file_cut_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    arrays.write(path, {"a": np.zeros(1000, "<f4")})
    with TensorFile(path) as file:
        os.truncate(path, 2000)
        with pytest.raises(LengthMismatch):
            file.read_block("a", 0, np.empty(1000, "<f4"))


@pytest.mark.parametrize("order", ["abab", "aabb", "bbaa", "abba"])
def test_the_order_of_blocks_does_not_change_the_file(tmp_path: Path, order: str) -> None:
    tensors = {"a": np.arange(4, dtype="<f4"), "b": np.arange(4, 8, dtype="<f4")}
    path = tmp_path / "state"
    written = {"a": 0, "b": 0}
    with TensorFileWriter(path, arrays.types_of(tensors)) as writer:
        for name in order:
            writer.write_block(name, written[name], tensors[name][written[name] : written[name] + 2])
            written[name] += 2
    assert path.read_bytes() == arrays.encode(tensors)
    assert writer.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert writer.size_bytes == path.stat().st_size


def test_a_file_that_is_not_finished_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "model"
    types = arrays.types_of({"a": np.zeros(4, "<f4")})
    with pytest.raises(ValueError, match="not written to its end"), TensorFileWriter(path, types) as writer:
        writer.write_block("a", 0, np.zeros(3, "<f4"))
    assert not path.exists()
    with pytest.raises(ValueError, match="out of turn"), TensorFileWriter(path, types) as writer:
        writer.write_block("a", 1, np.zeros(3, "<f4"))
    assert not path.exists()
    with pytest.raises(ValueError, match="not finished"):
        _ = writer.digest


def test_large_tensors_are_written_and_digested_as_small_ones_are(tmp_path: Path) -> None:
    tensors = {  # more than a stretch of write-back, and small ones before and after
        "a": np.arange(5, dtype=np.float32),
        "b": np.arange(5_000_000, dtype=np.float32),
        "c": np.arange(7, dtype=np.float32),
    }

    digest = arrays.write(tmp_path / "file", tensors)

    assert (tmp_path / "file").read_bytes() == arrays.encode(tensors)
    assert digest == hashlib.sha256(arrays.encode(tensors)).hexdigest()


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_synced_unless_its_writer_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)

    arrays.write(tmp_path / "file", {"a": np.zeros(3, np.float32)}, durable=durable)

    assert bool(synced) is durable
