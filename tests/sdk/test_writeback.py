"""Writing back early: which ranges the kernel is told of."""

import os
from pathlib import Path

import pytest

from isthmus import writeback
from isthmus.writeback import STRETCH_BYTES, Writeback


def test_every_stretch_is_told_once_and_a_small_file_never(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, int]] = []
    monkeypatch.setattr(writeback, "_begin", lambda: lambda *range_: told.append(range_))
    file = Writeback(7)
    file.wrote(STRETCH_BYTES - 1)
    assert told == []
    file.wrote(3)
    file.wrote(STRETCH_BYTES)
    assert told == [(7, 0, STRETCH_BYTES + 2), (7, STRETCH_BYTES + 2, STRETCH_BYTES)]


def test_what_is_appended_to_a_file_begins_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, int]] = []
    monkeypatch.setattr(writeback, "_begin", lambda: lambda *range_: told.append(range_))
    Writeback(7, written=100).wrote(STRETCH_BYTES)
    assert told == [(7, 100, STRETCH_BYTES)]


def test_the_file_holds_what_was_written_whatever_the_system_does(tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 9
    with (tmp_path / "large").open("wb", buffering=0) as file:
        early = Writeback(file.fileno())
        file.write(content)
        early.wrote(len(content))
    assert (tmp_path / "large").read_bytes() == content
