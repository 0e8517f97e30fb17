"""`isthmus principal ...`"""

from typing import Annotated

import typer

from isthmus.commands.lookup import organization_id, principal_id
from isthmus.commands.options import Json
from isthmus.commands.rendering.keys import issued_text
from isthmus.commands.rendering.principals import principal_text, principals_table
from isthmus.commands.session import connected, plain, write_json
from isthmus.wire.organizations import CreateApiKey, CreatePrincipal, Role

app = typer.Typer(no_args_is_help=True, help="Principals: those who hold API keys.")


@app.command()
def create(
    ctx: typer.Context,
    *,
    name: Annotated[str, typer.Argument(help="A short name, as ada.")],
    role: Annotated[Role, typer.Option(help="Workers are not created here: they enrol with a token.")],
    organization: Annotated[
        str | None, typer.Option(metavar="ORG", help="A steward's organization, by name or id.")
    ] = None,
    display_name: Annotated[str | None, typer.Option(help="The name for people (default: the short one).")] = None,
    key: Annotated[bool, typer.Option("--key", help="Issue a first API key too. It is shown only here.")] = False,
    as_json: Json = False,
) -> None:
    """Create an admin, a researcher or a steward."""
    with connected(ctx) as at:
        home = organization_id(at.client, organization) if organization is not None else None
        body = CreatePrincipal(name=name, display_name=display_name or name, role=role, organization_id=home)
        principal = at.client.principals.create(body)
        issued = at.client.keys.create(CreateApiKey(principal_id=principal.id)) if key else None
        if as_json:
            write_json(at.around, {"principal": plain(principal), "key": plain(issued) if issued else None})
            return
        at.around.out.print(principal_text(principal))
        if issued is not None:
            at.around.out.print(issued_text(issued))


@app.command("list")
def list_all(ctx: typer.Context, as_json: Json = False) -> None:
    """All principals."""
    with connected(ctx) as at:
        at.show_all(at.client.principals.list(), principals_table, as_json)


@app.command()
def disable(
    ctx: typer.Context,
    principal: Annotated[str, typer.Argument(metavar="PRINCIPAL", help="A name or id.")],
    as_json: Json = False,
) -> None:
    """Shut a principal out, with all keys."""
    with connected(ctx) as at:
        at.show(at.client.principals.disable(principal_id(at.client, principal)), principal_text, as_json)
