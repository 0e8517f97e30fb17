"""Four hospitals train one model together, on this machine: `make demo`, or `python -m examples.heart.demo`.

The service and each hospital's worker are processes of their own; a worker has a folder that holds only its own rows.
Read `play` for the story; the rest of this file is how it begins and how it ends.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from examples.heart import database
from examples.heart.federation import Federation
from examples.heart.hospitals import HOSPITALS, JOB, RESEARCHER
from examples.heart.processes import SERVICE, ProcessDied, Processes, command, tail
from examples.heart.stage import (
    DEFAULT,
    SIGNALS,
    FolderInUse,
    clear,
    how_to_stop,
    stop_kept,
    undisturbed,
)
from examples.heart.telling import Teller, console_of_the_demo, shown
from examples.heart.watching import watch
from isthmus.client import IsthmusError
from isthmus.interruption import Interrupted, Interruption
from isthmus.jobfile import load_job
from isthmus.submission import submit
from isthmus.wire.datasets import DatasetView
from isthmus.wire.events import EventView
from isthmus.wire.jobs import JobSpec, JobState, JobView
from isthmus.wire.privacy import PrivacyReport

FAILED: Final = 1


class JobUnsuccessful(Exception):
    """The job ended otherwise than completed."""


def play(federation: Federation, teller: Teller, *, keep: bool) -> None:
    """The story: from nothing to a model that four hospitals have trained, and what it is worth."""
    spec = load_job(JOB)
    teller.title("Isthmus: four hospitals train one model; no record leaves its hospital.")

    began = time.monotonic()
    federation.start_service()
    load_what_comes_later()
    federation.await_service()
    ready = time.monotonic()
    teller.say("service", f"{federation.url}, with {database.described(federation.folder)}", seconds=ready - began)

    federation.admit()
    federation.start_workers(spec)
    datasets = federation.open_datasets()
    teller.say("hospitals", *who_takes_part(datasets), seconds=time.monotonic() - ready)
    teller.say("stewards", *what_is_allowed(datasets))

    researcher = federation.client(RESEARCHER)
    job = submit(researcher, spec)
    teller.say("job", *what_is_asked(spec))
    teller.say("privacy", *what_is_claimed(spec))
    teller.gap()
    watch(heard(federation, job), spec.rounds, teller.console)
    job = completed(researcher.jobs.get(job.id))
    download(federation, job)
    teller.say("spent", *what_was_spent(researcher.jobs.privacy(job.id), datasets))
    federation.processes.await_end("download")

    from examples.heart.comparison import compare  # noqa: PLC0415 - loaded by now, while the service started
    from examples.heart.curve import draw  # noqa: PLC0415
    from examples.heart.results import conclusions, results_table  # noqa: PLC0415

    results, by_round = compare(federation, job)
    teller.gap()
    teller.heading("On held-out patients, whom nobody has trained on")
    teller.console.print(results_table(results))
    teller.gap()
    teller.conclude(conclusions(results))
    curve = federation.folder / "curve.png"
    draw(by_round, results, curve)

    model = federation.folder / "model"
    teller.say("model", f"{shown(model / 'model.safetensors')}, and model.json, which tells what it is")
    teller.say("curve", shown(curve))
    if not keep:
        teller.say("docs page", f"{federation.url}/docs, gone with the service; KEEP=1 leaves it open")


def load_what_comes_later() -> None:
    """Import torch and the rest while the service starts, and before the workers need the processor."""
    from examples.heart import comparison, curve  # noqa: F401, PLC0415


def who_takes_part(datasets: Sequence[DatasetView]) -> list[str]:
    """The hospitals, with the patients that their workers announced."""
    rows = {view.organization: view.rows for view in datasets}
    named = ", ".join(f"{hospital.short} {rows[hospital.name]}" for hospital in HOSPITALS)
    return [f"patients: {named}", "each a worker, a process of its own in a folder with its own rows only"]


def what_is_allowed(datasets: Sequence[DatasetView]) -> list[str]:
    """The policy that every hospital's worker has announced, and its steward confirmed."""
    policy = datasets[0].policy
    assert policy.budget is not None, "the hospitals' configurations set one"
    modes = " or ".join(mode.value for mode in policy.modes)
    return [
        f"confirmed the data; approve by rule: {', '.join(policy.purposes)}, privacy of a {modes}, epsilon <= "
        f"{policy.max_epsilon:g} a job,",
        f"at least {policy.min_cohort} hospitals a round; a budget of epsilon {policy.budget.epsilon:g} for all jobs, "
        "for ever",
    ]


def what_is_asked(spec: JobSpec) -> list[str]:
    """The job in a few words."""
    parameters = spec.model.plan(spec.data.input_shape).manifest.averaged_elements
    return [
        shown(JOB),
        f"{len(spec.data.features)} features, a network of {parameters} parameters, {spec.rounds} rounds of "
        f"{spec.strategy.kind}",
    ]


