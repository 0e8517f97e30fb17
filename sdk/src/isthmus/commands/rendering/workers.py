"""Workers."""

from datetime import datetime

from rich.table import Table

from isthmus.commands.rendering.text import ago, fields, table
from isthmus.wire.workers import WorkerView


def worker_text(view: WorkerView) -> Table:
    """One worker."""
    return fields(
        [
            ("name", f"{view.organization}/{view.name}"),
            ("id", str(view.id)),
            ("version", view.version),
            ("public key", view.public_key),
            ("enrolled", view.enrolled_at),
            ("last seen", view.last_seen_at),
            ("revoked", view.revoked_at),
        ]
    )


def workers_table(views: list[WorkerView], now: datetime) -> Table:
    """Workers."""
    return table(
        ["WORKER", "VERSION", "LAST SEEN", "REVOKED", "ID"],
        [
            (
                f"{view.organization}/{view.name}",
                view.version,
                ago(view.last_seen_at, now) if view.last_seen_at else "never",
                view.revoked_at,
                str(view.id),
            )
            for view in views
        ],
    )
