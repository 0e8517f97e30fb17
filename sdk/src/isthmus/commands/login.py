"""`isthmus login`, `logout` and `whoami`."""

import sys
from typing import Annotated

import typer

from isthmus.commands.credentials import Credentials, credentials_file, read_profiles, write_profiles
from isthmus.commands.options import Json
from isthmus.commands.rendering.principals import me_text
from isthmus.commands.session import connected, plain, surroundings, write_json

Profile = Annotated[str | None, typer.Option(help="The name to keep the login under.")]


def log_in(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Argument(help="Where the service is (default: ISTHMUS_URL).")] = None,
    key: Annotated[
        str | None, typer.Option(help="The API key. Better left out: it is then asked for, or read from stdin.")
    ] = None,
    profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Check an API key with the service and keep it for the commands to come."""
    around = surroundings(ctx)
    address = url or around.environ.get("ISTHMUS_URL")
    if not address:
        raise typer.BadParameter("say where the service is: isthmus login URL")
    secret = (key or around.environ.get("ISTHMUS_API_KEY") or _ask()).strip()
    if not secret:
        raise typer.BadParameter("no API key was given")
    with around.connect(address, secret) as client:
        me = client.me()
        stored = Credentials(client.base_url, secret)
    path = credentials_file(around.environ)
    name = profile or around.profile
    write_profiles(path, {**read_profiles(path), name: stored})
    if stored.url.startswith("http://") and "//localhost" not in stored.url and "//127." not in stored.url:
        around.note(
            "This address is plain http: whoever is on the way can read the key. Use https outside of a laptop."
        )
    if as_json:
        write_json(around, {"profile": name, "url": stored.url, "me": plain(me)})
    else:
        around.out.print(me_text(me, stored.url))


def log_out(ctx: typer.Context, profile: Profile = None, as_json: Json = False) -> None:
    """Forget a login. The key itself stays valid: `isthmus key revoke` ends it."""
    around = surroundings(ctx)
    path = credentials_file(around.environ)
    name = profile or around.profile
    profiles = read_profiles(path)
    known = profiles.pop(name, None) is not None
    if known:
        write_profiles(path, profiles)
    if as_json:
        write_json(around, {"profile": name, "forgotten": known})
    else:
        around.note(f"The login {name!r} is forgotten." if known else f"There was no login {name!r}.")


def who_am_i(ctx: typer.Context, as_json: Json = False) -> None:
    """Who the service takes you for, and what your key may do."""
    with connected(ctx) as at:
        at.show(at.client.me(), lambda me: me_text(me, at.client.base_url), as_json)


def _ask() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    answer: str = typer.prompt("API key", hide_input=True, err=True)
    return answer
