"""Files that were verified once."""

import hashlib
import os
from pathlib import Path

import pytest

from isthmus_worker import files
from isthmus_worker.files import VerifiedFiles

CONTENT = b"a model"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_a_file_is_read_once_as_long_as_nobody_touches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, verified = tmp_path / "model", VerifiedFiles()
    path.write_bytes(CONTENT)
    assert verified.holds(path, DIGEST)
    monkeypatch.setattr(files, "digest_of_file", lambda _path: pytest.fail("read again"))
    assert verified.holds(path, DIGEST)


@pytest.mark.parametrize("noted", [True, False])
def test_a_file_that_was_changed_is_read_again_even_with_its_old_time(tmp_path: Path, noted: bool) -> None:
    path, verified = tmp_path / "model", VerifiedFiles()
    path.write_bytes(CONTENT)
    if noted:
        verified.note(path, DIGEST)
    before = path.stat()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not verified.holds(path, DIGEST)


def test_a_file_that_is_changed_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, verified = tmp_path / "model", VerifiedFiles()
    path.write_bytes(CONTENT)
    read = files.digest_of_file

    def read_and_overtaken(path: Path) -> tuple[str, int]:
        found = read(path)
        path.write_bytes(b"another model")
        return found

    monkeypatch.setattr(files, "digest_of_file", read_and_overtaken)
    assert verified.holds(path, DIGEST)  # it was, when it was read
    assert not verified.holds(path, DIGEST)


def test_another_digest_and_a_missing_file_do_not_hold(tmp_path: Path) -> None:
    path, verified = tmp_path / "model", VerifiedFiles()
    path.write_bytes(CONTENT)
    verified.note(path, DIGEST)
    assert not verified.holds(path, "0" * 64)
    path.unlink()
    assert not verified.holds(path, DIGEST)


def test_what_is_deleted_takes_no_memory(tmp_path: Path) -> None:
    path, verified = tmp_path / "model", VerifiedFiles()
    path.write_bytes(CONTENT)
    verified.note(path, DIGEST)
    verified.delete(path)
    verified.delete(path)  # it may be gone
    assert not path.exists()
    assert not verified._seen
