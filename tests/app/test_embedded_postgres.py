"""The embedded Postgres, driven as real processes that are killed at bad moments."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from app.embedded_postgres import EmbeddedPostgres, embedded_postgres
from app.postgres_binaries import EmbeddedPostgresError, copied, installed, run

ROOT = Path(__file__).parents[2]
OWNER = """
import sys
from pathlib import Path
from app.embedded_postgres import embedded_postgres
with embedded_postgres(Path(sys.argv[1]), for_tests=True) as url:
    print(url, flush=True)
    sys.stdin.readline()
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
Owner = subprocess.Popen[str]


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "postgres"
    yield path
    assert not EmbeddedPostgres(path).listens(), "a server was left running"


@pytest.fixture
def start_owner() -> Iterator[Callable[[Path], Owner]]:
    """Starts a process that uses the server until it is told to leave, or killed."""
    owners: list[Owner] = []

    def start(data_dir: Path) -> Owner:
        command = [sys.executable, "-c", OWNER, str(data_dir)]
        owners.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return owners[-1]

    yield start
    for owner in owners:
        owner.communicate(timeout=60)


def url_of(owner: Owner) -> str:
    assert owner.stdout is not None
    return owner.stdout.readline().strip()


def tell_to_leave(owner: Owner) -> None:
    owner.communicate("leave\n", timeout=60)
    assert owner.returncode == 0


