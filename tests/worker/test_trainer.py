"""The training process: what it may see and use, and that nothing of it outlives its agent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from isthmus_worker.messages import Work
from isthmus_worker.settings import DatasetSettings, EntryPointSettings, Resources, Settings
from isthmus_worker.trainer import Trainer, WorkFailed, WorkRefused
from tests.worker.factories import make_model, make_offer, make_settings, make_spec, write_patients

SOURCES = """
import os, time

class Source:
    def __init__(self, then): self.then = then
    def schema(self): self.then()
    def rows(self): return 1

def greedy():
    def then():
        held = []
        while True:
            held.append(b"x" * 10_000_000)
    return Source(then)

def slow(): return Source(lambda: time.sleep(60))
def crash(): return Source(lambda: os.kill(os.getpid(), 11))
def leave(): return Source(lambda: os._exit(3))

def bug():
    def then(): raise KeyError("patient 4711")
    return Source(then)

def impostor():
    def then():
        for number in range(3, 10):
            try: os.write(number, b'{"answer": "done"}\\n')
            except OSError: pass
        time.sleep(60)
    return Source(then)

def chatty():
    def then():
        print("patient 4711")
        raise SystemError
    return Source(then)

def environment():
    from pathlib import Path
    seen = [*os.environ, os.getcwd(), Path("/proc/self/cmdline").read_text()]
    Path(os.environ["WITNESS"]).write_text("\\n".join(seen))
    return Source(lambda: None)
"""


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], DatasetSettings]:
    """Datasets whose sources misbehave."""
    (tmp_path / "hospital_sources.py").write_text(SOURCES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    return lambda name: DatasetSettings(name="d", source=EntryPointSettings(function=f"hospital_sources:{name}"))


@pytest.fixture
def make_trainer(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """Trainers that are stopped in the end."""
    made: list[Trainer] = []

    def make(**limits: object) -> Trainer:
        made.append(Trainer(Resources.model_validate(limits), tmp_path / f"scratch{len(made)}"))
        return made[-1]

    yield make
    for trainer in made:
        trainer.stop()


@pytest.mark.parametrize(
    ("misdeed", "reason"),
    [
        (("greedy", {"max_memory_mb": 512}), "memory"),
        (("slow", {"max_task_s": 0.5}), "max_task_s = 0.5"),
        (("slow", {"max_silence_s": 0.5}), "no sign of life"),
        (("crash", {}), "killed by signal 11 (SIGSEGV)"),
        (("leave", {}), "exit code 3"),
        (("bug", {}), "KeyError"),
        (("chatty", {}), "SystemError"),
        (("impostor", {"max_task_s": 20}), "no answer"),
    ],
)
def test_a_child_that_goes_wrong_fails_its_task_with_a_reason_and_the_next_gets_a_new_one(
    dataset: Callable[[str], DatasetSettings],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    misdeed: tuple[str, dict[str, object]],
    reason: str,
) -> None:
    name, limits = misdeed
    trainer = make_trainer(**limits)

    with pytest.raises(WorkFailed) as failure:
        trainer.describe(dataset(name))

    assert reason in str(failure.value)
    assert "4711" not in str(failure.value) + failure.value.where
    if "max_task_s" not in limits and "max_silence_s" not in limits:  # too tight for a busy machine
        good = make_settings(tmp_path).datasets[0]
        with pytest.raises(WorkRefused, match="cannot be read"):
            trainer.describe(good)
        write_patients(tmp_path / "patients.csv")
        assert trainer.describe(good).rows == 40


def test_the_child_sees_no_secret_of_the_agents_environment(
    dataset: Callable[[str], DatasetSettings],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ISTHMUS_API_KEY", "isk_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("WITNESS", str(tmp_path / "witness"))

    with pytest.raises(WorkFailed):  # it describes nothing
        make_trainer(pass_environment=["WITNESS"]).describe(dataset("environment"))

    seen = (tmp_path / "witness").read_text()
    assert set(seen.split("\n")[:-2]) <= {
        "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
        "PYTHONDONTWRITEBYTECODE", "HOME", "TMPDIR", "PYTHONPATH", "WITNESS",
    }  # fmt: skip
    assert seen.split("\n")[-2] == str(tmp_path / "scratch0")
    assert "isk_" not in seen


def test_an_agent_that_is_killed_leaves_no_child(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from isthmus_worker.trainer import Trainer;"
        "from isthmus_worker.settings import Resources;"
        "t = Trainer(Resources(), Path(sys.argv[1])); t.warm(); print(t.pid, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    agent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "scratch")], stdout=subprocess.PIPE, env=environment
    )
    assert agent.stdout is not None
    with agent.stdout:
        child = int(agent.stdout.readline())

    agent.send_signal(signal.SIGKILL)
    agent.wait()

    deadline = time.monotonic() + 30
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


def _upload(trainer: Trainer, settings: Settings, folder: Path) -> bytes:
    spec = make_spec(privacy={"unit": "none", "clip_norm": 1.0})
    model, _ = make_model(spec)
    (folder / "model.safetensors").write_bytes(model)
    order = Work(
        number=0, offer=make_offer(spec), dataset=settings.datasets[0], model_path=folder / "model.safetensors",
        upload_path=folder / "upload.safetensors", holdout_key="ab" * 32, entry_points=(),
        min_rows=5, tell_counts=False,
    )  # fmt: skip
    done = trainer.work(order, lambda _progress: None, lambda: False)
    content = (folder / "upload.safetensors").read_bytes()
    assert sha256(content).hexdigest() == done.digest
    return content


def test_two_children_give_the_same_bytes_and_so_does_one_that_has_worked_before(
    trainer: Trainer, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    write_patients(tmp_path / "patients.csv")
    settings = make_settings(tmp_path)

    first = _upload(trainer, settings, tmp_path)

    assert _upload(trainer, settings, tmp_path) == first
    assert _upload(make_trainer(max_memory_mb=1500), settings, tmp_path) == first
