"""`isthmus privacy ...`"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.commands.options import Json
from isthmus.commands.rendering.privacy import draw_outlook, outlook_text
from isthmus.commands.session import connected, surroundings, write_json
from isthmus.jobfile import load_job
from isthmus.privacy.outlook import Outlook, outlook_of
from isthmus.wire.data import misfits
from isthmus.wire.datasets import Budget, DatasetState
from isthmus.wire.jobs import JobSpec

app = typer.Typer(no_args_is_help=True, help="Privacy: what a job would cost, before anybody is asked.")


@app.command()
def plan(
    ctx: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(help="The job, as YAML.")],
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Records of a site; repeat it for more. Without it the service's datasets that fit."),
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(min=1, help="Parameters of the model, where the job does not declare its layers.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Epsilon of a dataset's budget, to see how many such jobs it allows.")
    ] = None,
    budget_delta: Annotated[float, typer.Option(help="Delta of that budget.")] = 1e-5,
    picture: Annotated[Path | None, typer.Option(help="Write epsilon by round as a PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Noise, epsilon by round, and how many jobs of this kind the budgets allow. Nothing is submitted or reserved."""
    around = surroundings(ctx)
    spec = load_job(file)
    elements = _elements(spec, parameters)
    given = None if budget is None else Budget(epsilon=budget, delta=budget_delta)
    sites = [(f"{count:,} rows", count, given) for count in rows] if rows else _sites(ctx, spec, given)
    found = outlook_of(spec, sites, elements)
    if picture is not None:
        draw_outlook(picture, spec, found)
        around.note(f"Wrote {picture}.")
    if as_json:
        write_json(around, _plain(found))
    else:
        around.out.print(outlook_text(spec, found, elements))


def _elements(spec: JobSpec, parameters: int | None) -> int:
    """How many numbers are noised in an update."""
    if spec.model.layers is None:
        if parameters is None:
            raise typer.BadParameter("the job names an entry point and no layers: say how many --parameters it has")
        return parameters
    return spec.model.plan(spec.data.input_shape).manifest.averaged_elements


def _sites(ctx: typer.Context, spec: JobSpec, given: Budget | None) -> list[tuple[str, int, Budget | None]]:
    """The confirmed datasets that fit the job, with the budgets that their policies tell of."""
    wanted, sites = spec.data.datasets, []
    with connected(ctx) as at:
        for view in at.client.datasets.list():
            name = f"{view.organization}/{view.name}"
            named = wanted is None or name in wanted
            if named and view.state is DatasetState.CONFIRMED and not misfits(spec.data, view.data_schema):
                sites.append((name, view.rows, given or view.policy.budget))
    if not sites:
        raise typer.BadParameter("no confirmed dataset of the service fits the job: give the sites' sizes with --rows")
    return sites


def _plain(found: Outlook) -> dict[str, Any]:
    """Dataclasses and models as JSON values."""
    plain = asdict(found)
    for one, shown in zip(found.datasets, plain["datasets"], strict=True):
        shown["plan"] = None if one.plan is None else one.plan.model_dump(mode="json")
    return plain