def what_is_claimed(spec: JobSpec) -> list[str]:
    """What protects the patients."""
    privacy = spec.privacy
    return [
        f"unit: {privacy.unit.value}, epsilon {privacy.epsilon:g} at delta {privacy.claimed_delta:g}: whether one "
        "patient was there stays hidden from everybody",
        f"each patient's gradient is clipped to {privacy.clip_norm:g}, noise in every step; figures of quality stay at "
        "each hospital",
    ]


def what_was_spent(report: PrivacyReport, datasets: Sequence[DatasetView]) -> list[str]:
    """What the job has cost each hospital's budget."""
    spent = {one.organization: one.epsilon_spent or 0.0 for one in report.datasets}
    named = ", ".join(f"{hospital.short} {spent[hospital.name]:.2f}" for hospital in HOSPITALS)
    budget = datasets[0].policy.budget
    assert budget is not None, "the hospitals' configurations set one"
    return [f"epsilon {named}, at delta {report.delta:g},", f"of a budget of {budget.epsilon:g} at each hospital"]


def heard(federation: Federation, job: JobView) -> Iterator[EventView]:
    """The job's events, as long as every process lives."""
    for event in federation.client(RESEARCHER).jobs.events(job.id):
        federation.processes.require_all()
        yield event


def completed(job: JobView) -> JobView:
    """The job, if it went well.

    Raises:
        JobUnsuccessful: it did not.
    """
    if job.state is not JobState.COMPLETED:
        raise JobUnsuccessful(f"The job is {job.state}: {job.detail or job.reason or 'no reason was given'}")
    return job


def download(federation: Federation, job: JobView) -> None:
    """Have the command line fetch the model, as a researcher would; `download` ends by itself."""
    environment = {"ISTHMUS_URL": federation.url, "ISTHMUS_API_KEY": federation.keys[RESEARCHER]}
    words: list[str | Path] = ["job", "download", str(job.id), federation.folder / "model"]
    federation.processes.start(
        "download", [command("isthmus"), *words], folder=federation.folder, environment=environment
    )


def leave_running(federation: Federation, teller: Teller) -> None:
    """Tell how to use what is left running, and how to end it."""
    keys = federation.folder / "keys.json"
    with os.fdopen(os.open(keys, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(federation.keys, file, indent=2)
    longest = max(map(len, federation.keys))
    teller.gap()
    teller.say("running", "the service and four workers; they do not end by themselves")
    teller.spell("address", federation.url)
    teller.spell("docs page", f"{federation.url}/docs")
    teller.spell("keys", *(f"{name:<{longest}}  {key}" for name, key in federation.keys.items()))
    teller.spell("", f"they are in {shown(keys)}, too")
    use = f"ISTHMUS_URL={federation.url} ISTHMUS_API_KEY={federation.keys[RESEARCHER]}"
    teller.spell("use it", f"export {use}", f"{shown(command('isthmus'))} job list")
    teller.spell("stop it", how_to_stop(federation.folder))
    federation.kept = True


def run(folder: Path, teller: Teller, *, keep: bool) -> int:
    """One run in `folder`; the exit code."""
    try:
        clear(folder)
    except FolderInUse as error:
        teller.console.print(str(error))
        return FAILED
    began = time.monotonic()
    processes = Processes(folder, keep=keep)
    try:
        with Interruption(*SIGNALS) as interruption, Federation(folder, processes) as federation:
            play(federation, teller, keep=keep)
            interruption.check()
            if keep:
                leave_running(federation, teller)
    except Interrupted as interrupted:
        teller.console.print(f"\nStopped by {interrupted}; nothing is left running.")
        return 128 + interrupted.number
    except ProcessDied as error:
        return explain(teller, error, error.log)
    except (IsthmusError, JobUnsuccessful, OSError) as error:
        return explain(teller, error, processes.log(SERVICE))
    ended = "" if keep else ", and no process is left"
    teller.say("all in all", f"{time.monotonic() - began:.1f} s{ended}")
    return 0


def explain(teller: Teller, error: Exception, log: Path) -> int:
    """Say what went wrong, with the end of the log that tells more."""
    teller.console.print(f"\nThe demo failed: {error}")
    teller.console.print(f"The end of {shown(log)}; others lie beside it:\n\n{tail(log)}", soft_wrap=True)
    return FAILED


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m examples.heart.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="leave the service and the workers running")
    parser.add_argument("--stop", action="store_true", help="end what an earlier run left running, and do nothing else")
    parser.add_argument("--dir", type=Path, default=DEFAULT, help="the folder to play in; it is wiped first")
    asked = parser.parse_args()
    folder, teller = asked.dir.resolve(), Teller(console_of_the_demo())
    if asked.stop:
        with undisturbed():
            stopped = stop_kept(folder)
        teller.console.print("Stopped." if stopped else f"No demo runs in {shown(folder)}.")
        return 0
    return run(folder, teller, keep=asked.keep)


if __name__ == "__main__":
    raise SystemExit(main())
