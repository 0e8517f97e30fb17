"""The only place where parts are put together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from app import coordinator, documentation, health, problems
from app.admin.router import router as admin
from app.audit.router import router as audit
from app.blobs import DirectoryBlobStore
from app.credentials import load_signer
from app.database import AdvisoryLocks, open_engine, open_sessions, open_single_statements
from app.datasets.router import router as datasets
from app.dependencies import Parts
from app.jobs.router import router as jobs
from app.ledger.router import router as ledger
from app.meters import Meters
from app.middleware import BodyLimit, Observation, SecureHeaders
from app.organizations.router import router as organizations
from app.participations.router import router as participations
from app.queue import open_queue
from app.rounds.router import router as rounds
from app.settings import Settings
from app.wakeups import Wakeups
from app.workers.router import router as workers
from isthmus.wire.version import API_PREFIX


@contextlib.asynccontextmanager
async def open_parts(settings: Settings, meters: Meters | None = None) -> AsyncIterator[Parts]:
    """Everything that the service, or a coordinator on its own, works with; closed in reverse on leaving."""
    url = settings.resolved_database_url()
    direct = settings.direct_url()
    engine = open_engine(
        url, connections=settings.database_connections, pooled=settings.database_direct_url is not None
    )
    sessions = open_sessions(engine)
    single_statements = open_single_statements(engine)
    signer = load_signer(
        settings.signing_key_file or settings.data_dir / "signing-key.pem",
        create=settings.environment == "development",
    )
    queue = open_queue(direct)
    try:
        async with queue.open_async(), AdvisoryLocks(direct) as locks:
            yield Parts(
                settings=settings,
                sessions=sessions,
                single_statements=single_statements,
                locks=locks,
                blobs=DirectoryBlobStore(settings.data_dir / "blobs"),
                signer=signer,
                wakeups=Wakeups(direct),
                queue=queue,
                meters=meters or Meters(),
            )
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def running(task: asyncio.Task[None]) -> AsyncIterator[None]:
    """A task that is cancelled, and waited for, on leaving."""
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def create_app(settings: Settings) -> FastAPI:
    """The service, ready to be served."""
    meters = Meters()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            parts = await stack.enter_async_context(open_parts(settings, meters))
            app.state.parts = parts
            await stack.enter_async_context(running(asyncio.create_task(parts.wakeups.run())))
            if settings.coordinate:
                await stack.enter_async_context(coordinator.coordinating(parts))
            yield

    app = FastAPI(
        lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False, **documentation.description()
    )
    app.add_middleware(BodyLimit, limit=settings.max_json_bytes)
    app.add_middleware(SecureHeaders)
    app.add_middleware(Observation, meters=meters)
    problems.install(app)
    documentation.install(app)
    app.include_router(health.router)
    for router in (
        rounds,
        jobs,
        organizations,
        admin,
        workers,
        datasets,
        ledger,
        participations,
        audit,
    ):  # busiest first
        app.include_router(router, prefix=API_PREFIX)
    return app
