"""Which data a dataset is: a budget survives renaming, moving, copying and editing."""

import random
from pathlib import Path

import numpy as np
import pytest

from isthmus_worker.contents import content_of
from isthmus_worker.journal import Journal
from isthmus_worker.likeness import KEPT, alike, overlap, sketch_of
from isthmus_worker.lineage import LineageRefused
from isthmus_worker.settings import CsvSettings, DatasetSettings, EntryPointSettings, NpzSettings
from isthmus_worker.state import StateDir


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """An empty one."""
    return Journal.open(StateDir.open(tmp_path / "state"))


def _records(count: int, first: int = 0) -> list[str]:
    return [f"{number},{number * number % 97},{'FM'[number % 2]}" for number in range(first, first + count)]


def _write(path: Path, records: list[str], header: str = "age,pressure,sex") -> Path:
    path.write_text("\n".join([header, *records]) + "\n", encoding="utf-8")
    return path


def _lineage(journal: Journal, name: str, path: Path) -> str:
    source = NpzSettings(path=path) if path.suffix == ".npz" else CsvSettings(path=path)
    return journal.lineages.of(
        DatasetSettings(name=name, source=source), content_of(source, journal.lineages.known_stamp(source))
    )


def test_the_same_data_keep_their_lineage_under_another_name_another_path_or_both(
    journal: Journal, tmp_path: Path
) -> None:
    data = _write(tmp_path / "a.csv", _records(40))
    first = _lineage(journal, "patients", data)
    assert len(bytes.fromhex(first)) == 32
    (tmp_path / "link.csv").symlink_to(data)
    copy = tmp_path / "copy.csv"
    copy.write_bytes(data.read_bytes())

    assert _lineage(journal, "patients", data) == first
    assert _lineage(journal, "renamed", data) == first
    assert _lineage(journal, "linked", tmp_path / "link.csv") == first
    assert _lineage(journal, "copied", copy) == first
    assert _lineage(journal, "patients", _write(tmp_path / "new.csv", _records(40, first=1000))) == first  # by its name
    assert journal.lineages.names(first) == ["copied", "linked", "patients", "renamed"]


def test_a_file_that_was_replaced_keeps_the_lineage_of_its_place(journal: Journal, tmp_path: Path) -> None:
    data = _write(tmp_path / "a.csv", _records(40))
    first = _lineage(journal, "patients", data)
    _write(data, _records(40, first=5000))
    assert _lineage(journal, "renamed", data) == first

    _write(data, _records(40, first=9000))
    (tmp_path / "link.csv").symlink_to(data)
    assert _lineage(journal, "linked", tmp_path / "link.csv") == first


def test_other_data_get_a_lineage_of_their_own(journal: Journal, tmp_path: Path) -> None:
    one = _lineage(journal, "a", _write(tmp_path / "a.csv", _records(40)))
    other = _lineage(journal, "b", _write(tmp_path / "b.csv", _records(40, first=30)))  # a quarter is the same

    assert one != other


