"""The loaders of the image experiments: what they give, that test images stay apart, and hostile archives."""

import gzip
import io
import os
import pickle
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.images.cifar_10 import FOLDER, TEST, TRAIN, cifar_10
from examples.images.fashion_mnist import ROOT, fashion_mnist, read_idx
from examples.images.labelled import DataMissing, Labelled, as_cifar_shape, without_images_of
from examples.images.mnist_5k import mnist_5k
from examples.images.prepare import main
from isthmus.jobfile import load_job
from isthmus.wire.data import misfits
from isthmus_worker.npz import NpzSource
from isthmus_worker.settings import NpzSettings

JOBS = Path(__file__).parents[2] / "examples" / "images"


def _grey(images: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(5).integers(0, 256, (images, 1, 28, 28), dtype=np.uint8)


# --- Images ----------------------------------------------------------------------------------------------------------


def test_a_grey_image_in_cifars_shape_keeps_its_pixels_in_the_middle_of_every_channel() -> None:
    grey = _grey()

    colour = as_cifar_shape(grey)

    assert (colour.shape, colour.dtype) == ((3, 3, 32, 32), np.uint8)
    assert (colour[:, :, 2:30, 2:30] == grey).all()
    assert colour.sum() == 3 * grey.sum(dtype=np.int64)  # nothing around
    with pytest.raises(ValueError, match="not 1 x 28 x 28"):
        as_cifar_shape(colour)


def test_an_image_that_is_in_both_parts_is_taken_out_of_the_test_whatever_its_label() -> None:
    grey = _grey(4)
    train = Labelled(grey[:3], np.array([0, 1, 2]))
    test = Labelled(grey[[3, 0, 3]], np.array([1, 2, 1]))

    kept = without_images_of(test, train)

    assert (kept.images == grey[[3, 3]]).all()
    assert kept.labels.tolist() == [1, 1]


# --- Digits and clothes ----------------------------------------------------------------------------------------------


def test_the_digits_are_parted_class_by_class_and_share_no_image() -> None:
    digits = mnist_5k()

    assert digits.train.images.shape == (4000, 1, 28, 28)
    assert np.bincount(digits.train.labels).tolist() == [400] * 10
    assert np.bincount(digits.test.labels).tolist() == [100] * 10
    assert len(without_images_of(digits.test, digits.train)) == 1000
    assert (mnist_5k().test.images == digits.test.images).all()
    assert 30 < digits.train.images.mean() < 40  # bytes, not yet divided: MNIST's mean is 33


def _write_idx(path: Path, values: Any, kind: int = 8) -> None:
    head = bytes([0, 0, kind, values.ndim]) + b"".join(struct.pack(">I", side) for side in values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


def _write_fashion(folder: Path) -> None:
    for name, images in (("train", 4), ("t10k", 2)):
        pixels = np.arange(images * 6, dtype=np.uint8).reshape(images, 2, 3)
        _write_idx(folder / f"{name}-images-idx3-ubyte.gz", pixels)
        _write_idx(folder / f"{name}-labels-idx1-ubyte.gz", np.arange(images, dtype=np.uint8))


def test_clothes_are_read_from_the_files_of_the_package(tmp_path: Path) -> None:
    _write_fashion(tmp_path)

    parts = fashion_mnist(tmp_path)

    assert parts.train.images.shape == (4, 1, 2, 3)
    assert parts.train.images[1, 0].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert parts.test.labels.tolist() == [0, 1]


@pytest.mark.skipif(not ROOT.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_packages_own_files_are_those_that_were_published() -> None:
    parts = fashion_mnist()

    assert np.bincount(parts.train.labels).tolist() == [6000] * 10
    assert np.bincount(parts.test.labels).tolist() == [1000] * 10
    assert parts.train.images.shape[1:] == (1, 28, 28)


def test_files_that_are_not_there_or_are_others_are_named_with_how_to_get_them(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    with pytest.raises(DataMissing, match="apt install dataset-fashion-mnist"):
        fashion_mnist(tmp_path)
    for content in (b"not gzip", gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"), gzip.compress(b"")):
        path.write_bytes(content)
        with pytest.raises(DataMissing, match=r"labels\.gz"):
            read_idx(path)
    _write_idx(path, np.arange(3, dtype=">i4"), kind=12)
    with pytest.raises(DataMissing, match="not an IDX file of bytes"):
        read_idx(path)
    _write_fashion(tmp_path)
    _write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([0, 10], np.uint8))
    with pytest.raises(DataMissing, match="a label from 0 to 9 each"):
        fashion_mnist(tmp_path)


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


class _Reduced:
    """Something that a pickle makes by calling `module.name(*arguments)`, then giving it `state`."""

    def __init__(self, module: str, name: str, arguments: Any, state: Any = None) -> None:
        self.module, self.name, self.arguments, self.state = module, name, arguments, state


class _Name:
    """A name that a pickle looks up, without calling it."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


def _pickled(value: Any) -> bytes:
    """As Python 2 wrote it, protocol 2: the official batches were, and Python 3 no longer writes such strings."""
    return b"\x80\x02" + _code(value) + b"."


def _code(value: Any) -> bytes:  # noqa: PLR0911 - one line for each kind of value
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case bytes() if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(_code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_code(one) for pair in value.items() for one in pair) + b"u"
        case _Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case _Reduced():
            made = _code(_Name(value.module, value.name)) + _code(value.arguments) + b"R"
            return made if value.state is None else made + _code(value.state) + b"b"
    raise TypeError(value)


def _array(values: Any, *, module: str = "numpy.core.multiarray", code: bytes = b"u1", **state: Any) -> _Reduced:
    dtype = _Reduced("numpy", "dtype", (code, 0, 1), (3, b"|", None, None, None, -1, -1, 0))
    told = {"version": 1, "shape": values.shape, "dtype": dtype, "fortran": False, "bytes": values.tobytes(), **state}
    return _Reduced(module, "_reconstruct", (_Name("numpy", "ndarray"), (0,), b"b"), tuple(told.values()))


def _pixels(number: int, images: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(number).integers(0, 256, (images, 3072), dtype=np.uint8)


def _batch(number: int = 0, **changes: Any) -> bytes:
    told = {"batch_label": b"a batch", "labels": [3, 9, 0], "data": _array(_pixels(number)), **changes}
    return _pickled({**{name.encode(): value for name, value in told.items()}, b"filenames": [b"a.png"] * 3})


def _archive(folder: Path, **changes: bytes | None) -> Path:
    """An archive in the official layout, three images a batch; with changes, or without a batch."""
    members = {name: _batch(number) for number, name in enumerate((*TRAIN, TEST))} | changes
    path = folder / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        members = {"batches.meta": b"not read", "readme.html": b"<html>", **members}
        for name, content in reversed(members.items()):  # the official one is in no order either
            if content is not None:
                told = tarfile.TarInfo(f"{FOLDER}/{name}")
                told.size = len(content)
                tar.addfile(told, io.BytesIO(content))
    return path


def test_the_tiny_archive_is_one_that_pickle_itself_reads_to_the_same_arrays() -> None:
    told = pickle.loads(_batch(7).replace(b"numpy.core.multiarray", b"numpy._core.multiarray"), encoding="bytes")

    assert (told[b"data"] == _pixels(7)).all()
    assert told[b"labels"] == [3, 9, 0]


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_the_official_layout_is_read_in_the_order_of_its_batches(tmp_path: Path, module: str) -> None:
    archive = _archive(tmp_path, data_batch_2=_batch(data=_array(_pixels(1), module=module), labels=[1, 2, 4]))

    parts = cifar_10(archive)

    assert (parts.train.images == np.concatenate([_pixels(n) for n in range(5)]).reshape(15, 3, 32, 32)).all()
    assert parts.train.labels.tolist() == [3, 9, 0, 1, 2, 4, 3, 9, 0, 3, 9, 0, 3, 9, 0]
    assert (parts.test.images == _pixels(5).reshape(3, 3, 32, 32)).all()


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "runs-a-command": (
        lambda: _pickled(_Reduced("os", "mkdir", (b"was-run",))), "names something that no batch .* was not run"
    ),
    "runs-a-builtin": (
        lambda: _pickled({b"data": _Reduced("__builtin__", "eval", (b"__import__('os').mkdir('was-run')",))}),
        "names something that no batch",
    ),
    "runs-what-it-finds-inside-numpy": (
        lambda: _pickled(_Reduced("numpy.f2py.crackfortran", "myeval", (b"__import__('os').mkdir('was-run')",))),
        "names something that no batch",
    ),
    "a-dotted-name": (lambda: _pickled(_Reduced("numpy", "dtype.mro", ())), "names something that no batch"),
    "an-array-of-objects": (lambda: _batch(data=_array(_pixels(0), code=b"O8")), "not one of bytes"),
    "an-array-of-words": (lambda: _batch(data=_array(_pixels(0), bytes=[b"x"] * 9216)), "not one of bytes"),
    "an-array-beyond-its-bytes": (lambda: _batch(data=_array(_pixels(0), shape=(2**30, 3072))), "not one of bytes"),
    "an-array-of-negative-sides": (lambda: _batch(data=_array(_pixels(0), shape=(-3, -3072))), "not one of bytes"),
    "columns-first": (lambda: _batch(data=_array(_pixels(0), fortran=True)), "not one of bytes"),
    "an-array-made-directly": (lambda: _batch(data=_Reduced("numpy", "ndarray", ((2**30, 2**30),))), "cannot be read"),
    "images-of-another-size": (lambda: _batch(data=_array(_pixels(0)[:, :3000])), r"an array of shape \[3, 3000\]"),
    "fewer-labels": (lambda: _batch(labels=[1, 2]), "2 labels"),
    "a-label-too-large": (lambda: _batch(labels=[1, 2, 10]), "a label that is no whole number from 0 to 9"),
    "a-label-of-letters": (lambda: _batch(labels=[1, 2, b"x"]), "a label that is no whole number from 0 to 9"),
    "a-label-that-is-true": (lambda: _batch(labels=[1, 2, True]), "a label that is no whole number from 0 to 9"),
    "no-data": (lambda: _batch(data=None), "no array `data`"),
    "a-list": (lambda: _pickled([1, 2]), "no array `data`"),
    "no-pickle": (lambda: b"hello", "cannot be read as a batch"),
    "empty": (lambda: b"", "cannot be read as a batch"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "complaint"), HOSTILE.values(), ids=HOSTILE)
def test_an_archive_that_is_not_what_it_says_is_refused_and_nothing_in_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Callable[[], bytes], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    archive = _archive(tmp_path, data_batch_3=content())
    looked_up = set(sys.modules)

    with pytest.raises(DataMissing, match=complaint) as refusal:
        cifar_10(archive)

    assert "data_batch_3" in str(refusal.value)
    assert os.listdir(tmp_path) == [archive.name]  # noqa: PTH208 - it must hold nothing else
    assert not {"numpy.f2py.crackfortran"} & (set(sys.modules) - looked_up)  # not even imported


def test_the_hostile_pickles_would_have_been_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    pickle.loads(HOSTILE["runs-a-command"][0]())

    assert (tmp_path / "was-run").is_dir()


def test_a_batch_that_is_missing_linked_or_huge_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="holds no test_batch under cifar-10-batches-py/"):
        cifar_10(_archive(tmp_path, test_batch=None))
    for kind, size in ((tarfile.SYMTYPE, 0), (tarfile.REGTYPE, 1 << 27)):
        path = tmp_path / "cifar.tar.gz"
        told = tarfile.TarInfo(f"{FOLDER}/{TEST}")
        told.type, told.linkname, told.size = kind, "/etc/passwd", size
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(told, io.BytesIO(bytes(size)))
        with pytest.raises(DataMissing, match="no file of the size of a batch"):
            cifar_10(path)
    with pytest.raises(DataMissing, match="University of Toronto"):
        cifar_10(tmp_path / "gone.tar.gz")
    (tmp_path / "text.tar.gz").write_text("no archive")
    with pytest.raises(DataMissing, match=r"cannot be read as a \.tar\.gz"):
        cifar_10(tmp_path / "text.tar.gz")


# --- Prepared for a worker -------------------------------------------------------------------------------------------


def test_what_is_prepared_is_what_a_worker_reads_and_the_jobs_fit_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey, colour = tmp_path / "grey", tmp_path / "colour"

    assert main(["mnist-5k", "--out", str(grey)]) == 0
    assert main(["mnist-5k", "--like-cifar", "--out", str(colour)]) == 0

    assert "train.npz: 4000 images of 1 x 28 x 28, 10 classes" in capsys.readouterr().out
    for folder, job in ((grey, "cnn.yaml"), (colour, "lenet.yaml")):
        spec = load_job(JOBS / job)
        assert sorted(file.name for file in folder.iterdir()) == ["test.npz", "train.npz"]
        for part, rows in (("train.npz", 4000), ("test.npz", 1000)):
            source = NpzSource(NpzSettings(path=folder / part))
            assert misfits(spec.data, source.schema()) == []
            assert source.rows() == rows
            assert np.asarray(source.load(["image"]).columns["image"]).dtype == np.uint8


def test_preparing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    main(["mnist-5k", "--out", str(tmp_path)])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    main(["mnist-5k", "--out", str(tmp_path)])

    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_preparing_an_archive_leaves_test_images_out_that_are_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repeated = np.concatenate([_pixels(0)[:1], _pixels(5)[1:]])
    archive = _archive(tmp_path, test_batch=_batch(data=_array(repeated)))

    assert main(["cifar-10", "--archive", str(archive), "--out", str(tmp_path / "out")]) == 0

    assert "1 test images are also in the training part" in capsys.readouterr().out
    assert NpzSource(NpzSettings(path=tmp_path / "out" / "test.npz")).rows() == 2


def test_what_is_not_here_is_said_with_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fashion-mnist", "--from", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1

    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
