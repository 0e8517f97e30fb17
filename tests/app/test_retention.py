"""What nobody refers to is deleted once it is old; what a row names stays."""

import os
import time
from datetime import timedelta

from anyio.from_thread import start_blocking_portal

from app.blobs import DirectoryBlobStore
from app.database import open_engine, open_sessions
from app.retention import collect_orphans
from tests.federation import Federation, filled, job_spec


def test_orphans_go_and_what_a_row_names_stays(federation: Federation) -> None:
    job = federation.start(job_spec(strategy="fedavgm"))
    for site in federation.sites:
        site.hand_in(site.claim(), filled(1.0))
    federation.finish(job)
    root = federation.folder / "data" / "blobs"
    kept = [path for path in federation.blobs() if path.parent.name != "drafts"]
    assert len(kept) == 3 + 2 + 1, "three updates, two checkpoints, one state of the strategy"
    orphans = [root / "updates" / "gone" / "ab12", root / "checkpoints" / "ff" / ("f" * 64), root / "drafts" / "cd34"]
    young = root / "updates" / "young" / "ab12"
    for path in (*orphans, young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"left behind")
    for path in (*kept, *orphans):
        os.utime(path, (time.time() - 90_000, time.time() - 90_000))

    assert _collect(federation) == 2

    assert not any(path.exists() for path in orphans)
    assert young.exists()
    assert all(path.exists() for path in kept)


def _collect(federation: Federation) -> int:
    async def collect() -> int:
        engine = open_engine(federation.platform.database_url, connections=2)
        try:
            blobs = DirectoryBlobStore(federation.folder / "data" / "blobs")
            return await collect_orphans(open_sessions(engine), blobs, older_than=timedelta(hours=24))
        finally:
            await engine.dispose()

    with start_blocking_portal() as portal:
        return portal.call(collect)


def test_figures_for_prometheus_need_an_admin_and_name_routes_not_ids(federation: Federation) -> None:
    job = federation.start()
    for site in federation.sites:
        site.hand_in(site.claim(), filled(1.0))
    federation.finish(job)

    figures = federation.platform.http(federation.platform.admin).get("/metrics").text
    assert 'isthmus_aggregations_total{outcome="published"} 1.0' in figures
    assert 'route="/v1/tasks/{task_id}/update"' in figures
    assert str(job.id) not in figures
    assert federation.platform.http(federation.researcher).get("/metrics").status_code == 403
    assert federation.platform.http().get("/metrics").status_code == 401
