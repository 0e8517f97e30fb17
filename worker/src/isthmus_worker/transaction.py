"""A transaction of the journal's database."""

import sqlite3


class Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK. Not `synced`: the next one that is takes it to the disk as well."""

    def __init__(self, connection: sqlite3.Connection, *, synced: bool = True) -> None:
        self._connection = connection
        self._synced = synced

    def __enter__(self) -> sqlite3.Connection:
        if not self._synced:
            self._connection.execute("PRAGMA synchronous = NORMAL")
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except BaseException:
            self._connection.execute("PRAGMA synchronous = FULL")  # what comes next may be a spend
            raise
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._connection.execute("COMMIT" if kind is None else "ROLLBACK")
        finally:
            if not self._synced:
                self._connection.execute("PRAGMA synchronous = FULL")
