"""CSV files: what is told of them, and that no refusal quotes a value."""

from pathlib import Path

import pytest

from isthmus.wire.data import ColumnKind
from isthmus_worker.data import CsvSource, open_source
from isthmus_worker.refusals import DataRefused
from isthmus_worker.settings import CsvSettings, EntryPointSettings


def _source(folder: Path, content: str | bytes, **options: object) -> CsvSource:
    path = folder / "data.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return CsvSource(CsvSettings.model_validate({"path": path, **options}))


def test_a_column_is_of_numbers_if_every_value_is_one_and_blanks_are_missing(tmp_path: Path) -> None:
    source = _source(tmp_path, "\ufeffage;name; chol ;empty\r\n 63 ;x;2e2;\r\n\r\n41;7;;\r\n".encode(), delimiter=";")

    kinds = {column.name: (column.kind, column.missing) for column in source.schema().columns}

    assert kinds == {
        "age": (ColumnKind.NUMBER, False),
        "name": (ColumnKind.CATEGORY, False),
        "chol": (ColumnKind.NUMBER, True),
        "empty": (ColumnKind.NUMBER, True),
    }
    assert source.rows() == 2
    assert source.load(["chol", "name"]).columns == {"chol": ["2e2", None], "name": ["x", "7"]}


@pytest.mark.parametrize("word", ["nan", "inf", "1_000", "0x10", "1,5"])
def test_what_only_looks_like_a_number_makes_a_column_of_words(tmp_path: Path, word: str) -> None:
    assert _source(tmp_path, f'a,b\n1,2\n"{word}",2\n').schema().columns[0].kind is ColumnKind.CATEGORY


def test_texts_that_mean_not_recorded_can_be_named(tmp_path: Path) -> None:
    column = _source(tmp_path, "a,b\n1,2\n?,3\n", missing=["?"]).schema().columns[0]

    assert (column.kind, column.missing) == (ColumnKind.NUMBER, True)


@pytest.mark.parametrize(
    ("content", "complaint", "where"),
    [
        ("", "no header line", ":1"),
        ("a,,c\n1,2,3\n", "Column 2 of the dataset's header has no name", ":1"),
        ("a,b,a\n1,2,3\n", "names a column twice", ":1"),
        ("63,secret,1\n41,secret,0\n", "looks like a record", ":1"),
        ("a,b\n", "no records", ""),
        ("a,b\n1,secret\n1,secret,3\n1\n", "Some records of the dataset have more or fewer values", ":3"),
        ('a,b\n1,"secret"x\n', "not well-formed CSV", ":2"),
        (b"a,b\n1,secret\xff\n", "not UTF-8", ""),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_quoting_it(
    tmp_path: Path, content: str | bytes, complaint: str, where: str
) -> None:
    source = _source(tmp_path, content)

    with pytest.raises(DataRefused, match=complaint) as refusal:
        source.schema()

    assert where in refusal.value.where
    assert "secret" not in str(refusal.value) + refusal.value.where


def test_a_missing_file_is_refused_and_its_path_stays_here(tmp_path: Path) -> None:
    with pytest.raises(DataRefused, match="cannot be read") as refusal:
        CsvSource(CsvSettings(path=tmp_path / "gone.csv")).rows()

    assert "gone" not in str(refusal.value)
    assert "gone" in refusal.value.where


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataRefused, match="no column 'c'"):
        _source(tmp_path, "a,b\n1,2\n").load(["a", "c"])


def test_fingerprints_tell_records_apart_whatever_the_order_of_columns_and_rows(tmp_path: Path) -> None:
    plain = _source(tmp_path, "a,b\n1,2\n3,\n,3\n12,\n").load(["a"]).fingerprints
    turned = _source(tmp_path, "b,a\n,12\n3,\n,3\n2,1\n").load(["a"]).fingerprints

    assert len(set(plain)) == 4
    assert set(plain) == set(turned)


def test_the_stamp_changes_with_the_file(tmp_path: Path) -> None:
    before = _source(tmp_path, "a\n1\n").stamp()

    assert _source(tmp_path, "a\n1\n2\n").stamp() != before


def test_an_organization_brings_a_source_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_registry.py").write_text("def open(table):\n    return ('opened', table)\n")
    monkeypatch.syspath_prepend(tmp_path)

    opened = open_source(EntryPointSettings(function="our_registry:open", options={"table": "t"}))

    assert opened == ("opened", "t")  # type: ignore[comparison-overlap]  # a stand-in
    with pytest.raises(DataRefused, match="not installed"):
        open_source(EntryPointSettings(function="our_registry:close"))
