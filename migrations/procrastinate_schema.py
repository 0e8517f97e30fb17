"""The schema of the queue, which belongs to procrastinate and is taken from the installed package.

A new database gets the whole schema of the version installed then, and a comment that names this version. When the
package is upgraded and brings changes of its schema, we add a migration whose only line is `bring_up_to_date()`: it
applies what the package lists after the version in the comment, and nothing twice, so that it does nothing to a
database that was new enough. A test fails as long as that migration is missing.
"""

import re
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from alembic import op
from procrastinate.schema import SchemaManager

Version = tuple[int, ...]


def create() -> None:
    """Create the queue as the installed package wants it."""
    _run(SchemaManager.get_schema())
    _note(version("procrastinate"))


def bring_up_to_date() -> None:
    """Apply what the installed package changed since the version that the database has."""
    for file in pending(noted()):
        _run(file.read_text(encoding="utf-8"))
    _note(version("procrastinate"))


def drop() -> None:
    """Remove the queue: tables first, then the functions and types that they used."""
    _run("""
        DO $$
        DECLARE it record;
        BEGIN
            FOR it IN SELECT oid::regclass AS name FROM pg_class
                WHERE relkind = 'r' AND relname LIKE 'procrastinate\\_%' AND pg_table_is_visible(oid)
            LOOP EXECUTE format('DROP TABLE %s CASCADE', it.name); END LOOP;
            FOR it IN SELECT oid::regprocedure AS name FROM pg_proc
                WHERE proname LIKE 'procrastinate\\_%' AND pg_function_is_visible(oid)
            LOOP EXECUTE format('DROP FUNCTION %s CASCADE', it.name); END LOOP;
            FOR it IN SELECT oid::regtype AS name FROM pg_type
                WHERE typname LIKE 'procrastinate\\_%' AND typtype IN ('e', 'c') AND pg_type_is_visible(oid)
            LOOP EXECUTE format('DROP TYPE %s CASCADE', it.name); END LOOP;
        END
        $$
    """)


def noted() -> Version:
    """The version of procrastinate whose schema the database has."""
    row = op.get_bind().exec_driver_sql("SELECT obj_description('procrastinate_jobs'::regclass, 'pg_class')").scalar()
    return _parse(str(row).removeprefix("schema of procrastinate "))


def pending(have: Version) -> list[Path]:
    """The package's own migrations after version `have`, in order."""
    found = sorted(Path(SchemaManager.get_migrations_path()).glob("*.sql"))
    return [file for file in found if _parse(file.name.split("_")[0]) > have]


def _parse(text: str) -> Version:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _note(installed: str) -> None:
    _run(f"COMMENT ON TABLE procrastinate_jobs IS 'schema of procrastinate {installed}'")


def _run(statements: str) -> None:
    """Several statements as they are: without parameters, so that neither `%` nor `:` means anything."""
    with closing(op.get_bind().connection.cursor()) as cursor:
        cursor.execute(statements)
