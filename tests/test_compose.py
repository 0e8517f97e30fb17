"""The compose file and the images, as far as can be told without an engine."""

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
import yaml

from app.coordinator import SWEEP_LOCK
from app.credentials import load_signer
from app.settings import Settings

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PINNED = re.compile(r"[a-z/-]+:\d+\.\d+(\.\d+)?(-[a-z-]+)*")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return cast(dict[str, Any], yaml.safe_load(COMPOSE.read_text()))


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return cast(dict[str, dict[str, Any]], compose["services"])


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Word and rest of every instruction."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in text.splitlines() if line.strip()]


def test_the_file_is_of_the_compose_specification() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_part_is_there(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == {"postgres", "migrate", "api", "coordinator", "worker"}


def test_nothing_is_root_or_privileged(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["user"] not in ("root", "0", "0:0"), name
        assert not service.get("privileged"), name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not any("docker.sock" in str(volume) for volume in service.get("volumes", [])), name


def test_every_image_is_pinned(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        assert PINNED.fullmatch(service["image"]), service["image"]
    for dockerfile in DOCKERFILES:
        for word, rest in instructions(dockerfile):
            if word == "FROM":
                assert PINNED.fullmatch(rest.split(" AS ")[0]), rest


def test_a_part_starts_when_what_it_needs_is_there(services: dict[str, dict[str, Any]]) -> None:
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in ("api", "coordinator"):
        assert services[name]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert services["worker"]["depends_on"] == {"api": {"condition": "service_healthy"}}
    for name in set(services) - {"migrate"}:
        assert services[name]["healthcheck"]["test"][0] == "CMD", name
    assert services["migrate"]["restart"] == "no"


def test_only_the_service_reaches_the_database(compose: dict[str, Any], services: dict[str, dict[str, Any]]) -> None:
    assert compose["networks"]["database"] == {"internal": True}
    assert services["postgres"]["networks"] == ["database"]
    assert "ports" not in services["postgres"]
    assert "database" not in services["worker"]["networks"]
    assert all(port.startswith("127.0.0.1:") for port in services["api"]["ports"])


def test_whatever_is_named_is_declared(compose: dict[str, Any], services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert set(service.get("secrets", [])) <= set(compose["secrets"]), name
        assert set(service["networks"]) <= set(compose["networks"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or source.startswith(("./", "${")), volume
        for value in service.get("environment", {}).values():
            if str(value).startswith("/run/secrets/"):
                assert value.removeprefix("/run/secrets/") in service["secrets"], value


def test_no_secret_stands_in_a_file(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|URL|KEY", variable):
                assert variable.endswith("_FILE"), f"{name}: {variable}"
                assert value.startswith("/run/secrets/"), f"{name}: {variable}"


def made_secrets(folder: Path) -> Path:
    subprocess.run(["sh", ROOT / "docker/make-secrets.sh", folder / "secrets"], check=True, capture_output=True)
    return folder / "secrets"


@pytest.mark.parametrize("name", ["migrate", "api", "coordinator"])
def test_the_settings_are_valid_for_production(
    name: str, services: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = made_secrets(tmp_path)
    files = {"/run/secrets/database_url": "database_url", "/run/secrets/signing_key": "signing_key.pem"}
    environment = {
        variable: str(secrets / files[value]) if value in files else value
        for variable, value in services[name]["environment"].items()
    }
    known = {f"ISTHMUS_{field.upper()}" for field in Settings.model_fields}
    assert {variable.replace("URL_FILE", "URL") for variable in environment} <= known

    shown = subprocess.run(
        ["sh", ROOT / "docker/entrypoint.sh", "env"],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    for variable in list(os.environ):
        if variable.startswith("ISTHMUS_"):
            monkeypatch.delenv(variable)
    for line in shown.stdout.splitlines():
        variable, _, value = line.partition("=")
        if variable in known:
            monkeypatch.setenv(variable, value)
    settings = Settings()

    assert settings.environment == "production"
    assert re.fullmatch(r"postgresql://isthmus:[0-9a-f]{64}@postgres:5432/isthmus", settings.database_url or "")
    assert settings.signing_key_file is not None
    assert len(load_signer(settings.signing_key_file, create=False).public_key) == 64
    assert settings.coordinate is (name != "api")


def test_secrets_are_made_once_and_are_nobodys_else(tmp_path: Path) -> None:
    secrets = made_secrets(tmp_path)
    before = (secrets / "signing_key.pem").read_bytes()

    again = subprocess.run(
        ["sh", ROOT / "docker/make-secrets.sh", secrets], capture_output=True, text=True, check=False
    )

    assert again.returncode == 1
    assert "nothing was changed" in again.stderr
    assert (secrets / "signing_key.pem").read_bytes() == before
    assert secrets.stat().st_mode & 0o777 == 0o700
    assert (secrets / ".gitignore").read_text() == "*\n"


def test_the_scripts_can_be_run() -> None:
    for script in (ROOT / "docker").glob("*.sh"):
        assert os.access(script, os.X_OK), f"{script.name}: the Postgres image would read it into its own shell"
        subprocess.run(["sh", "-n", script], check=True)


def test_a_secret_that_is_missing_stops_the_start(tmp_path: Path) -> None:
    started = subprocess.run(
        ["sh", ROOT / "docker/entrypoint.sh", "echo", "started"],
        env={"PATH": os.environ["PATH"], "ISTHMUS_DATABASE_URL_FILE": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert started.returncode != 0
    assert started.stdout == ""


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_somebody_else_than_root(dockerfile: Path) -> None:
    found = instructions(dockerfile)
    users = [rest for word, rest in found if word == "USER"]

    assert re.fullmatch(r"1\d{4}:1\d{4}", users[-1])
    assert [word for word, _ in found].count("FROM") == 2
    last = len(found) - 1 - [word for word, _ in reversed(found)].index("FROM")
    assert not any("pip install" in rest for _, rest in found[last:]), "nothing is installed in the final stage"


def test_the_images_and_the_compose_file_agree_on_the_users(services: dict[str, dict[str, Any]]) -> None:
    for name in set(services) - {"postgres"}:
        text = (ROOT / services[name]["build"]["dockerfile"]).read_text()
        assert f"USER {services[name]['user']}\n" in text


def test_torch_is_pinned_and_comes_first() -> None:
    found = instructions(ROOT / "docker" / "worker.Dockerfile")
    installs = [rest for word, rest in found if word == "RUN" and "pip install" in rest]

    assert ("ARG", "TORCH_INDEX=") in found
    assert installs[0].endswith("torch==2.13.0")
    assert "TORCH_INDEX" in installs[0]
    assert not any("TORCH_INDEX" in install for install in installs[1:])
    assert all("torch==2.13.0" in install for install in installs)
    server = [rest for _, rest in instructions(ROOT / "docker" / "server.Dockerfile")]
    assert not any("torch" in rest for rest in server)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_whatever_is_copied_is_there_and_not_ignored(dockerfile: Path) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in instructions(dockerfile):
        if word == "COPY" and "--from" not in rest:
            for source in [part for part in rest.split()[:-1] if not part.startswith("--")]:
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source.split("/")[0], pattern) for pattern in kept), source


def test_a_coordinator_is_healthy_while_somebody_sweeps(database_url: str) -> None:
    def health() -> int:
        return subprocess.run(
            [sys.executable, ROOT / "docker" / "coordinator_health.py"],
            env={**os.environ, "ISTHMUS_DATABASE_URL": database_url, "ISTHMUS_DATABASE_DIRECT_URL": ""},
            cwd=ROOT,
            check=False,
        ).returncode

    assert health() == 1
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SELECT pg_try_advisory_lock(%s)", (SWEEP_LOCK,))
        assert health() == 0
    assert health() == 1
