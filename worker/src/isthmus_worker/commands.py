"""The command line `isthmus-worker`, for people. Its `run` is only described here; see `isthmus_worker.__main__`."""

import json
import re
import socket
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from isthmus.client import IsthmusError
from isthmus.wire.workers import EnrollWorker
from isthmus_worker import VERSION
from isthmus_worker.agent import CONFIG_VARIABLE, DEFAULT_CONFIG, MISCONFIGURED
from isthmus_worker.agent import run as work
from isthmus_worker.connect import connect
from isthmus_worker.journal import Journal
from isthmus_worker.settings import EXAMPLE, Settings, SettingsRefused, read_settings
from isthmus_worker.state import Credentials, NotEnrolled, StateDir

app = typer.Typer(
    help="The agent beside an organization's data.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)

Config = Annotated[Path, typer.Option("--config", "-c", help="The worker's TOML file.", envvar=CONFIG_VARIABLE)]


@app.command()
def enroll(
    token: Annotated[
        str | None,
        typer.Option(help="The one-time token from your steward; --token-file keeps it out of the process list."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="A file that holds the token, or - for standard input.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The service; by default the configuration's service_url.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call this worker; by default the machine's name.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Replace key and credentials; the journal and the hold-out key stay.")
    ] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Introduce this worker to the service, once. Its keys go to the state directory, for its owner's eyes only."""
    settings = _settings(config)
    if url is not None:
        settings = settings.model_copy(update={"service_url": url})
    if (token is None) == (token_file is None):
        _give_up("Give the token either by --token-file or by --token.")
    secret = token if token is not None else _text_of(token_file)
    state = StateDir.open(settings.state_dir)
    if state.is_enrolled() and not again:
        _give_up(
            f"{state.root}: this worker is enrolled already, as {state.credentials().worker}. "
            "With a new token, --again enrols it anew and keeps its journal."
        )
    identity = state.renew_identity() if again else state.identity()
    public_key = identity.public_key().public_bytes_raw().hex()
    try:
        body = EnrollWorker(token=secret.strip(), name=name or _machine_name(), public_key=public_key, version=VERSION)
        with connect(settings, None) as client:
            found = client.workers.enroll(body)
    except (IsthmusError, ValueError) as error:
        _give_up(str(error))
    state.keep_credentials(
        Credentials(
            service_url=settings.service_url,
            worker_id=str(found.worker.id),
            worker=found.worker.name,
            organization=found.worker.organization,
            api_key=found.api_key,
            service_public_key=found.service_public_key,
        )
    )
    typer.echo(
        f"Enrolled as {found.worker.name} of {found.worker.organization}. Next: isthmus-worker preflight, then run."
    )


@app.command()
def run(
    config: Config = DEFAULT_CONFIG,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Work until stopped (SIGTERM or Ctrl-C)."""
    sys.exit(work(config, log_level))


@app.command()
def status(
    config: Config = DEFAULT_CONFIG, as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False
) -> None:
    """What the state directory tells: who we are, what was released, and when the service last answered."""
    settings = _settings(config)
    found = _status(settings, StateDir(settings.state_dir))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    who = found["enrolled"]
    typer.echo(
        f"worker        {who['worker']} of {who['organization']}, at {who['service_url']}"
        if who
        else "worker        not enrolled"
    )
    typer.echo(f"datasets      {', '.join(found['datasets'])}")
    typer.echo("releases      " + ", ".join(f"{number} {state}" for state, number in found["releases"].items()))
    typer.echo(f"results       {found['results']} measurements kept here")
    typer.echo(f"last contact  {found['last_contact'] or 'never'}")


@app.command()
def results(
    config: Config = DEFAULT_CONFIG,
    job: Annotated[str | None, typer.Option(help="Only those of this job.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What was measured at this site, whether or not it was released."""
    state = StateDir(_settings(config).state_dir)
    found: list[dict[str, Any]] = []
    if state.journal.exists():
        journal = Journal.look_into(state)
        found = journal.results(job)
        journal.close()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for one in found:
        measures = "  ".join(f"{name} {value:.4g}" for name, value in one["metrics"].items())
        typer.echo(f"{one['job']}  {one['dataset']}  round {one['round_number']} ({one['kind']})  {measures}")


@app.command()
def preflight(config: Config = DEFAULT_CONFIG) -> None:
    """Look whether this machine is ready: configuration, data, memory, torch, the service, the key."""
    from isthmus_worker.preflight import look  # noqa: PLC0415 - only this command needs it

    ready = True
    for finding in look(config):
        typer.echo(str(finding))
        ready = ready and finding.ok is not False
    raise typer.Exit(0 if ready else 1)


@app.command("example-config")
def example_config() -> None:
    """Print a configuration to start from."""
    typer.echo(EXAMPLE, nl=False)


def _status(settings: Settings, state: StateDir) -> dict[str, Any]:
    try:
        who = state.credentials()
    except NotEnrolled:
        who = None
    counts, spends, measured = dict[str, int](), list[dict[str, Any]](), 0
    if state.journal.exists():
        try:
            journal = Journal.look_into(state)
            counts, spends, measured = journal.counts(), journal.spends(), len(journal.results())
            journal.close()
        except sqlite3.OperationalError as error:
            _give_up(f"{state.journal}: {error}")
    contact = state.last_contact
    at = (
        datetime.fromtimestamp(contact.stat().st_mtime, UTC).isoformat(timespec="seconds") if contact.exists() else None
    )
    return {
        "enrolled": who.model_dump(exclude={"api_key"}) if who is not None else None,
        "datasets": [dataset.name for dataset in settings.datasets],
        "releases": counts,
        "spends": spends,
        "results": measured,
        "last_contact": at,
    }


def _settings(config: Path) -> Settings:
    try:
        return read_settings(config)
    except SettingsRefused as error:
        _give_up(str(error))


def _text_of(path: Path | None) -> str:
    if path is None or str(path) == "-":
        return sys.stdin.read()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        _give_up(f"{path}: cannot be read ({error.strerror})")


def _machine_name() -> str:
    return re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")[:63] or "worker"


def _give_up(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(MISCONFIGURED)
