"""`isthmus participation ...`"""

from typing import Annotated
from uuid import UUID

import typer

from isthmus.commands.lookup import participation_id
from isthmus.commands.options import Json, duration_option
from isthmus.commands.rendering.participations import participation_text, participations_table
from isthmus.commands.session import connected
from isthmus.wire.jobs import ApproveParticipation, ParticipationState, RejectParticipation, WithdrawParticipation

app = typer.Typer(no_args_is_help=True, help="Participations: datasets' parts in jobs, and the grants on them.")

Reference = Annotated[
    str,
    typer.Argument(metavar="PARTICIPATION", help="Its id, or its dataset (organization/name) if only one is meant."),
]
Job = Annotated[UUID | None, typer.Option("--job", metavar="JOB_ID", help="Only of this job.")]
Note = Annotated[str, typer.Option(help="Why, for the record.")]

OPEN = (ParticipationState.PENDING,)
GRANTABLE = (ParticipationState.PENDING, ParticipationState.EXPIRED, ParticipationState.EXHAUSTED)
ENDABLE = (ParticipationState.APPROVED, ParticipationState.EXPIRED, ParticipationState.EXHAUSTED)


@app.command("list")
def list_all(
    ctx: typer.Context,
    job: Job = None,
    state: Annotated[ParticipationState | None, typer.Option(help="Only in this state.")] = None,
    as_json: Json = False,
) -> None:
    """All participations that you may see."""
    with connected(ctx) as at:
        at.show_all(at.client.participations.list(job_id=job, state=state), participations_table, as_json)


@app.command()
def show(ctx: typer.Context, participation: Reference, job: Job = None, as_json: Json = False) -> None:
    """One participation."""
    with connected(ctx) as at:
        found = participation_id(at.client, participation, job_id=job, states=ParticipationState)
        at.show(at.client.participations.get(found), participation_text, as_json)


@app.command()
def approve(
    ctx: typer.Context,
    *,
    participation: Reference,
    job: Job = None,
    purpose: Annotated[str | None, typer.Option(help="For what (default: the job's purpose).")] = None,
    expires_in: Annotated[int | None, duration_option("--expires-in", "How long the grant holds.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="For how many rounds (default: the job's).")] = None,
    as_json: Json = False,
) -> None:
    """Grant the use of a dataset."""
    body = ApproveParticipation(purpose=purpose, expires_in_s=expires_in, rounds=rounds)
    with connected(ctx) as at:
        found = participation_id(at.client, participation, job_id=job, states=GRANTABLE)
        at.show(at.client.participations.approve(found, body), participation_text, as_json)


@app.command()
def reject(ctx: typer.Context, participation: Reference, note: Note, job: Job = None, as_json: Json = False) -> None:
    """Refuse the use of a dataset."""
    body = RejectParticipation(note=note)
    with connected(ctx) as at:
        found = participation_id(at.client, participation, job_id=job, states=OPEN)
        at.show(at.client.participations.reject(found, body), participation_text, as_json)


@app.command()
def withdraw(ctx: typer.Context, participation: Reference, note: Note, job: Job = None, as_json: Json = False) -> None:
    """Take a grant back, in the middle of the job if need be."""
    body = WithdrawParticipation(note=note)
    with connected(ctx) as at:
        found = participation_id(at.client, participation, job_id=job, states=ENDABLE)
        at.show(at.client.participations.withdraw(found, body), participation_text, as_json)
