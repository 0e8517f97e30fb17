"""A dataset goes from one worker to another, with real agents and the real service: its budget goes with it."""

import shutil
import subprocess
from pathlib import Path

from isthmus.wire.datasets import DatasetState
from isthmus.wire.jobs import JobState
from tests.acceptance.island import PATIENCE_S, WORKER, Island, Program, island, program_path, until
from tests.acceptance.test_private_jobs import record_job


def worker(folder: Path, *words: str) -> str:
    """What `isthmus-worker` prints in a worker's folder."""
    command = [program_path("isthmus-worker"), *words, "--config", "worker.toml"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def public_key(folder: Path) -> str:
    line = next(line for line in worker(folder, "status").splitlines() if line.startswith("public key"))
    return line.split()[-1]


def second_worker(opened: Island, folder: Path) -> None:
    """Enrol another worker of the first organization, with a copy of the records."""
    folder.mkdir()
    shutil.copyfile(opened.folder / "clinic-0" / "patients.csv", folder / "patients.csv")
    (folder / "worker.toml").write_text(WORKER.format(url=opened.url, more="", resources=opened.resources))
    organization = next(one for one in opened.admin.organizations.list() if one.name == "clinic-0")
    token = opened.admin.organizations.issue_enrollment_token(organization.id).token
    (folder / "token").write_text(token)
    worker(folder, "enroll", "--name", "the-new-one", "--token-file", "token")


def test_a_dataset_moves_with_its_ledger_and_jobs_go_on(database_url: str, tmp_path: Path) -> None:
    with island(tmp_path, database_url) as opened:
        opened.open(3)
        first = opened.finish(opened.submit(record_job(name="before")))
        assert first.state is JobState.COMPLETED, first.detail
        steward = opened.stewards[0]
        before = next(iter(steward.datasets.list()))
        assert before.budget is not None

        old, new = tmp_path / "clinic-0", tmp_path / "moved"
        second_worker(opened, new)
        opened.agents[0].stop()
        worker(old, "dataset", "move", "patients", "--to", public_key(new), "--output", "../handover.json")
        worker(new, "dataset", "receive", "../handover.json", "--from", public_key(old))
        agent = Program("agent", [program_path("isthmus-worker"), "run", "--config", "worker.toml"], new, {})
        opened.agents[0] = agent
        agent.start()

        def moved() -> bool:
            assert agent.runs, agent.log.read_text()[-3000:]
            return next(iter(steward.datasets.list())).worker == "the-new-one"

        until(moved, "the service knows the new worker")
        after = next(iter(steward.datasets.list()))
        assert after.state is DatasetState.CONFIRMED, "nobody had to confirm it anew"
        assert (after.id, after.lineage) == (before.id, before.lineage)
        assert after.budget is not None
        assert after.budget.spent_epsilon == before.budget.spent_epsilon

        second = opened.finish(opened.submit(record_job(name="after")))
        assert second.state is JobState.COMPLETED, second.detail
        final = next(iter(steward.datasets.list())).budget
        assert final is not None
        assert final.spent_epsilon > before.budget.spent_epsilon
        told = worker(new, "ledger")
        assert "before" in told, "the new worker's own ledger begins with what the old one released"
        assert "after" in told

        refused = Program("again", [program_path("isthmus-worker"), "run", "--config", "worker.toml"], old, {})
        refused.start()
        assert refused.process is not None
        assert refused.process.wait(PATIENCE_S) == 5, "the old worker has nothing to serve any more"