def ask(url: str, statement: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(statement).fetchone()
        return row[0] if row else None


def change(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def postmaster(data_dir: Path) -> int:
    return int((data_dir / "server" / "postmaster.pid").read_text().split()[0])


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def test_data_is_durable_private_and_there_again_after_the_last_user_left(data_dir: Path) -> None:
    with embedded_postgres(data_dir) as url:
        change(url, "CREATE TABLE kept (n int)", "INSERT INTO kept VALUES (7)")
        assert [ask(url, f"SHOW {name}") for name in ("fsync", "synchronous_commit")] == ["on", "on"]
        assert ask(url, "SHOW listen_addresses") == ""
        assert ask(url, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
        assert [path.stat().st_mode & 0o777 for path in (data_dir, data_dir / "server")] == [0o700, 0o700]
    assert not EmbeddedPostgres(data_dir).listens()

    with embedded_postgres(data_dir) as url:
        assert ask(url, "SELECT n FROM kept") == 7


def test_a_server_for_tests_is_fast_and_refused_to_who_wants_durability(data_dir: Path) -> None:
    with embedded_postgres(data_dir, for_tests=True) as url:
        assert [ask(url, f"SHOW {name}") for name in ("fsync", "synchronous_commit")] == ["off", "off"]
        assert int(str(ask(url, "SHOW max_connections"))) >= 200
        with pytest.raises(EmbeddedPostgresError, match="would lose your data"), embedded_postgres(data_dir):
            pass
        assert ask(url, "SELECT 1") == 1


def test_two_processes_that_come_at_once_share_one_server_and_the_last_stops_it(
    data_dir: Path, start_owner: Callable[[Path], Owner]
) -> None:
    first, second = start_owner(data_dir), start_owner(data_dir)
    url, same_url = url_of(first), url_of(second)
    assert url == same_url

    tell_to_leave(first)
    assert ask(url, "SELECT 1") == 1
    tell_to_leave(second)
    assert not EmbeddedPostgres(data_dir).listens()


def test_the_server_of_a_killed_owner_is_used_again_and_stopped_by_the_next_user(
    data_dir: Path, start_owner: Callable[[Path], Owner]
) -> None:
    owner = start_owner(data_dir)
    change(url_of(owner), "CREATE TABLE kept (n int)")
    server = postmaster(data_dir)
    owner.kill()
    owner.wait()
    assert EmbeddedPostgres(data_dir).listens()

    with embedded_postgres(data_dir, for_tests=True) as url:
        assert postmaster(data_dir) == server
        assert ask(url, "SELECT count(*) FROM kept") == 0
    assert not EmbeddedPostgres(data_dir).listens()


def test_a_watchdog_outlasts_killed_users_and_discards_the_data(
    data_dir: Path, start_owner: Callable[[Path], Owner]
) -> None:
    owner = start_owner(data_dir)
    url_of(owner)
    code = "import sys, app.embedded_postgres as p; p.EmbeddedPostgres(p.Path(sys.argv[1])).outlast(discard=True)"
    watchdog = subprocess.Popen([sys.executable, "-c", code, str(data_dir)], cwd=ROOT)
    with pytest.raises(subprocess.TimeoutExpired):
        watchdog.wait(timeout=0.4)

    owner.kill()
    assert watchdog.wait(timeout=60) == 0
    assert not (data_dir / "server").exists()


@pytest.mark.parametrize("pid", ["dead, perhaps a zombie", "somebody else's now"])
def test_after_a_killed_server_the_next_start_recovers_what_was_committed(data_dir: Path, pid: str) -> None:
    with embedded_postgres(data_dir) as url:
        change(url, "CREATE TABLE kept (n int)", "INSERT INTO kept VALUES (7)")
        killed = postmaster(data_dir)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: not EmbeddedPostgres(data_dir).listens())
        stranger = None
        if pid == "somebody else's now":
            stranger = subprocess.Popen(["sleep", "60"], user=(data_dir / "server").stat().st_uid)
            pid_file = data_dir / "server" / "postmaster.pid"
            pid_file.write_text(pid_file.read_text().replace(str(killed), str(stranger.pid), 1))
        try:
            with embedded_postgres(data_dir) as recovered:
                assert ask(recovered, "SELECT n FROM kept") == 7
                assert postmaster(data_dir) != killed
        finally:
            if stranger:
                assert stranger.poll() is None, "the stranger was taken for our server"
                stranger.kill()
                stranger.wait()


def test_a_creator_killed_half_way_leaves_nothing_in_the_way(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "turn.lock").touch()
    (data_dir / "new-abandoned" / "base").mkdir(parents=True)
    (data_dir / "server").mkdir()

    with embedded_postgres(data_dir, for_tests=True) as url:
        assert ask(url, "SELECT 1") == 1
        assert not list(data_dir.glob("new-*"))


@pytest.mark.parametrize("name", ["with spaces & 'quotes' %41", "comma, here", "long-" + "x" * 120])
def test_any_path_will_do(tmp_path: Path, name: str) -> None:
    data_dir = tmp_path / name
    with embedded_postgres(data_dir, for_tests=True) as url:
        assert ask(url, "SELECT 1") == 1
        record = data_dir / "socket-link"
        link = Path(record.read_text()) if record.exists() else None
        assert link is None or link.parent.stat().st_mode & 0o777 == 0o700
    assert link is None or not link.parent.exists()
    assert not EmbeddedPostgres(data_dir).listens()


def test_a_forked_child_that_leaves_does_not_take_the_server_along(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir, for_tests=True)
    url = postgres.join()
    try:
        postgres._joined_as += 1  # what a forked child would see
        postgres.leave()
        assert ask(url, "SELECT 1") == 1
    finally:
        postgres._joined_as -= 1
        postgres.leave()
    assert not postgres.listens()


def test_it_is_refused_in_production(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmbeddedPostgresError, match="ISTHMUS_DATABASE_URL"):
        EmbeddedPostgres(data_dir, environment="production")
    monkeypatch.setenv("ISTHMUS_ENVIRONMENT", "production")
    with pytest.raises(EmbeddedPostgresError, match="ISTHMUS_DATABASE_URL"):
        EmbeddedPostgres(data_dir)


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    tmp_path.chmod(0o755)
    with pytest.raises(EmbeddedPostgresError, match="not empty"):
        EmbeddedPostgres(tmp_path).join()
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_data_of_a_postgres_that_is_not_installed_is_refused_and_kept(data_dir: Path) -> None:
    (data_dir / "server").mkdir(parents=True)
    (data_dir / "turn.lock").touch()
    (data_dir / "server" / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedPostgresError, match="of Postgres 9"):
        EmbeddedPostgres(data_dir).join()
    assert (data_dir / "server" / "PG_VERSION").exists()


@as_root
def test_as_root_the_server_is_nobody_even_below_a_private_directory(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    with embedded_postgres(private / "postgres", for_tests=True) as url:
        assert ask(url, "SELECT 1") == 1
        assert pwd.getpwuid(Path(f"/proc/{postmaster(private / 'postgres')}").stat().st_uid).pw_name == "nobody"
    assert (private.stat().st_mode & 0o777, private.stat().st_uid) == (0o700, 0)


@as_root
def test_as_an_ordinary_user_the_server_is_that_user() -> None:
    nobody = pwd.getpwnam("nobody")
    code = f"import os, psycopg.rows; os.setgroups([]); os.setgid({nobody.pw_gid}); os.setuid({nobody.pw_uid})\n{OWNER}"
    code = code.replace("os.setgroups", "from app.embedded_postgres import embedded_postgres; os.setgroups", 1)
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
        command = [sys.executable, "-c", code, f"{home}/postgres"]
        used = subprocess.run(command, cwd=ROOT, input="leave\n", capture_output=True, text=True, check=False)
        assert used.returncode == 0, used.stderr
        assert used.stdout.startswith("postgresql://")
        assert (Path(home) / "postgres").stat().st_uid == nobody.pw_uid
        with pytest.raises(EmbeddedPostgresError, match="belongs to another user"):
            EmbeddedPostgres(Path(home) / "postgres").join()


@as_root
def test_as_root_binaries_out_of_reach_are_copied_whole_and_only_where_no_other_user_could_interfere() -> None:
    nobody = pwd.getpwnam("nobody")
    folder = min(installed().items())[1]
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        base = Path(name)
        base.chmod(0o1777)
        copy = copied(folder, base)
        assert copy is not None
        base.chmod(0o755)
        assert run([str(copy / "bin" / "initdb"), "-V"], nobody, cwd=Path("/")).returncode == 0
        made = copy.stat().st_mtime_ns

        assert copied(folder, base) == copy
        assert copy.stat().st_mtime_ns == made

        shutil.rmtree(copy / "share")  # a temporary folder was swept
        assert copied(folder, base) == copy
        assert (copy / "share").exists()
        assert len(list(base.iterdir())) == 1

        os.chown(next(base.iterdir()), nobody.pw_uid, nobody.pw_gid)
        assert copied(folder, base) is None
        base.chmod(0o777)  # without the sticky bit anybody may swap what is in it
        assert copied(folder, base) is None