@pytest.mark.parametrize(
    "edit", ["a row more", "rows fewer", "most of the rows", "cells", "order", "columns", "line ends"]
)
def test_an_edited_copy_under_another_name_and_path_is_known_again(journal: Journal, tmp_path: Path, edit: str) -> None:
    records = _records(3000)
    first = _lineage(journal, "patients", _write(tmp_path / "a.csv", records))
    drawn, header = random.Random(5), "age,pressure,sex"
    if edit == "a row more":
        records = [*records, "99,99,F"]
    elif edit == "rows fewer":
        records = records[200:]
    elif edit == "most of the rows":
        records = records[: len(records) * 6 // 10]
    elif edit == "cells":
        records = [f"{one}x" if drawn.random() < 0.2 else one for one in records]
    elif edit == "order":
        drawn.shuffle(records)
    elif edit == "columns":
        header, records = "sex,age,pressure", [",".join([*one.split(",")[2:], *one.split(",")[:2]]) for one in records]
    copy = _write(tmp_path / "b.csv", records, header)
    if edit == "line ends":
        copy.write_bytes(copy.read_bytes().replace(b"\n", b"\r\n").replace(b",", b" , "))

    assert _lineage(journal, "others", copy) == first


def test_an_archive_is_known_again_by_its_very_bytes(journal: Journal, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(40))
    first = _lineage(journal, "images", tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    np.savez(tmp_path / "c.npz", x=np.arange(1, 41))

    assert _lineage(journal, "copied", tmp_path / "b.npz") == first
    assert _lineage(journal, "others", tmp_path / "c.npz") != first


def test_data_that_a_function_reads_are_known_by_the_function_and_its_options(journal: Journal) -> None:
    def lineage(name: str, **options: object) -> str:
        source = EntryPointSettings(function="hospital.sources:open", options=options)
        return journal.lineages.of(DatasetSettings(name=name, source=source), content_of(source, None))

    assert lineage("a", table="heart") == lineage("b", table="heart") != lineage("c", table="lung")


def test_a_dataset_that_is_two_at_once_is_not_served(journal: Journal, tmp_path: Path) -> None:
    one = _write(tmp_path / "a.csv", _records(40))
    other = _write(tmp_path / "b.csv", _records(40, first=1000))
    _lineage(journal, "a", one)
    _lineage(journal, "b", other)

    with pytest.raises(LineageRefused, match=r"by its name .* as 'a'; by its source .* as 'b'"):
        _lineage(journal, "a", other)
    with pytest.raises(LineageRefused, match="by its records"):  # a copy of a over the spent b gives nothing afresh
        _lineage(journal, "b", _write(tmp_path / "c.csv", [*_records(40), "1,1,F"]))
    assert _lineage(journal, "a", one) != _lineage(journal, "b", other)  # as they were, they are served on


def test_a_file_that_did_not_change_is_not_read_again(journal: Journal, tmp_path: Path) -> None:
    data = _write(tmp_path / "a.csv", _records(40))
    source = CsvSettings(path=data)
    first = _lineage(journal, "patients", data)

    known = journal.lineages.known_stamp(source)
    assert content_of(source, known) is None
    assert _lineage(journal, "renamed", data) == first
    _write(data, _records(41))
    assert content_of(source, known) is not None


def test_tables_whose_records_say_nothing_are_told_apart_by_their_files(journal: Journal, tmp_path: Path) -> None:
    yes_and_no = [f"{number % 2},{number % 3}" for number in range(500)]
    one = _lineage(journal, "a", _write(tmp_path / "a.csv", yes_and_no, "smokes,stage"))
    other = _lineage(journal, "b", _write(tmp_path / "b.csv", yes_and_no[:450], "smokes,stage"))

    assert one != other


@pytest.mark.parametrize(
    ("shared", "size"), [(0, 5000), (500, 5000), (2500, 5000), (5000, 5000), (900, 1000), (20, 30)]
)
def test_the_share_in_common_is_estimated_well(shared: int, size: int) -> None:
    def hashes(first: int, count: int) -> list[bytes]:
        return [random.Random(number).randbytes(16) for number in range(first, first + count)]

    one, other = sketch_of(hashes(0, size)), sketch_of(hashes(size - shared, 2 * size))

    assert len(one.smallest) == min(size, KEPT)
    assert one.distinct == pytest.approx(size, rel=0.1)
    assert overlap(one, other) == pytest.approx(shared / size, abs=0.1 if size > KEPT // 2 else 1e-9)
    assert overlap(one, other) == overlap(other, one)
    assert alike(one, other) is (shared / size > 0.6)


def test_records_that_occur_often_count_once() -> None:
    twice = sketch_of([bytes([number]) * 16 for number in range(100)] * 2)

    assert (twice.records, twice.distinct, len(twice.smallest)) == (200, 100, 100)
    assert overlap(sketch_of([]), twice) == 0.0
