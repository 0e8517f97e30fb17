"""`isthmus worker ...`"""

from typing import Annotated

import typer

from isthmus.commands.lookup import worker_id
from isthmus.commands.options import Json
from isthmus.commands.rendering.workers import worker_text, workers_table
from isthmus.commands.session import connected

app = typer.Typer(no_args_is_help=True, help="Workers: the agents beside the organizations' data.")

Reference = Annotated[str, typer.Argument(metavar="WORKER", help="Its name, organization/name or id.")]


@app.command("list")
def list_all(ctx: typer.Context, as_json: Json = False) -> None:
    """All workers that you may see."""
    with connected(ctx) as at:
        now = at.around.now()
        at.show_all(at.client.workers.list(), lambda views: workers_table(views, now), as_json)


@app.command()
def show(ctx: typer.Context, worker: Reference, as_json: Json = False) -> None:
    """One worker."""
    with connected(ctx) as at:
        at.show(at.client.workers.get(worker_id(at.client, worker)), worker_text, as_json)


@app.command()
def revoke(ctx: typer.Context, worker: Reference, as_json: Json = False) -> None:
    """Shut a worker out."""
    with connected(ctx) as at:
        at.show(at.client.workers.revoke(worker_id(at.client, worker)), worker_text, as_json)
