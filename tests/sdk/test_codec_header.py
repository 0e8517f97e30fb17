"""The header parser against hostile files, and against the library that the format comes from."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.codec.errors import CodecError, LengthMismatch, NotSafetensors, TensorsMismatch
from isthmus.codec.header import (
    HIGHEST_HEADER_BYTES,
    MAX_HEADER_BYTES,
    Header,
    TensorPlace,
    check_manifest,
    encode_header,
    header_length,
    header_limit,
    length_bounds,
    manifest_of,
    parse_header,
    read_header,
)
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec

F32 = TensorSpec(dtype=DType.F32, shape=(2, 3))


def entry(begin: Any = 0, end: Any = 24, shape: Any = (2, 3), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def text(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "begin with"),
    "white space first": (b" {}", "begin with"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "begin with"),
    "a list": (b"[]", "begin with"),
    "not JSON": (b"{]", "not JSON"),
    "something after the JSON": (b"{} {}", "not JSON"),
    "NUL padding": (b"{}\x00\x00", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not UTF-8"),
    "half a surrogate pair in a name": (b'{"\\ud800": {}}', "not Unicode"),
    "half a surrogate pair in the metadata": (b'{"__metadata__": {"a": "\\udfff"}}', "not Unicode"),
    "a tensor twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "key twice",
    ),
    "a field twice": (b'{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}}', "key twice"),
    "deep lists": (b'{"a":' + b"[" * 100_000, "nests too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nests too deeply"),
    "a number of a million digits": (b'{"a":' + b"9" * 1_000_000 + b"}", "too long"),
    "NaN": (b'{"a": NaN}', "not a whole number"),
    "an infinity": (b'{"a": Infinity}', "not a whole number"),
    "an entry that is a list": (text(a=[1]), "not described"),
    "an entry that is null": (text(a=None), "not described"),
    "a field missing": (text(a={"dtype": "F32", "shape": [2, 3]}), "not described"),
    "a field too many": (text(a={**entry(), "class": "os.system"}), "not described"),
    "an unknown element type": (text(a=entry(dtype="F128")), "element type"),
    "an element type that we do not average": (text(a=entry(dtype="BF16", end=12)), "element type"),
    "an element type in lower case": (text(a=entry(dtype="f32")), "element type"),
    "an element type that is a number": (text(a=entry(dtype=32)), "element type"),
    "an element type that is a list": (text(a=entry(dtype=["F32"])), "element type"),
    "a shape that is a number": (text(a=entry(shape=6)), "shape is not a list"),
    "a shape that is text": (text(a=entry(shape="23")), "shape is not a list"),
    "a negative side": (text(a=entry(shape=[-2, -3])), "shape is not a list"),
    "a side that is true": (text(a=entry(shape=[True, 6])), "shape is not a list"),
    "a side with a fraction": (text(a=entry(shape=[2.0, 3])), "not a whole number"),
    "an exponent": (b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', "not a whole number"),
    "nine sides": (text(a=entry(shape=[1] * 9, end=4)), "9 sides"),
    "offsets that are true": (text(a=entry(begin=False)), "data_offsets is not a list"),
    "offsets below zero": (text(a=entry(begin=-24, end=0)), "data_offsets is not a list"),
    "offsets with a fraction": (text(a=entry(begin=0.0)), "not a whole number"),
    "offsets as text": (text(a=entry(begin="0")), "data_offsets is not a list"),
    "three offsets": (text(a={**entry(), "data_offsets": [0, 24, 24]}), "3 data_offsets"),
    "offsets turned round": (text(a=entry(begin=24, end=0)), "-24 bytes of data"),
    "data too short for the shape": (text(a=entry(end=20)), "its shape needs 24"),
    "data too long for the shape": (text(a=entry(end=28)), "its shape needs 24"),
    "sides whose product overflows 64 bits": (text(a=entry(shape=[1 << 32, 1 << 32], end=0)), "its shape needs"),
    "sides whose size overflows to the right number": (text(a=entry(shape=[(1 << 62) + 6], end=24)), "shape needs"),
    "data that does not begin at 0": (text(a=entry(begin=8, end=32)), "leaves a hole"),
    "a hole": (text(a=entry(), b=entry(begin=28, end=52)), "leaves a hole"),
    "an overlap": (text(a=entry(), b=entry(begin=20, end=44)), "overlaps"),
    "the same place twice": (text(a=entry(), b=entry()), "overlaps"),
    "metadata that is a list": (text(__metadata__=[]), "metadata"),
    "metadata that is null": (text(__metadata__=None), "metadata"),
    "metadata with a number": (text(__metadata__={"a": 1}), "metadata"),
    "metadata with an object": (text(__metadata__={"a": {}}), "metadata"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_for_its_own_reason(case: str) -> None:
    header, reason = HOSTILE[case]
    with pytest.raises(NotSafetensors) as refusal:
        parse_header(header)
    assert reason in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2_000_000_000, 1 << 63, (1 << 64) - 1])
def test_a_header_of_absurd_length_is_refused_by_its_first_8_bytes(length: int) -> None:
    with pytest.raises(NotSafetensors):
        header_length(length.to_bytes(8, "little"))


def test_a_file_shorter_than_8_bytes_is_refused() -> None:
    with pytest.raises(NotSafetensors):
        header_length(b"\x02\x00\x00")


def test_too_many_tensors_are_refused() -> None:
    many = text(**{f"t{i}": entry(0, 0, [0]) for i in range(11)})
    assert len(parse_header(many, max_tensors=11).tensors) == 11
    with pytest.raises(NotSafetensors, match="lists 11 tensors"):
        parse_header(many, max_tensors=10)


def test_a_well_formed_header_is_read() -> None:
    header = parse_header(
        text(b=entry(1, 25), a=entry(0, 1, [], "BOOL"), c=entry(25, 25, [0, 7], "F64"), __metadata__={"by": "us"})
        + b"   "
    )
    assert list(header.tensors) == ["a", "b", "c"]
    assert header.tensors["a"] == TensorPlace(DType.BOOL, (), 0, 1)
    assert header.tensors["c"].elements == 0
    assert header.metadata == {"by": "us"}
    assert header.data_bytes == 25
    assert header.total_bytes == header.header_bytes + 25


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=80))
def test_random_bytes_raise_nothing_but_codec_errors(junk: bytes) -> None:
    for header in (junk, b"{" + junk, b'{"a":' + junk + b"}"):
        with contextlib.suppress(CodecError):
            parse_header(header)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8) | st.just("F32"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(dtype=JSON, shape=JSON, begin=JSON, end=JSON, metadata=JSON)
def test_random_fields_raise_nothing_but_codec_errors(
    dtype: Any, shape: Any, begin: Any, end: Any, metadata: Any
) -> None:
    for tensors in ({"a": entry(begin, end, shape, dtype)}, {"a": dtype, "__metadata__": metadata}):
        with contextlib.suppress(CodecError):
            parse_header(json.dumps(tensors).encode())


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_flipped_byte_of_a_good_header_raises_nothing_but_codec_errors(data: st.DataObject) -> None:
    good = bytearray(encode_header({"a": F32, "b": F32}, {"k": "v"})[8:])
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = parse_header(bytes(good))
    except CodecError:
        return
    assert header.data_bytes == sum(place.end - place.begin for place in header.tensors.values())


SPECS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
    st.builds(
        lambda dtype, shape: TensorSpec(dtype=dtype, shape=tuple(shape), rule=AggregationRule.KEEP),
        st.sampled_from(DType),
        st.lists(st.integers(0, 5), max_size=4),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(
    SPECS,
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])), max_size=3
    ),
)
def test_what_is_encoded_is_parsed_again(specs: dict[str, TensorSpec], metadata: dict[str, str]) -> None:
    head = encode_header(specs, metadata)
    assert len(head) % 8 == 0
    assert header_length(head) == len(head) - 8
    header = parse_header(head[8:])
    assert header.header_bytes == len(head)
    assert header.metadata == metadata
    check_manifest(header, Manifest(tensors=specs))
    for place in header.tensors.values():
        width = (place.end - place.begin) // place.elements if place.elements else 1
        assert place.begin % width == 0  # every tensor is aligned to its elements


def test_the_encoded_header_is_the_same_for_every_order_of_the_names() -> None:
    one = encode_header({"a": F32, "b": F32}, {"x": "1", "y": "2"})
    assert one == encode_header({"b": F32, "a": F32}, {"y": "2", "x": "1"})


def test_the_encoded_header_never_changes() -> None:
    assert encode_header({"w": F32, "n": TensorSpec(dtype=DType.I64, shape=(), rule=AggregationRule.KEEP)}) == (
        b"\x70\x00\x00\x00\x00\x00\x00\x00"
        b'{"n":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}}'
        b"   "
    )


def test_a_tensor_cannot_be_called_metadata() -> None:
    with pytest.raises(ValueError, match="__metadata__"):
        encode_header({"__metadata__": F32})


def header_of(**specs: TensorSpec) -> Header:
    return parse_header(encode_header(specs)[8:])


def test_a_manifest_wants_exact_names_types_and_shapes() -> None:
    manifest = Manifest(tensors={"a": F32, "m": TensorSpec(dtype=DType.F64, shape=(1,), optional=True)})
    check_manifest(header_of(a=F32), manifest)
    check_manifest(header_of(a=F32, m=TensorSpec(dtype=DType.F64, shape=(1,))), manifest)
    with pytest.raises(TensorsMismatch, match="'a'"):
        check_manifest(header_of(), manifest)
    with pytest.raises(TensorsMismatch, match="not in the manifest: 'b'"):
        check_manifest(header_of(a=F32, b=F32), manifest)
    with pytest.raises(TensorsMismatch, match="type F64, not F32"):
        check_manifest(header_of(a=TensorSpec(dtype=DType.F64, shape=(2, 3))), manifest)
    with pytest.raises(TensorsMismatch, match=r"shape \[3, 2\], not \[2, 3\]"):
        check_manifest(header_of(a=TensorSpec(dtype=DType.F32, shape=(3, 2))), manifest)
    with pytest.raises(TensorsMismatch, match=r"shape \[2\], not \[1\]"):
        check_manifest(header_of(a=F32, m=TensorSpec(dtype=DType.F64, shape=(2,))), manifest)


def test_only_a_few_of_many_names_are_listed() -> None:
    manifest = Manifest(tensors={f"layer{i:02d}" + "x" * 500: F32 for i in range(50)})
    with pytest.raises(TensorsMismatch, match="and 47 more") as refusal:
        check_manifest(header_of(), manifest)
    assert len(str(refusal.value)) < 400


def test_a_header_tells_the_manifest_of_a_model() -> None:
    count = TensorSpec(dtype=DType.I64, shape=(), rule=AggregationRule.KEEP)
    manifest = manifest_of(header_of(w=F32, running_mean=F32, n=count), keep={"running_mean"})
    assert manifest.tensors == {
        "n": count,
        "running_mean": TensorSpec(dtype=DType.F32, shape=(2, 3), rule=AggregationRule.KEEP),
        "w": F32,
    }


def test_a_large_manifest_gets_a_longer_header_up_to_a_limit() -> None:
    assert header_limit() == header_limit(Manifest(tensors={"a": F32})) == MAX_HEADER_BYTES
    many = {f"transformer.layers.{i}.attention.weight": F32 for i in range(20_000)}
    limit = header_limit(Manifest(tensors=many))
    assert MAX_HEADER_BYTES < len(encode_header(many)) - 8 < limit < HIGHEST_HEADER_BYTES
    assert header_limit(Manifest(tensors={"n" * (1 << 25): F32})) == HIGHEST_HEADER_BYTES


def test_what_fits_a_manifest_lies_within_its_length_bounds() -> None:
    optional = TensorSpec(dtype=DType.F64, shape=(5,), optional=True)
    least, most = length_bounds(Manifest(tensors={"a": F32, "m": optional}))
    assert least <= header_of(a=F32).total_bytes < header_of(a=F32, m=optional).total_bytes <= most
    assert least == 8 + 2 + 24


def test_a_file_on_disk_must_be_as_long_as_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "model"
    head = encode_header({"a": F32})
    path.write_bytes(head + bytes(24))
    assert read_header(path).data_bytes == 24
    for wrong in (head + bytes(23), head + bytes(25), head, head[:-1]):
        path.write_bytes(wrong)
        with pytest.raises(LengthMismatch):
            read_header(path)
    path.write_bytes(head[:7])
    with pytest.raises(NotSafetensors):
        read_header(path)


def test_the_header_module_and_the_cohort_need_no_numpy() -> None:
    code = "import sys, isthmus.codec.header, isthmus.federation.cohort; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
