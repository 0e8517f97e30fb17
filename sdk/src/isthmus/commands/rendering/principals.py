"""Principals, and oneself."""

from rich.table import Table

from isthmus.commands.rendering.text import fields, table
from isthmus.wire.organizations import Me, PrincipalView


def principal_text(view: PrincipalView) -> Table:
    """One principal."""
    return fields(
        [
            ("name", view.name),
            ("display name", view.display_name),
            ("role", view.role),
            ("organization id", str(view.organization_id) if view.organization_id else None),
            ("id", str(view.id)),
            ("disabled", view.disabled_at),
        ]
    )


def principals_table(views: list[PrincipalView]) -> Table:
    """Principals."""
    return table(
        ["NAME", "ROLE", "DISPLAY NAME", "DISABLED", "ID"],
        [(view.name, view.role, view.display_name, view.disabled_at, str(view.id)) for view in views],
    )


def me_text(me: Me, url: str) -> Table:
    """Who one is, where."""
    return fields(
        [
            ("service", url),
            ("principal", f"{me.principal.name} ({me.principal.display_name})"),
            ("role", me.principal.role),
            ("organization", me.organization.name if me.organization else None),
            ("key", me.key_id),
            ("scopes", ", ".join(me.scopes)),
        ]
    )
