"""The tree of commands."""

from typing import Annotated

import typer

from isthmus import __version__
from isthmus.commands import datasets, jobs, keys, login, organizations, participations, principals, privacy, workers
from isthmus.commands.extensions import ExtensibleGroup
from isthmus.commands.session import surroundings

app = typer.Typer(
    name="isthmus",
    cls=ExtensibleGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they print local variables, and some of those are keys
    help="Federated training between organizations: data stays, the model moves.",
    epilog="Exit codes: 0 ok, 1 unexpected, 2 usage, 3 refused, 4 not found, 5 no valid key or not allowed, "
    "6 unreachable, 7 the watched job failed or was cancelled, 130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"isthmus {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    profile: Annotated[
        str | None, typer.Option(help="Which login to use (default: ISTHMUS_PROFILE, or 'default').")
    ] = None,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Federated training between organizations: data stays, the model moves.

    ISTHMUS_URL and ISTHMUS_API_KEY take the place of a login.
    """
    del version
    around = surroundings(ctx)
    around.profile = profile or around.environ.get("ISTHMUS_PROFILE") or "default"


app.command("login")(login.log_in)
app.command("logout")(login.log_out)
app.command("whoami")(login.who_am_i)
app.add_typer(organizations.app, name="org")
app.add_typer(principals.app, name="principal")
app.add_typer(keys.app, name="key")
app.add_typer(workers.app, name="worker")
app.add_typer(datasets.app, name="dataset")
app.add_typer(participations.app, name="participation")
app.add_typer(jobs.app, name="job")
app.add_typer(privacy.app, name="privacy")
