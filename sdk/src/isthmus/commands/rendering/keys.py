"""API keys."""

from rich.table import Table

from isthmus.commands.rendering.text import Cell, fields, table
from isthmus.wire.organizations import ApiKeyIssued, ApiKeyView


def key_text(view: ApiKeyView) -> Table:
    """One key, without its secret."""
    return fields(_pairs(view))


def issued_text(view: ApiKeyIssued) -> Table:
    """A new key with its secret: its only appearance."""
    return fields([("key", view.key), *_pairs(view)])


def keys_table(views: list[ApiKeyView]) -> Table:
    """Keys."""
    return table(
        ["ID", "LABEL", "SCOPES", "EXPIRES", "LAST USED", "REVOKED"],
        [
            (view.id, view.label, ", ".join(view.scopes), view.expires_at, view.last_used_at, view.revoked_at)
            for view in views
        ],
    )


def _pairs(view: ApiKeyView) -> list[tuple[str, Cell]]:
    return [
        ("id", view.id),
        ("label", view.label),
        ("scopes", ", ".join(view.scopes)),
        ("expires", view.expires_at),
        ("revoked", view.revoked_at),
    ]
