"""What can be found out before the first task: whether this machine is ready."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

import httpx

from isthmus.client import IsthmusError, Refused
from isthmus.wire.privacy import PrivacyMode
from isthmus.wire.version import CONTRACT_VERSION
from isthmus_worker.connect import connect
from isthmus_worker.settings import DatasetSettings, Settings, SettingsRefused, read_settings
from isthmus_worker.state import Credentials, NotEnrolled, StateDir
from isthmus_worker.trainer import Trainer, WorkFailed, WorkRefused

MOST_SKEW_S: Final = 30
_GB: Final = 1 << 30
_MB: Final = 1 << 20


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `ok` None: works, but somebody should know."""

    ok: bool | None
    text: str

    def __str__(self) -> str:
        return f"{'!' if self.ok is None else '✓' if self.ok else '✗'} {self.text}"


def look(config: Path) -> Iterator[Finding]:
    """Everything that is worth knowing, one finding after the other, each as soon as it is known."""
    try:
        settings = read_settings(config)
    except SettingsRefused as error:
        yield Finding(False, str(error))
        return
    yield Finding(True, f"configuration {config}: {len(settings.datasets)} datasets")
    yield from _policy(settings)
    yield from _machine(settings)
    for dataset in settings.datasets:
        yield _dataset(settings, dataset)
    try:
        credentials = StateDir(settings.state_dir).credentials()
    except NotEnrolled as error:
        yield Finding(False, str(error))
        credentials = None
    yield from _service(settings, credentials)


def _policy(settings: Settings) -> Iterator[Finding]:
    policy = settings.policy
    closed = [name for name in ("principals", "purposes") if not getattr(policy, name)]
    if closed:
        yield Finding(None, f"policy: {' and '.join(closed)} empty, so that every task will be refused")
    else:
        yield Finding(True, f"policy: principals {', '.join(policy.principals)}; purposes {', '.join(policy.purposes)}")
    modes = ", ".join(policy.modes) or "not listed, so that every task will be refused"
    yield Finding(bool(policy.modes) or None, f"policy: modes {modes}")
    if any(mode is not PrivacyMode.NONE for mode in policy.modes):
        for dataset in settings.datasets:
            yield _budget(dataset)


def _budget(dataset: DatasetSettings) -> Finding:
    if dataset.budget is None:
        return Finding(None, f"budget: {dataset.name} has none, so that no job with a privacy unit will be served")
    return Finding(True, f"budget: {dataset.name} epsilon {dataset.budget.epsilon:g} at delta {dataset.budget.delta:g}")


def _machine(settings: Settings) -> Iterator[Finding]:
    limit = settings.resources.max_memory_mb
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MB
    enough = limit <= total
    yield Finding(enough or None, f"memory: this machine has {total} MB, a task may use {limit}")
    parent = next(path for path in (settings.state_dir, *settings.state_dir.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    yield Finding(free > _GB or None, f"disk: {free // _MB} MB free for {settings.state_dir}")
    if not os.access(parent, os.W_OK):
        yield Finding(False, f"state: {settings.state_dir} cannot be written")
    elif settings.state_dir.exists() and settings.state_dir.stat().st_mode & 0o077:
        yield Finding(None, f"state: others can look into {settings.state_dir}; its mode should be 0700")
    found = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=False
    )
    version = found.stdout.strip()
    yield Finding(found.returncode == 0, f"torch {version}" if version else "torch cannot be imported")


def _dataset(settings: Settings, dataset: DatasetSettings) -> Finding:
    with tempfile.TemporaryDirectory(prefix="isthmus-") as scratch:
        trainer = Trainer(settings.resources, Path(scratch) / "child")
        try:
            found = trainer.describe(dataset)
        except (WorkRefused, WorkFailed) as error:
            return Finding(
                False,
                f"dataset {dataset.name}: {error} ({error.where})"
                if error.where
                else f"dataset {dataset.name}: {error}",
            )
        finally:
            trainer.stop()
    columns = ", ".join(
        f"{column.name} {column.kind.value}{'?' if column.missing else ''}" for column in found.data_schema.columns
    )
    return Finding(True, f"dataset {dataset.name}: {found.rows} records of {columns}")


def _service(settings: Settings, credentials: Credentials | None) -> Iterator[Finding]:
    with connect(settings, credentials.api_key if credentials else None, timeout_s=10.0) as client:
        reached, finding = _asked(lambda: client.service().contract_version, f"service {settings.service_url}")
        yield finding
        if reached is None:
            return
        if reached.split(".")[0] != CONTRACT_VERSION.split(".")[0]:
            yield Finding(False, f"the service speaks contract {reached}, this worker {CONTRACT_VERSION}")
        if credentials is not None:
            pinned = client.service().service_public_key == credentials.service_public_key
            yield Finding(
                pinned,
                "the service's key is the one pinned at enrolment"
                if pinned
                else "the service signs with another key than at enrolment",
            )
            yield _asked(
                lambda: client.me().principal.name, f"key of worker {credentials.worker} at {credentials.organization}"
            )[1]
        yield _clock(settings)


def _asked(call: Callable[[], str], what: str) -> tuple[str | None, Finding]:
    try:
        return call(), Finding(True, what)
    except Refused as refusal:
        return None, Finding(False, f"{what}: {refusal.detail} [{refusal.code}]")
    except IsthmusError as error:
        return None, Finding(False, f"{what}: {error}")


def _clock(settings: Settings) -> Finding:
    try:
        verify = str(settings.ca_file) if settings.ca_file else True
        answer = httpx.get(f"{settings.service_url.rstrip('/')}/healthz", timeout=10.0, verify=verify)
        skew_s = abs((parsedate_to_datetime(answer.headers["date"]) - datetime.now(UTC)).total_seconds())
    except (httpx.HTTPError, KeyError, ValueError):
        return Finding(None, "clock: the service does not tell the time")
    near = skew_s <= MOST_SKEW_S
    return Finding(
        near or None,
        f"clock: {skew_s:.0f} s from the service's"
        if near
        else f"clock: {skew_s:.0f} s from the service's; logs will not match",
    )
