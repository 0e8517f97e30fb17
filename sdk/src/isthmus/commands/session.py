"""What a command runs in: the environment, the terminal, the service."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import httpx
import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.text import Text

from isthmus.client import Client, Retries
from isthmus.commands.credentials import current
from isthmus.commands.rendering.text import printable

View = TypeVar("View", bound=BaseModel)

AT_ONCE: Final = Retries(attempts=3, total_s=10.0)
"""Somebody is waiting at the terminal."""
PATIENT: Final = Retries(attempts=10, total_s=300.0)
"""For following a job over restarts of the service."""


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr,
        highlight=False,
        markup=False,
        emoji=False,
        width=None if stream.isatty() else 200,
        soft_wrap=False,
    )


@dataclass
class Surroundings:
    """Environment and terminal of one command line. `transport` stands in for the network in tests."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    transport: httpx.BaseTransport | None = None
    out: Console = field(default_factory=lambda: _console(stderr=False))
    err: Console = field(default_factory=lambda: _console(stderr=True))
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    profile: str = "default"

    def complain(self, sentence: str, hint: str | None = None) -> None:
        """An error, on stderr."""
        self.err.print(Text.assemble(("Error: ", "bold red"), printable(sentence)), soft_wrap=True)
        if hint is not None:
            self.err.print(Text(printable(hint)), soft_wrap=True)

    def note(self, sentence: str) -> None:
        """Something worth knowing, on stderr."""
        self.err.print(Text(printable(sentence)), soft_wrap=True)

    def connect(self, url: str, key: str | None, retries: Retries = AT_ONCE) -> Client:
        """A client; the caller closes it."""
        try:
            return Client(url, key, retries=retries, transport=self.transport)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True)
class Session:
    """A command that is logged in."""

    client: Client
    around: Surroundings

    def show(self, view: BaseModel, render: Callable[[Any], RenderableType], as_json: bool) -> None:
        """One thing, for people or for machines."""
        if as_json:
            write_json(self.around, plain(view))
        else:
            self.around.out.print(render(view))

    def show_all(self, views: Iterable[View], render: Callable[[list[View]], RenderableType], as_json: bool) -> None:
        """Many things: a table, or a JSON array."""
        listed = list(views)
        if as_json:
            write_json(self.around, [plain(view) for view in listed])
        else:
            self.around.out.print(render(listed))


@contextmanager
def connected(ctx: typer.Context, retries: Retries | None = None) -> Iterator[Session]:
    """The session that the environment or the profile names."""
    around = surroundings(ctx)
    credentials = current(around.environ, around.profile)
    with around.connect(credentials.url, credentials.key, retries or AT_ONCE) as client:
        yield Session(client, around)


def surroundings(ctx: typer.Context) -> Surroundings:
    """What `run` was given."""
    found = ctx.find_object(Surroundings)
    assert found is not None
    return found


def plain(view: BaseModel) -> Any:
    """A model of the contract as JSON values."""
    return view.model_dump(mode="json", by_alias=True)


def write_json(around: Surroundings, value: Any) -> None:
    """One line of JSON on stdout, whole at once: nothing else is written there."""
    around.out.file.write(json.dumps(value, ensure_ascii=True) + "\n")
    around.out.file.flush()
