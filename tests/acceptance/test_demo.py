"""The demo as a newcomer runs it: one command, and afterwards a table, a model, a picture and no process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from examples.heart.hospitals import HOSPITALS
from examples.heart.processes import Process, Processes, birth, record_in
from examples.heart.stage import FolderInUse, clear, stop_kept
from isthmus.codec import arrays

ROOT = Path(__file__).parents[2]
PATIENCE_S = 180.0
SIGNATURE_OF_PNG = b"\x89PNG\r\n\x1a\n"
CELL = r"(\d\.\d\d) +(\d\.\d\d|n/a)"


@contextmanager
def demo(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process, with its output at hand; ended afterwards, whatever happens."""
    command = [sys.executable, "-m", "examples.heart.demo", "--dir", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def left_in(folder: Path) -> list[str]:
    """Every process that works in `folder`: those of the demo do, each in a folder of its own, Postgres too."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink().is_relative_to(folder):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def figures(output: str) -> dict[str, list[tuple[float, float | None]]]:
    """The table: model -> (accuracy, AUC) at each hospital, and on everybody."""
    rows = re.findall(rf"^ *(\w[\w ,]*?) +((?:{CELL} *){{5}})$", output, re.MULTILINE)
    return {
        row[0]: [(float(accuracy), None if auc == "n/a" else float(auc)) for accuracy, auc in re.findall(CELL, row[1])]
        for row in rows
    }


def test_four_hospitals_get_one_model_and_no_process_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with demo(folder) as process:
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert left_in(folder) == []

    assert "unit: record, epsilon 3 at delta 1e-05" in output
    told = re.findall(r"round (\d+)/20 +[\d.]+ s a round +updates 4/4 *$", output, re.MULTILINE)
    assert [int(number) for number in told] == list(range(1, 21)), "the live line shows what was released, and no more"
    assert "loss" not in output.partition("On held-out patients")[0]
    spent = re.search(r"epsilon Cleveland (\S+), Hungary (\S+), Switzerland (\S+), Long Beach (\S+), at", output)
    assert spent is not None
    assert all(2.8 < float(epsilon) <= 3.0 for epsilon in spent.groups())

    # Hold-outs and noise are drawn anew. Of 20 draws the worst had an accuracy of 0.75; these are some four deviations
    # from the mean.
    table = figures(output)
    assert list(table) == [*(f"{hospital.short} alone" for hospital in HOSPITALS), "federated", "pooled, no privacy"]
    everybody = {model: cells[-1] for model, cells in table.items()}
    accuracy, auc = everybody["federated"]
    assert accuracy >= 0.65
    assert auc is not None
    assert auc >= 0.74
    assert accuracy >= everybody["Switzerland alone"][0] + 0.05
    assert abs(accuracy - everybody["pooled, no privacy"][0]) <= 0.15

    about = json.loads((folder / "model" / "model.json").read_text())
    assert about["state"] == "completed"
    model = arrays.read(folder / "model" / "model.safetensors")
    assert sum(tensor.size for tensor in model.values()) == 402
    assert (folder / "curve.png").read_bytes().startswith(SIGNATURE_OF_PNG)
    for hospital in HOSPITALS:
        own = folder / hospital.name
        assert {path.name for path in own.iterdir()} == {hospital.file, "worker.toml", "state"}
        assert (own / hospital.file).read_bytes() == (ROOT / "examples/heart/data" / hospital.file).read_bytes()


def test_a_demo_that_is_told_to_end_leaves_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with demo(folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.lstrip().startswith("hospitals"):
                break
        assert len(left_in(folder)) > 4, "the service and the workers run"
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "nothing is left running" in output
    assert left_in(folder) == []


def test_a_kept_demo_is_not_wiped_and_only_its_own_processes_are_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    clear(folder)
    processes = Processes(folder, keep=True)
    ours = processes.start("worker", ["sleep", "60"], folder=folder)
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        record = json.loads(record_in(folder).read_text())
        here = [one for one in record if one["pid"] == os.getpid()]
        reused = {"name": "hungary", "pid": stranger.pid, "born": "before this process"}
        record_in(folder).write_text(json.dumps([*(one for one in record if one not in here), reused]))

        with pytest.raises(FolderInUse, match="runs in"):
            clear(folder)
        deadline = time.monotonic() + 10
        assert birth(ours.pid) is not None
        assert stop_kept(folder)
        assert time.monotonic() < deadline, "it was ended by SIGTERM"
        assert ours.wait(timeout=10) == -signal.SIGTERM
        assert stranger.poll() is None
        assert not stop_kept(folder)
        clear(folder)
    finally:
        for process in (ours, stranger):
            process.kill()
            process.wait()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(FolderInUse, match="not a demo's"):
        clear(tmp_path)

    assert (tmp_path / "thesis.txt").exists()


def test_a_process_is_another_one_when_its_id_is_used_again() -> None:
    born = birth(os.getpid())
    assert born is not None
    assert Process("this", os.getpid(), born).lives()
    assert not Process("another", os.getpid(), born + "0").lives()
