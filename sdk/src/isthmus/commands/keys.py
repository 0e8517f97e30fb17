"""`isthmus key ...`"""

from typing import Annotated

import typer

from isthmus.commands.lookup import principal_id
from isthmus.commands.options import Json, duration_option
from isthmus.commands.rendering.keys import issued_text, key_text, keys_table
from isthmus.commands.session import connected
from isthmus.wire.organizations import CreateApiKey, RotateApiKey, Scope

app = typer.Typer(no_args_is_help=True, help="API keys. A secret is shown once, when it is made.")

Principal = Annotated[str | None, typer.Option(metavar="PRINCIPAL", help="Whose, by name or id (default: your own).")]
KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="The key's id, which is no secret.")]


@app.command()
def create(
    ctx: typer.Context,
    *,
    principal: Principal = None,
    label: Annotated[str, typer.Option(help="What the key is for.")] = "key",
    scope: Annotated[
        list[Scope] | None, typer.Option(help="What it may do; repeat it for more (default: all).")
    ] = None,
    expires_in: Annotated[int | None, duration_option("--expires-in", "How long it lives (default: for ever).")] = None,
    as_json: Json = False,
) -> None:
    """Issue a key."""
    with connected(ctx) as at:
        body = CreateApiKey(
            principal_id=principal_id(at.client, principal) if principal is not None else None,
            label=label,
            scopes=tuple(scope) if scope else None,
            expires_in_s=expires_in,
        )
        at.show(at.client.keys.create(body), issued_text, as_json)


@app.command("list")
def list_all(ctx: typer.Context, principal: Principal = None, as_json: Json = False) -> None:
    """Keys, without their secrets."""
    with connected(ctx) as at:
        whose = principal_id(at.client, principal) if principal is not None else None
        at.show_all(at.client.keys.list(principal_id=whose), keys_table, as_json)


@app.command()
def rotate(
    ctx: typer.Context,
    key_id: KeyId,
    overlap: Annotated[
        int | None, duration_option("--overlap", "How long the old key stays alive (default: 1d).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Issue a successor of a key; the old one stays alive for a while."""
    body = RotateApiKey() if overlap is None else RotateApiKey(overlap_s=overlap)
    with connected(ctx) as at:
        at.show(at.client.keys.rotate(key_id, body), issued_text, as_json)


@app.command()
def revoke(ctx: typer.Context, key_id: KeyId, as_json: Json = False) -> None:
    """End a key at once."""
    with connected(ctx) as at:
        at.show(at.client.keys.revoke(key_id), key_text, as_json)
