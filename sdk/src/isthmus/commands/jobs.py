"""`isthmus job ...`"""

import json
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.text import Text

from isthmus.client import IsthmusError
from isthmus.commands.exits import ExitCode
from isthmus.commands.lookup import NoSuch
from isthmus.commands.options import Json
from isthmus.commands.rendering.diagnosis import waits_for
from isthmus.commands.rendering.jobs import event_line, job_report, job_text, jobs_table
from isthmus.commands.rendering.metrics import last_with_sites, metrics_table, sites_table
from isthmus.commands.rendering.privacy import report_text
from isthmus.commands.rendering.text import printable
from isthmus.commands.session import PATIENT, Session, connected, plain, surroundings, write_json
from isthmus.commands.watch import watch
from isthmus.jobfile import load_job
from isthmus.submission import require_drawable, submit
from isthmus.wire.jobs import CancelJob, JobState, JobView

app = typer.Typer(no_args_is_help=True, help="Jobs: federated training.")

JobId = Annotated[UUID, typer.Argument(metavar="JOB_ID", show_default=False)]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Follow it to its end.")]


@app.command("submit")
def submit_file(
    ctx: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(help="The job, as YAML.")],
    model: Annotated[
        Path | None, typer.Option(help="The initial model as safetensors (default: drawn from the job's seed).")
    ] = None,
    start: Annotated[bool, typer.Option("--start/--draft", help="Start it, or leave it as a draft.")] = True,
    follow: Watch = False,
    as_json: Json = False,
) -> None:
    """Create a job, upload its initial model and start it."""
    spec = load_job(file)
    if model is None:
        require_drawable(spec)
    elif not model.is_file():
        raise typer.BadParameter(f"there is no file {model}")
    around = surroundings(ctx)

    def created(draft: JobView) -> None:
        if not as_json:
            around.note(f"Created {draft.name} as {draft.id}.")

    with connected(ctx, PATIENT if follow else None) as at:
        job = submit(at.client, spec, model, start=start, on_created=created)
        if follow and start:
            if not as_json:
                around.out.print(Text(str(job.id)))
            _follow(at, job.id, as_json)
        elif as_json:
            write_json(around, plain(job))
        else:
            around.out.print(job_text(job))


@app.command("list")
def list_all(
    ctx: typer.Context,
    state: Annotated[JobState | None, typer.Option(help="Only in this state.")] = None,
    as_json: Json = False,
) -> None:
    """All jobs that you may see."""
    with connected(ctx) as at:
        at.show_all(at.client.jobs.list(state=state), jobs_table, as_json)


