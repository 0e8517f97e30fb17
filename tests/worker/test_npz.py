"""NumPy archives: what is told of them, what becomes of hostile ones, and that no refusal quotes a value."""

import io
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.wire.data import ColumnKind
from isthmus_worker.data import open_source
from isthmus_worker.npz import NpzSource, fingerprints_of
from isthmus_worker.refusals import DataRefused
from isthmus_worker.settings import NpzSettings

SECRET = "4711"
IMAGES = np.arange(3 * 1 * 2 * 2, dtype=np.uint8).reshape(3, 1, 2, 2)


def _source(folder: Path, content: bytes | None = None, **arrays: Any) -> NpzSource:
    path = folder / "data.npz"
    if content is None:
        np.savez_compressed(path, **arrays)
    else:
        path.write_bytes(content)
    return NpzSource(NpzSettings(path=path))


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def _archive(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def _claims(shape: tuple[int, ...], content: bytes, descr: str = "|u1") -> bytes:
    """An array whose header says one thing and whose data another."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def test_vectors_are_numbers_or_words_and_arrays_with_more_sides_are_tensors(tmp_path: Path) -> None:
    source = _source(tmp_path, image=IMAGES, label=np.array([0, 1, 1]), ward=np.array(["b", "a", "b"]))

    told = {column.name: (column.kind, column.shape, column.missing) for column in source.schema().columns}

    assert told == {
        "image": (ColumnKind.TENSOR, (1, 2, 2), False),
        "label": (ColumnKind.NUMBER, None, False),
        "ward": (ColumnKind.CATEGORY, None, False),
    }
    assert source.rows() == 3


def test_columns_are_loaded_as_they_are_on_disk_and_only_those_that_are_asked_for(tmp_path: Path) -> None:
    turned = np.asfortranarray(IMAGES.astype(">i2"))

    table = _source(tmp_path, image=turned, bytes=IMAGES, ward=np.array(["b", "a", "b"])).load(["image", "bytes"])

    assert set(table.columns) == {"image", "bytes"}
    assert (np.asarray(table.columns["image"]) == IMAGES).all()
    assert np.asarray(table.columns["image"]).dtype == np.dtype("i2")  # in this machine's order of bytes
    assert np.asarray(table.columns["bytes"]).dtype == np.uint8
    assert table.rows == 3


def test_the_settings_choose_the_source_and_its_stamp_changes_with_the_file(tmp_path: Path) -> None:
    source = _source(tmp_path, label=np.array([0, 1]))
    before = source.stamp()

    assert isinstance(open_source(source.settings), NpzSource)
    assert source.rows() == 2
    _source(tmp_path, label=np.array([0, 1, 1]))
    assert source.stamp() != before
    assert source.rows() == 3


def test_numpy_is_loaded_by_who_reads_arrays_and_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("a\n1\n")
    np.savez(tmp_path / "few.npz", a=np.arange(3))
    script = f"""
import os, sys
os.chdir({str(tmp_path)!r})
import isthmus_worker.loop, isthmus_worker.child
from isthmus_worker.data import open_source
from isthmus_worker.settings import DatasetSettings
for kind in ("csv", "npz"):
    dataset = DatasetSettings.model_validate({{"name": "d", "source": {{"kind": kind, "path": f"few.{{kind}}"}}}})
    print("numpy" in sys.modules, open_source(dataset.source).rows(), "numpy" in sys.modules)
"""

    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    assert told.splitlines() == ["False 1 False", "False 3 True"]


# --- Refused ---------------------------------------------------------------------------------------------------------


class Payload:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> Any:
        """Leaves a trace in the working directory."""
        return os.mkdir, ("was-run",)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "pickled-objects": (
        lambda: _archive(("a.npy", _npy(np.array([Payload(), SECRET], dtype=object)))),
        "'a' of the dataset holds pickled objects",
    ),
    "a-pickle-for-a-header": (lambda: _archive(("a.npy", b"\x80\x04" + SECRET.encode())), "not a readable .npz"),
    "a-header-of-nested-brackets": (
        lambda: _archive(("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000)), "not a readable .npz"
    ),
    "no-archive": (SECRET.encode, "not a readable .npz"),
    "one-array-without-an-archive": (lambda: _npy(np.arange(3)), "not a readable .npz"),
    "cut-short": (lambda: _archive(("a.npy", _npy(np.arange(3000))))[:-40], "not a readable .npz"),
    "no-arrays": (_archive, "holds no arrays"),
    "something-else-inside": (lambda: _archive(("4711.txt", b"x")), "something that is no array"),
    "ragged": (
        lambda: _archive(("a.npy", _npy(np.arange(3))), ("b.npy", _npy(np.arange(4)))),
        "differ in their first side",
    ),
    "no-records": (lambda: _archive(("a.npy", _npy(np.zeros((0, 2))))), "no records"),
    "a-single-value": (lambda: _archive(("a.npy", _npy(np.float64(4711)))), "'a' of the dataset is a single value"),
    "an-empty-side": (lambda: _archive(("a.npy", _npy(np.zeros((3, 0))))), "'a' of the dataset has an empty side"),
    "not-a-number": (lambda: _archive(("a.npy", _npy(np.array([4711.0, np.nan])))), "'a' of the dataset holds NaN"),
    "infinite": (lambda: _archive(("a.npy", _npy(np.full((2, 3), np.inf)))), "'a' of the dataset holds NaN or an inf"),
    "complex": (lambda: _archive(("a.npy", _npy(np.zeros(2, complex)))), "neither numbers .* nor"),
    "dates": (lambda: _archive(("a.npy", _npy(np.zeros(2, "M8[s]")))), "neither numbers .* nor"),
    "pages-of-words": (lambda: _archive(("a.npy", _npy(np.array([[SECRET]] * 2)))), "neither numbers .* nor"),
    "longer-than-it-says": (lambda: _archive(("a.npy", _claims((2, 2), b"x" * 9))), "longer or shorter than it says"),
    "shorter-than-it-says": (lambda: _archive(("a.npy", _claims((2, 2**40), b"xx"))), "longer or shorter than it says"),
    "too-many-sides": (lambda: _archive(("a.npy", _npy(np.zeros((2, 1, 1, 1, 1, 1))))), "cannot be announced"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "complaint"), HOSTILE.values(), ids=HOSTILE)
def test_an_archive_that_cannot_be_used_is_refused_without_running_or_quoting_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Callable[[], bytes], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = _source(tmp_path, content())

    with pytest.raises(DataRefused, match=complaint) as refusal:
        source.schema()

    assert SECRET not in str(refusal.value) + refusal.value.where
    assert str(tmp_path) not in str(refusal.value)
    assert not (tmp_path / "was-run").exists()
    if "announced" not in complaint:
        with pytest.raises(DataRefused, match=complaint):
            source.load(["a"])
        assert not (tmp_path / "was-run").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile says so while the test makes it
def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = _archive(("a.npy", _npy(np.arange(3))), ("a.npy", _npy(np.arange(3) + 1)))

    with pytest.raises(DataRefused, match="two arrays of one name"):
        _source(tmp_path, twice).rows()


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all that was unpacked."""
    sizes: list[int] = []
    read = zipfile.ZipExtFile.read

    def counted(file: zipfile.ZipExtFile, size: int | None = -1) -> bytes:
        content = read(file, size)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    return sizes


def test_a_small_file_that_unpacks_to_much_is_refused_before_it_is_unpacked(
    tmp_path: Path, unpacked: list[int]
) -> None:
    megabytes = 64
    path = tmp_path / "data.npz"
    path.write_bytes(_archive(("a.npy", _claims((megabytes, 1 << 20), bytes(megabytes << 20)))))
    assert path.stat().st_size < 1 << 20

    with pytest.raises(DataRefused, match="more memory than its max_mb allows"):
        NpzSource(NpzSettings(path=path, max_mb=megabytes - 1)).load(["a"])

    assert sum(unpacked) < 1 << 20
    assert NpzSource(NpzSettings(path=path, max_mb=megabytes)).load(["a"]).rows == megabytes
    assert sum(unpacked) > megabytes << 20


def test_a_header_that_says_it_takes_gigabytes_is_not_unpacked(tmp_path: Path, unpacked: list[int]) -> None:
    long = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b" " * 50_000_000

    with pytest.raises(DataRefused, match="not a readable"):
        _source(tmp_path, _archive(("a.npy", long))).rows()

    assert sum(unpacked) < 1 << 20


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_byte_that_changed_on_the_disk_is_noticed(tmp_path: Path, save: Callable[..., None]) -> None:
    file, array = io.BytesIO(), np.arange(1000)
    save(file, a=array)
    checksum = struct.pack("<I", zipfile.ZipFile(file).getinfo("a.npy").CRC)
    assert checksum in file.getvalue()

    with pytest.raises(DataRefused, match="not a readable"):
        _source(tmp_path, file.getvalue().replace(checksum, b"\0\0\0\0")).load(["a"])


def test_a_missing_column_is_named_and_a_missing_file_is_not(tmp_path: Path) -> None:
    with pytest.raises(DataRefused, match="no column 'b'"):
        _source(tmp_path, a=np.arange(3)).load(["a", "b"])
    with pytest.raises(DataRefused, match="cannot be read") as refusal:
        NpzSource(NpzSettings(path=tmp_path / "gone.npz")).rows()
    assert "gone" not in str(refusal.value)


# --- Fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprints_tell_records_apart_and_do_not_hang_on_order_or_on_other_records() -> None:
    labels, words = np.array([0, 0, 1, 0]), np.array(["a", "a", "a", "b"])
    images = np.zeros((4, 2, 2), np.uint8)
    images[1, 1, 1] = 1
    plain = fingerprints_of({"image": images, "label": labels, "ward": words})

    order = [3, 1, 0, 2]
    turned = {"ward": words[order], "label": labels[order], "image": images[order]}
    assert len(set(plain)) == 4
    assert fingerprints_of(turned) == [plain[place] for place in order]
    longer = np.array([*words.tolist(), "a longer word"])
    more = {"image": np.concatenate([images, images[:1]]), "label": np.array([0, 0, 1, 0, 2.5]), "ward": longer}
    assert fingerprints_of(more)[:4] == plain


def test_equal_records_have_equal_fingerprints_however_zero_is_written() -> None:
    found = fingerprints_of({"a": np.array([0.0, -0.0, 1.0]), "b": np.array([[0.0], [-0.0], [0.0]], np.float32)})

    assert found[0] == found[1] != found[2]


def test_words_that_no_text_can_hold_have_fingerprints_too() -> None:
    found = fingerprints_of({"word": np.array(["a\ud800", "a\ud801", "a\ud800"])})
    assert found[0] == found[2] != found[1]


def test_words_that_run_together_are_told_apart() -> None:
    found = fingerprints_of({"a": np.array(["ab", "a"]), "b": np.array(["c", "bc"])})

    assert found[0] != found[1]


def test_fingerprints_do_not_hang_on_how_many_records_are_taken_at_once() -> None:
    values = np.random.default_rng(0).integers(0, 256, (10_000, 3), dtype=np.uint8)

    found = fingerprints_of({"a": values})

    assert found[4095:4098] == fingerprints_of({"a": values[4095:4098]})
    assert len(found) == 10_000
