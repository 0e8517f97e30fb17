"""Participations and their grants."""

from rich.table import Table

from isthmus.commands.rendering.text import fields, table
from isthmus.wire.jobs import ParticipationView


def participations_table(views: list[ParticipationView]) -> Table:
    """Participations."""
    return table(
        ["DATASET", "STATE", "JOB", "REQUESTED BY", "PURPOSE", "ROWS", "GRANT", "DETAIL", "ID"],
        [
            (
                f"{view.organization}/{view.dataset}",
                view.state,
                view.job,
                view.requested_by,
                view.purpose,
                view.declared_rows,
                f"{view.grant.rounds_used} of {view.grant.rounds} rounds" if view.grant else None,
                view.detail,
                str(view.id),
            )
            for view in views
        ],
    )


def participation_text(view: ParticipationView) -> Table:
    """One participation with its grant."""
    grant = view.grant
    return fields(
        [
            ("dataset", f"{view.organization}/{view.dataset}"),
            ("state", view.state),
            ("detail", view.detail),
            ("job", f"{view.job} ({view.job_id})"),
            ("requested by", f"{view.requested_by}, for: {view.purpose}"),
            ("rows", view.declared_rows),
            ("granted by", f"{grant.granted_by}{' (by rule)' if grant.by_rule else ''}" if grant else None),
            ("granted for", grant.purpose if grant else None),
            ("rounds", f"{grant.rounds_used} of {grant.rounds} used" if grant else None),
            ("expires", grant.expires_at if grant else None),
            ("id", str(view.id)),
        ]
    )