@app.command()
def show(ctx: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """Where a job stands, who takes part, and what it waits for."""
    with connected(ctx) as at:
        job = at.client.jobs.get(job_id)
        participations = list(at.client.jobs.participations(job_id))
        current = at.client.jobs.round(job_id, job.current_round) if job.current_round is not None else None
        waits = waits_for(job, participations, current, at.around.now())
        if as_json:
            report: dict[str, Any] = {
                "job": plain(job),
                "participations": [plain(view) for view in participations],
                "round": plain(current) if current is not None else None,
                "waits_for": waits,
            }
            write_json(at.around, report)
        else:
            at.around.out.print(job_report(job, participations, current, waits))


@app.command("watch")
def watch_one(ctx: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """Follow a job to its end. With --json: a line for each event, and at last one for the job."""
    with connected(ctx, PATIENT) as at:
        _follow(at, job_id, as_json)


@app.command()
def privacy(
    ctx: typer.Context,
    job_id: JobId,
    page: Annotated[Path | None, typer.Option(help="Write the report as a page to read and to print, in HTML.")] = None,
    as_json: Json = False,
) -> None:
    """What a job promises about the records, what it has spent, and what it does not protect."""
    with connected(ctx) as at:
        if page is not None:
            page.write_text(at.client.jobs.privacy_page(job_id), encoding="utf-8")
            at.around.note(f"Wrote {page}.")
        else:
            at.show(at.client.jobs.privacy(job_id), report_text, as_json)


@app.command()
def start(ctx: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """Start a draft that has its model."""
    with connected(ctx) as at:
        at.show(at.client.jobs.start(job_id), job_text, as_json)


@app.command()
def pause(ctx: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """Open no further round."""
    with connected(ctx) as at:
        at.show(at.client.jobs.pause(job_id), job_text, as_json)


@app.command()
def resume(ctx: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """Go on after a pause."""
    with connected(ctx) as at:
        at.show(at.client.jobs.resume(job_id), job_text, as_json)


@app.command()
def cancel(
    ctx: typer.Context,
    job_id: JobId,
    note: Annotated[str | None, typer.Option(help="Why, for the record.")] = None,
    as_json: Json = False,
) -> None:
    """End a job for good."""
    body = CancelJob() if note is None else CancelJob(note=note)
    with connected(ctx) as at:
        at.show(at.client.jobs.cancel(job_id, body), job_text, as_json)


@app.command()
def metrics(
    ctx: typer.Context,
    job_id: JobId,
    sites: Annotated[bool, typer.Option("--sites", help="The newest round, site by site.")] = False,
    as_json: Json = False,
) -> None:
    """What each round measured."""
    with connected(ctx) as at:
        found = list(at.client.jobs.metrics(job_id))
        newest = last_with_sites(found) if sites else None
        if as_json:
            write_json(at.around, [plain(view) for view in found])
        elif newest is not None:
            at.around.out.print(sites_table(newest))
        else:
            at.around.out.print(metrics_table(found))


@app.command()
def events(
    ctx: typer.Context,
    job_id: JobId,
    after: Annotated[int, typer.Option(min=0, help="Only what came after this number.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for what comes.")] = False,
    as_json: Json = False,
) -> None:
    """The story of a job, event by event. With --json: a line for each."""
    with connected(ctx, PATIENT if follow else None) as at:
        for event in at.client.jobs.events(job_id, after=after, follow=follow):
            if as_json:
                write_json(at.around, plain(event))
            else:
                at.around.out.print(Text(f"{event.sequence:>5} {event_line(event)}"), soft_wrap=True)


@app.command()
def download(
    ctx: typer.Context,
    job_id: JobId,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it does not exist.")],
    after_round: Annotated[
        int | None, typer.Option("--round", min=0, help="The model after this round (default: the newest).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a job's model: model.safetensors, verified, and model.json, which tells what it is."""
    with connected(ctx) as at:
        job = at.client.jobs.get(job_id)
        digest = job.model_digest if after_round is None else _digest_after(at, job, after_round)
        if digest is None:
            raise NoSuch(f"The job {job.id} has no model yet.")
        directory.mkdir(parents=True, exist_ok=True)
        at.client.checkpoints.download(digest, directory / "model.safetensors")
        about: dict[str, Any] = {
            "job_id": str(job.id),
            "name": job.name,
            "state": job.state,
            "digest": digest,
            "rounds_completed": job.rounds_completed,
            "spec": plain(job.spec),
            "spec_digest": job.spec_digest,
            "manifest": plain(job.manifest) if job.manifest is not None else None,
            "statistics": plain(job.statistics) if job.statistics is not None else None,
            "metrics": [plain(view) for view in at.client.jobs.metrics(job_id)],
        }
        _write_whole(directory / "model.json", json.dumps(about, indent=2) + "\n")
        if as_json:
            files = {"model": str(directory / "model.safetensors"), "about": str(directory / "model.json")}
            write_json(at.around, {"digest": digest, **files})
        else:
            at.around.out.print(Text(printable(f"{directory / 'model.safetensors'}  sha256 {digest}")), soft_wrap=True)


def _digest_after(at: Session, job: JobView, number: int) -> str:
    for view in at.client.jobs.checkpoints(job.id):
        if view.round_number == number:
            return view.digest
    raise NoSuch(f"The job {job.id} has no model after round {number}.")


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{token_hex(4)}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _follow(at: Session, job_id: UUID, as_json: bool) -> None:
    try:
        code = watch(at, job_id, as_json=as_json)
    except KeyboardInterrupt:
        at.around.note(f"The job goes on. Look again with: isthmus job watch {job_id}")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except IsthmusError as error:
        error.add_note(f"The job goes on without us. Look again with: isthmus job watch {job_id}")
        raise
    if code is not ExitCode.OK:
        raise typer.Exit(code)
