"""isthmus-server: serve, coordinate, migrate, and the first admin's key."""

# ruff: noqa: E402 -- the collector has to be told before the imports
import gc

# What the imports make stays for good. Looking through it again and again would take a quarter of the time that a
# restarted service needs until it serves; later collections leave it out as well.
gc.disable()

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import structlog
import typer
import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from app.admin.service import create_first_admin
from app.allocator import keep_buffers
from app.coordinator import coordinating
from app.database import migrate as migrate_database
from app.database import open_engine, open_sessions
from app.dependencies import Parts
from app.errors import PlatformError
from app.garbage import collect_seldom
from app.main import create_app, open_parts
from app.settings import Settings
from isthmus.interruption import Interrupted, Interruption

gc.freeze()
gc.enable()

cli = typer.Typer(
    help="The Isthmus service.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _settings() -> Settings:
    known = {f"ISTHMUS_{name}".upper() for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.upper().startswith("ISTHMUS_") and name.upper() not in known:
            print(f"isthmus-server: {name} is none of our settings and is ignored.", file=sys.stderr)
    try:
        return Settings()
    except ValidationError as error:
        for item in error.errors():
            name = "_".join(str(part) for part in item["loc"])
            variable = f"ISTHMUS_{name.upper()}: " if name else ""
            print(f"isthmus-server: {variable}{item['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _with_database(settings: Settings) -> Iterator[Settings]:
    """The settings with a database: the one that is named, or an embedded Postgres for as long as the block lasts."""
    if settings.database_url is not None:
        yield settings
        return
    from app.embedded_postgres import embedded_postgres  # noqa: PLC0415 -- only a laptop has its binaries

    directory = (settings.data_dir / "postgres").absolute()
    try:
        with (
            # SIGTERM ends us through every `with`, so that this Postgres is stopped and not left behind. Uvicorn has
            # handlers of its own while it serves; then it puts ours back and raises the signal again.
            Interruption(signal.SIGTERM),
            embedded_postgres(directory, environment=settings.environment) as url,
        ):
            yield settings.model_copy(update={"database_url": url})
    except Interrupted:
        raise SystemExit(0) from None


def _allow_many_connections() -> None:
    """Raise the soft limit of open files to the hard one: every worker that waits here holds a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS calls the hard limit infinite and refuses it
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _configure_log() -> None:
    pretty = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(
                exception_formatter=structlog.dev.plain_traceback
            )  # the rich one tells values
            if pretty
            else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


class _Server(uvicorn.Server):
    """Uvicorn, but when it is told to end, long polls and event streams do not make it wait."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app
        self._collecting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start up as ever; from then on nobody who waits here stands still for the garbage of others."""
        await super().startup(sockets)
        self._collecting = asyncio.create_task(collect_seldom())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Send those who wait to another process, then shut down as ever."""
        parts: Parts = self._app.state.parts
        parts.wakeups.close()
        if self._collecting is not None:
            self._collecting.cancel()
        await super().shutdown(sockets)


@cli.command()
def serve(
    migrate: Annotated[bool, typer.Option(help="Bring the database's schema up to date first.")] = True,
) -> None:
    """Serve the API, and coordinate rounds unless ISTHMUS_COORDINATE=false."""
    _configure_log()
    keep_buffers()
    with _with_database(_settings()) as settings:
        if migrate:
            migrate_database(settings.direct_url())
        _first_admin_for_development(settings)
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here asks where a request comes from
            timeout_graceful_shutdown=5,
            timeout_keep_alive=75,
            backlog=4096,  # a fleet comes back at once after a restart
        )
        _Server(config, app).run()


@cli.command()
def coordinate() -> None:
    """Open, close and aggregate rounds, without serving the API; on as many machines as wanted."""
    _configure_log()
    keep_buffers()

    async def run(settings: Settings) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with open_parts(settings) as parts, coordinating(parts):
            await stop.wait()

    with _with_database(_settings()) as settings:
        asyncio.run(run(settings))


@cli.command()
def migrate(revision: Annotated[str, typer.Argument(help="The revision to go to.")] = "head") -> None:
    """Bring the database's schema up to date."""
    with _with_database(_settings()) as settings:
        migrate_database(settings.direct_url(), revision)


@cli.command("create-admin")
def create_admin(
    name: Annotated[str, typer.Argument(help="The admin's name.")] = "admin",
) -> None:
    """Create an admin of the platform and print its API key, once. The way into an empty service."""
    with _with_database(_settings()) as settings:
        try:
            print(asyncio.run(_create_admin(settings, name)))
        except PlatformError as refusal:
            print(f"isthmus-server: {refusal.detail}", file=sys.stderr)
            raise typer.Exit(1) from None


async def _create_admin(settings: Settings, name: str) -> str:
    engine = open_engine(settings.resolved_database_url(), connections=2)
    try:
        async with open_sessions(engine).begin() as session:
            return (await create_first_admin(session, name=name)).shown
    finally:
        await engine.dispose()


def _first_admin_for_development(settings: Settings) -> None:
    """On a laptop the first start leaves the admin's key in the data directory, for its owner's eyes alone."""
    file: Path = settings.data_dir / "admin.key"
    if settings.environment == "production" or file.exists():
        return
    try:
        key = asyncio.run(_create_admin(settings, "admin"))
    except PlatformError:  # somebody holds a key already; the file was moved away
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(key + "\n")
    print(f"isthmus-server: the admin's API key is in {file}", file=sys.stderr)


def main() -> None:
    """Entry point of the command `isthmus-server`."""
    cli()


if __name__ == "__main__":
    main()
