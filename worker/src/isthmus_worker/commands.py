"""The command line `isthmus-worker`, for people. Its `run` is only described here; see `isthmus_worker.__main__`."""

import json
import re
import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from isthmus.client import IsthmusError
from isthmus.wire.datasets import Budget
from isthmus.wire.workers import EnrollWorker
from isthmus_worker import VERSION
from isthmus_worker.agent import CONFIG_VARIABLE, DEFAULT_CONFIG, MISCONFIGURED
from isthmus_worker.agent import run as work
from isthmus_worker.connect import connect
from isthmus_worker.files import write_durably
from isthmus_worker.handover import HandoverRefused, give, receive
from isthmus_worker.journal import Journal
from isthmus_worker.ledger import LedgerDamaged
from isthmus_worker.secured.peers import SCHEMA as PEERS_SCHEMA
from isthmus_worker.secured.peers import Peer, Peers
from isthmus_worker.settings import EXAMPLE, Settings, SettingsRefused, read_settings
from isthmus_worker.showing import in_words, lines, show_ledger, show_results, standing
from isthmus_worker.state import Credentials, NotEnrolled, StateDir, StateInUse

app = typer.Typer(
    help="The agent beside an organization's data.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
datasets = typer.Typer(help="Hand datasets on to other workers.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(datasets, name="dataset")
peers = typer.Typer(
    help="Keys of other organizations, for secure aggregation.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(peers, name="peers")

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
    """What the state directory tells: who we are, what was released and spent, and when the service last answered."""
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
    typer.echo(f"public key    {found['public_key'] or 'none yet'}")
    for dataset in found["datasets"]:
        typer.echo(f"dataset       {dataset['name']}: {in_words(dataset)}")
    typer.echo("releases      " + ", ".join(f"{number} {state}" for state, number in found["releases"].items()))
    typer.echo(f"results       {found['results']} measurements kept here")
    typer.echo(f"last contact  {found['last_contact'] or 'never'}")


@app.command()
def ledger(
    dataset: Annotated[str | None, typer.Argument(help="Only this dataset's.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="For machines; with the costs at all orders.")] = False,
) -> None:
    """What left of each dataset, release by release, and what it has cost of its budget."""
    settings = _settings(config)
    names = [one.name for one in settings.datasets] if dataset is None else [dataset]
    with _journal(settings) as journal:
        found = [
            {**standing(journal, name, _budget(settings, name)), "entries": lines(journal, name)} for name in names
        ]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for one in found:
        show_ledger(one)


@app.command()
def results(
    job: Annotated[str | None, typer.Argument(help="Only those of this job, by its name or id.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What was measured at this site, by job, dataset and round, whether or not it was released."""
    settings = _settings(config)
    found: list[dict[str, Any]] = []
    if StateDir(settings.state_dir).journal.exists():
        with _journal(settings) as journal:
            found = journal.results(job)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif not found:
        typer.echo("Nothing was measured here yet." if job is None else f"Nothing was measured here for job {job!r}.")
    else:
        show_results(found)


@datasets.command("move")
def move(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset.")],
    to: Annotated[str, typer.Option(help="Public key of the worker that takes it over: its `status` shows it.")],
    output: Annotated[Path, typer.Option(help="Where to write the document that the other worker needs.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Hand a dataset on to another worker with its ledger. This worker serves it no more; stop its agent before.

    The document holds hashes of records and the key of the hold-out split: bring it to the other worker by a way that
    only the two administrators can read, and delete it then.
    """
    settings = _settings(config)
    state = StateDir.open(settings.state_dir)
    try:
        organization = state.credentials().organization
        with state.locked(), closing(Journal.open(state)) as journal:
            found = give(
                journal,
                state.identity(),
                organization,
                dataset,
                taker=to.strip().lower(),
                holdout_key=state.holdout_key().hex(),
                configured=[one.name for one in settings.datasets],
            )
        write_durably(output, found.model_dump_json(indent=2).encode())
    except (HandoverRefused, LedgerDamaged, NotEnrolled, StateInUse) as error:
        _give_up(str(error))
    except OSError as error:
        _give_up(f"{output}: cannot be written ({error.strerror}). Run the same command again with another --output.")
    typer.echo(
        f"{dataset} is handed on, with {len(found.document.entries) - 1} releases in its ledger; this worker serves it "
        f"no more. On the other worker: isthmus-worker dataset receive {output} --from {found.document.giver}"
    )


@datasets.command("receive")
def receive_dataset(
    document: Annotated[Path, typer.Argument(help="What `dataset move` wrote on the other worker.")],
    giver: Annotated[str, typer.Option("--from", help="Public key of the worker that hands it on.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Take a dataset over from another worker with its ledger. Stop this worker's agent before, start it afterwards."""
    settings = _settings(config)
    state = StateDir.open(settings.state_dir)
    try:
        organization = state.credentials().organization
        with state.locked(), closing(Journal.open(state)) as journal:
            found = receive(journal, state.identity(), organization, document.read_bytes(), giver=giver.strip().lower())
    except (HandoverRefused, LedgerDamaged, NotEnrolled, StateInUse) as error:
        _give_up(str(error))
    except OSError as error:
        _give_up(f"{document}: cannot be read ({error.strerror})")
    more = "" if settings.dataset(found.dataset) else f" Add a dataset {found.dataset!r} to the configuration first."
    typer.echo(
        f"{found.dataset} is taken over, with {len(found.entries) - 1} releases in its ledger.{more} "
        "The service moves it when this agent starts."
    )


@peers.command("list")
def list_peers(
    config: Config = DEFAULT_CONFIG, as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False
) -> None:
    """This worker's own fingerprint, and those of the organizations that it has met or that were trusted here."""
    settings = _settings(config)
    state, known = StateDir(settings.state_dir), list[Peer]()
    if state.journal.exists():
        with _journal(settings) as journal:
            known = journal.peers.all()
    if as_json:
        plain = {"own": state.public_key(), "peers": [asdict(peer) for peer in known]}
        typer.echo(json.dumps(plain, indent=2))
        return
    typer.echo(f"own           {state.public_key() or 'none yet'}")
    for peer in known:
        how = "trusted" if peer.trusted else "first seen"
        typer.echo(f"{peer.organization:<13} {peer.public_key} ({how} {peer.since[:10]})")
    if not known:
        typer.echo("No other organization was met yet.")


@peers.command("trust")
def trust_peer(
    organization: Annotated[str, typer.Argument(help="Name of the organization.")],
    fingerprint: Annotated[str, typer.Argument(help="What `peers list` shows as its worker's own.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Let an organization's key pass. Ask them for it by another way than the service.

    Keys that were trusted before pass as well; one that was only pinned at first sight passes no more. The agent may
    run meanwhile.
    """
    with _changing_peers(config) as known:
        try:
            known.trust(organization, fingerprint)
        except ValueError as error:
            _give_up(f"{error}.")
    typer.echo(f"{organization} may be in a round with this key.")


@peers.command("forget")
def forget_peer(
    organization: Annotated[str, typer.Argument(help="Name of the organization.")], config: Config = DEFAULT_CONFIG
) -> None:
    """Forget all keys of an organization: the next one that is seen is pinned. The agent may run meanwhile."""
    with _changing_peers(config) as known:
        gone = known.forget(organization)
    if not gone:
        _give_up(
            f"This worker knows no key of {organization!r}. `isthmus-worker peers list` shows those that it knows."
        )
    typer.echo(f"{organization} is forgotten; the next key that is seen of it is pinned.")


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
    held: list[dict[str, Any]] = [{"name": dataset.name} for dataset in settings.datasets]
    if state.journal.exists():
        with _journal(settings) as journal:
            counts, spends, measured = journal.counts(), journal.spends(), len(journal.results())
            held = [standing(journal, dataset.name, dataset.budget) for dataset in settings.datasets]
    contact = state.last_contact
    at = (
        datetime.fromtimestamp(contact.stat().st_mtime, UTC).isoformat(timespec="seconds") if contact.exists() else None
    )
    return {
        "enrolled": who.model_dump(exclude={"api_key"}) if who is not None else None,
        "public_key": state.public_key(),
        "datasets": held,
        "releases": counts,
        "spends": spends,
        "results": measured,
        "last_contact": at,
    }


@contextmanager
def _journal(settings: Settings) -> Iterator[Journal]:
    """The journal, to be read only; an agent may be working with it."""
    state = StateDir(settings.state_dir)
    try:
        with closing(Journal.look_into(state)) as journal:
            yield journal
    except sqlite3.OperationalError as error:
        _give_up(f"{state.journal}: {error}. It is made, or brought up to date, when the agent starts.")


@contextmanager
def _changing_peers(config: Path) -> Iterator[Peers]:
    """The pinned keys, to be changed while an agent may be working."""
    journal = StateDir(_settings(config).state_dir).journal
    if not journal.exists():
        _give_up(f"{journal} is not there yet. It is made when the agent starts for the first time.")
    try:
        with closing(sqlite3.connect(journal, isolation_level=None)) as connection:
            connection.executescript(PEERS_SCHEMA)
            yield Peers(connection)
    except sqlite3.OperationalError as error:
        _give_up(f"{journal}: {error}. Try again.")


def _budget(settings: Settings, name: str) -> Budget | None:
    dataset = settings.dataset(name)
    return dataset.budget if dataset is not None else None


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
