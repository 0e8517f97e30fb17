"""`isthmus org ...`"""

from typing import Annotated

import typer

from isthmus.commands.lookup import organization_id
from isthmus.commands.options import Json, duration_option
from isthmus.commands.rendering.organizations import organization_text, organizations_table, token_text
from isthmus.commands.session import connected
from isthmus.wire.organizations import CreateEnrollmentToken, CreateOrganization

app = typer.Typer(no_args_is_help=True, help="Organizations: those who hold data.")

Reference = Annotated[str, typer.Argument(metavar="ORG", help="Its name or id.")]


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="A short name for addresses, as charite.")],
    display_name: Annotated[str | None, typer.Option(help="Its name for people (default: the short one).")] = None,
    as_json: Json = False,
) -> None:
    """Admit an organization to the platform."""
    body = CreateOrganization(name=name, display_name=display_name or name)
    with connected(ctx) as at:
        at.show(at.client.organizations.create(body), organization_text, as_json)


@app.command("list")
def list_all(ctx: typer.Context, as_json: Json = False) -> None:
    """All organizations."""
    with connected(ctx) as at:
        at.show_all(at.client.organizations.list(), organizations_table, as_json)


@app.command()
def show(ctx: typer.Context, organization: Reference, as_json: Json = False) -> None:
    """One organization."""
    with connected(ctx) as at:
        found = at.client.organizations.get(organization_id(at.client, organization))
        at.show(found, organization_text, as_json)


@app.command("enrollment-token")
def enrollment_token(
    ctx: typer.Context,
    organization: Annotated[
        str | None, typer.Argument(metavar="[ORG]", help="Its name or id (default: your own).")
    ] = None,
    expires_in: Annotated[int | None, duration_option("--expires-in", "How long it is good for (default: 1h).")] = None,
    as_json: Json = False,
) -> None:
    """Issue a token with which one worker can enrol, once. It is shown only here."""
    body = CreateEnrollmentToken() if expires_in is None else CreateEnrollmentToken(expires_in_s=expires_in)
    with connected(ctx) as at:
        issued = at.client.organizations.issue_enrollment_token(organization_id(at.client, organization), body)
        at.show(issued, token_text, as_json)
