from typing import Any
import pytest
from tests.running import Platform
def test_x(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> Any:
        raise RuntimeError("x")
    worker = platform.worker(platform.organization())
    monkeypatch.setattr("app.rounds.router.authenticate_asking", broken)
    a = platform.http(worker).post("/v1/tasks/claim", json={}, timeout=5)
    print(a.status_code, a.text)
    assert a.status_code == 500
