"""`isthmus simulate`, from the command line to the files."""

import io
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from isthmus.codec.arrays import read
from isthmus.commands import run
from isthmus.commands.exits import ExitCode
from isthmus.commands.session import Surroundings
from isthmus.jobfile import parse_job
from isthmus_worker.simulation.conduct import notes
from isthmus_worker.simulation.pictures import MISSING
from tests.worker.simulation.cases import JOB, job_spec, points, write_npz


class Said:
    """What a command line came to."""

    def __init__(self, arguments: Sequence[str | Path]) -> None:
        out, err = io.StringIO(), io.StringIO()
        around = Surroundings(
            environ={},
            out=Console(file=out, width=200, markup=False, highlight=False),
            err=Console(file=err, width=200, markup=False, highlight=False),
        )
        self.code = run(["simulate", *map(str, arguments)], around)
        self.out, self.err = out.getvalue(), err.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A job, 400 points to train on, 200 others to test with."""
    (tmp_path / "job.yaml").write_text(JOB)
    write_npz(tmp_path / "points.npz", points(400))
    write_npz(tmp_path / "test.npz", points(200, 99))
    return tmp_path


def test_a_job_is_simulated_over_one_file_cut_into_clients(files: Path) -> None:
    said = Said(
        [files / "job.yaml", "--data", files / "points.npz", "--test", files / "test.npz", "--clients", "6",
         "--partition", "classes:2", "--seed", "4", "--out", files / "out", "--processes", "2"]
    )  # fmt: skip

    assert said.code == ExitCode.OK, said.err
    written = {path.name for path in (files / "out").iterdir()}
    assert written == {"model.safetensors", "model.json", "rounds.json", "accuracy.png", "clients.png"}
    for name in ("accuracy.png", "clients.png"):
        assert (files / "out" / name).read_bytes().startswith(b"\x89PNG")
    digest = sha256((files / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert digest in said.out
    about = json.loads((files / "out" / "model.json").read_text())
    assert about["digest"] == digest
    assert about["spec"] == parse_job(JOB).model_dump(mode="json", by_alias=True)
    assert {name: list(array.shape) for name, array in read(files / "out" / "model.safetensors").items()} == {
        name: spec["shape"] for name, spec in about["manifest"]["tensors"].items()
    }
    rounds = json.loads((files / "out" / "rounds.json").read_text())
    assert [one["number"] for one in rounds["rounds"]] == [1, 2, 3, 4]
    assert [len(one["cohort"]) for one in rounds["rounds"]] == [3, 3, 3, 6]
    assert [len(client["classes"]) for client in rounds["clients"]] == [2] * 6
    assert sum(client["rows"] for client in rounds["clients"]) == 400
    assert rounds["rounds"][2]["test"]["examples"] == 200
    for client in rounds["clients"]:
        assert client["client"] in said.out
    assert "HELD-OUT ACCURACY" in said.out
    assert f"test accuracy {rounds['rounds'][2]['test']['accuracy']:.4f}" in said.out


def test_machines_get_one_line_of_json(files: Path) -> None:
    options = [files / "job.yaml", "--data", files / "points.npz", "--clients", "4", "--out", files / "out", "--json"]
    one, other = Said(options), Said([*options, "--processes", "1"])

    assert one.code == ExitCode.OK, one.err
    told = json.loads(one.out)
    assert one.out.count("\n") == 1
    assert told["digest"] == json.loads(other.out)["digest"]
    assert [Path(path).name for path in told["files"]] == [
        "model.safetensors", "model.json", "rounds.json", "accuracy.png", "clients.png",
    ]  # fmt: skip


def test_clients_may_be_listed_in_a_file(files: Path) -> None:
    listed = ""
    for number in range(3):
        write_npz(files / f"{number}.npz", points(60, number))
        listed += f'[[clients]]\norganization = "c{number}"\nsource = {{ kind = "npz", path = "{number}.npz" }}\n'
    (files / "clients.toml").write_text(listed)

    said = Said([files / "job.yaml", "--clients-file", files / "clients.toml", "--out", files / "out"])

    assert said.code == ExitCode.OK, said.err
    assert "c2/rows" in said.out


def test_records_of_the_test_set_that_clients_hold_are_refused_or_left_out(files: Path) -> None:
    known = points(400)
    mixed = {name: np.concatenate([np.asarray(column)[:7], np.asarray(points(50, 9).columns[name])])
             for name, column in known.columns.items()}  # fmt: skip
    np.savez(files / "mixed.npz", **mixed)
    options = [
        files / "job.yaml",
        "--data",
        files / "points.npz",
        "--test",
        files / "mixed.npz",
        "--out",
        files / "out",
    ]

    refused, dropped = Said(options), Said([*options, "--drop-shared"])

    assert refused.code == ExitCode.USAGE
    assert "7 records of the test set are also held by clients" in refused.err
    assert not (files / "out").exists() or dropped.code == ExitCode.OK
    assert "7 records of the test set are left out" in dropped.err
    rounds = json.loads((files / "out" / "rounds.json").read_text())["rounds"]
    assert rounds[0]["test"]["examples"] == 50


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--data", "none.npz"], ExitCode.USAGE, "cannot be read"),
        (["--data", "points.npz", "--partition", "shards:2"], ExitCode.USAGE, "is no partition"),
        (["--data", "points.npz", "--clients", "300"], ExitCode.USAGE, "every client needs 10"),
        (["--data", "points.npz", "--clients", "1"], ExitCode.JOB_UNSUCCESSFUL, "need 2 clients"),
        (["--data", "points.npz", "--model", "job.yaml"], ExitCode.USAGE, "job.yaml"),
        (["--clients-file", "none.toml"], ExitCode.USAGE, "none.toml: cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_said_in_a_sentence(
    files: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: ExitCode, said: str
) -> None:
    monkeypatch.chdir(files)
    found = Said(["job.yaml", *options, "--out", "out"])

    assert said in found.err or said in found.out
    assert found.code == code
    assert "Traceback" not in found.err
    assert not (files / "out").exists()


@pytest.mark.parametrize("options", [[], ["--data", "points.npz", "--clients-file", "x.toml"]], ids=["neither", "both"])
def test_who_takes_part_is_said_once(files: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    said = Said([files / "job.yaml", *options])

    assert said.code == ExitCode.USAGE
    assert "say who takes part" in capsys.readouterr().err


def test_a_job_file_that_is_none_is_told_as_everywhere(files: Path) -> None:
    (files / "job.yaml").write_text(JOB.replace("rounds: 3", "rounds: -3"))
    said = Said([files / "job.yaml", "--data", files / "points.npz"])

    assert said.code == ExitCode.USAGE
    assert "rounds: must be at least 1 (line" in said.err


def test_training_that_diverges_is_a_job_without_success(files: Path) -> None:
    (files / "job.yaml").write_text(
        JOB.replace("lr: 0.1", "lr: 1000, momentum: 0.9").replace("rounds: 3", "rounds: 40")
    )
    said = Said([files / "job.yaml", "--data", files / "points.npz", "--clients", "4", "--out", files / "out"])

    assert said.code == ExitCode.JOB_UNSUCCESSFUL
    assert "diverged" in said.err
    assert "client-00" in said.err


def test_without_matplotlib_there_are_no_pictures_and_a_sentence_says_why(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("conduct", "report"):
        monkeypatch.setattr(f"isthmus_worker.simulation.{module}.can_draw", lambda: False)
    said = Said([files / "job.yaml", "--data", files / "points.npz", "--out", files / "out"])

    assert said.code == ExitCode.OK
    assert MISSING in said.err
    assert not list((files / "out").glob("*.png"))
    assert (files / "out" / "model.safetensors").exists()


def test_what_differs_from_a_real_run_is_said() -> None:
    assert notes(job_spec()) == []
    spec = job_spec(
        cohort={"min_updates": 2, "over_selection": 1, "target_updates": 2},
        privacy={"unit": "record", "clip_norm": 1.0, "noise_multiplier": 1.0},
        data={**job_spec().data.model_dump(), "standardize": "none"},
    )
    assert [note.split()[0] for note in notes(spec)] == ["cohort.over_selection", "cohort.target_updates:", "The"]
