"""Organizations and their tokens."""

from rich.table import Table

from isthmus.commands.rendering.text import fields, table
from isthmus.wire.organizations import EnrollmentTokenIssued, OrganizationView


def organization_text(view: OrganizationView) -> Table:
    """One organization."""
    return fields(
        [("name", view.name), ("display name", view.display_name), ("id", str(view.id)), ("created", view.created_at)]
    )


def organizations_table(views: list[OrganizationView]) -> Table:
    """Organizations."""
    return table(["NAME", "DISPLAY NAME", "ID"], [(view.name, view.display_name, str(view.id)) for view in views])


def token_text(view: EnrollmentTokenIssued) -> Table:
    """A token: its only appearance."""
    return fields([("organization", view.organization), ("token", view.token), ("expires", view.expires_at)])
