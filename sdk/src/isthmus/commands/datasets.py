"""`isthmus dataset ...`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.commands.lookup import dataset_id
from isthmus.commands.options import Json
from isthmus.commands.rendering.datasets import dataset_text, datasets_table, ledger_text, policy_text
from isthmus.commands.session import connected, plain, write_json
from isthmus.jobfile import load
from isthmus.privacy.chain import verify
from isthmus.wire.datasets import AutomaticApproval, UsePolicy
from isthmus.wire.models import ModelKind
from isthmus.wire.privacy import PrivacyMode

app = typer.Typer(no_args_is_help=True, help="Datasets: what workers can read, as metadata.")

Reference = Annotated[str, typer.Argument(metavar="DATASET", help="Its name, organization/name or id.")]


@app.command("list")
def list_all(ctx: typer.Context, as_json: Json = False) -> None:
    """All datasets that you may see."""
    with connected(ctx) as at:
        at.show_all(at.client.datasets.list(), datasets_table, as_json)


@app.command()
def show(ctx: typer.Context, dataset: Reference, as_json: Json = False) -> None:
    """One dataset: its columns and its policy."""
    with connected(ctx) as at:
        at.show(at.client.datasets.get(dataset_id(at.client, dataset)), dataset_text, as_json)


@app.command()
def confirm(
    ctx: typer.Context,
    dataset: Reference,
    other_records: Annotated[
        bool,
        typer.Option("--other-records", help="The budget begins anew; only if these are other records than before."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Confirm that announced data is yours. Only confirmed datasets take part in jobs.

    The dataset keeps its budget and what was spent of it, whichever worker serves it now.
    """
    with connected(ctx) as at:
        found = dataset_id(at.client, dataset)
        at.show(at.client.datasets.confirm(found, other_records=other_records), dataset_text, as_json)


@app.command()
def retire(ctx: typer.Context, dataset: Reference, as_json: Json = False) -> None:
    """Take a dataset out of use."""
    with connected(ctx) as at:
        at.show(at.client.datasets.retire(dataset_id(at.client, dataset)), dataset_text, as_json)


@app.command()
def ledger(ctx: typer.Context, dataset: Reference, as_json: Json = False) -> None:
    """What a dataset's privacy budget was reserved and spent for; every entry's hash is checked on the way."""
    with connected(ctx) as at:
        found = at.client.datasets.get(dataset_id(at.client, dataset))
        entries = list(at.client.datasets.ledger(found.id))
        verify(entries)
        if as_json:
            write_json(at.around, {"budget": found.budget and plain(found.budget), "entries": [*map(plain, entries)]})
        else:
            at.around.out.print(ledger_text(found, entries))


@app.command()
def policy(
    ctx: typer.Context,
    *,
    dataset: Reference,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A YAML file that replaces the whole policy.")
    ] = None,
    purpose: Annotated[list[str] | None, typer.Option(help="A purpose that is allowed; repeat it for more.")] = None,
    researcher: Annotated[list[str] | None, typer.Option(help="A principal who may ask; repeat it for more.")] = None,
    any_researcher: Annotated[bool, typer.Option("--any-researcher", help="Anybody of the platform may ask.")] = False,
    model_kind: Annotated[list[ModelKind] | None, typer.Option(help="A kind of model that is allowed.")] = None,
    mode: Annotated[list[PrivacyMode] | None, typer.Option(help="A privacy mode that is allowed.")] = None,
    max_epsilon: Annotated[float | None, typer.Option(help="The largest epsilon of one job.")] = None,
    max_delta: Annotated[float | None, typer.Option(help="The largest delta of one job.")] = None,
    budget: Annotated[float | None, typer.Option(help="Epsilon of all jobs together, for ever.")] = None,
    max_clip_norm: Annotated[float | None, typer.Option(help="The longest update of a job without privacy.")] = None,
    min_cohort: Annotated[int | None, typer.Option(help="The fewest updates a round may close with.")] = None,
    max_rounds: Annotated[int | None, typer.Option(help="The most rounds of a job.")] = None,
    exact_metrics: Annotated[
        bool | None, typer.Option("--exact-metrics/--no-exact-metrics", help="May loss and accuracy leave un-noised?")
    ] = None,
    exact_statistics: Annotated[
        bool | None, typer.Option("--exact-statistics/--no-exact-statistics", help="May means leave un-noised?")
    ] = None,
    secure_aggregation: Annotated[
        bool | None,
        typer.Option(
            "--require-secure-aggregation/--no-require-secure-aggregation", help="May updates only leave masked?"
        ),
    ] = None,
    approve_by_rule: Annotated[
        bool | None,
        typer.Option("--approve-by-rule/--ask-a-steward", help="Grant jobs within the policy without asking?"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a dataset's policy; or tighten the clauses that are given, and leave the others as they are.

    What the worker's own configuration forbids cannot be allowed here.
    """
    changes = _changes(
        purposes=tuple(purpose) if purpose else None,
        principals=tuple(researcher) if researcher else None,
        model_kinds=tuple(model_kind) if model_kind else None,
        modes=tuple(mode) if mode else None,
        max_epsilon=max_epsilon,
        max_delta=max_delta,
        max_clip_norm=max_clip_norm,
        min_cohort=min_cohort,
        max_rounds=max_rounds,
        allow_exact_metrics=exact_metrics,
        allow_exact_statistics=exact_statistics,
        require_secure_aggregation=secure_aggregation,
        automatic_approval=AutomaticApproval() if approve_by_rule else None,
    )
    if any_researcher:
        changes["principals"] = None
    if approve_by_rule is False:
        changes["automatic_approval"] = None
    if file is not None and (changes or budget is not None):
        raise typer.BadParameter("--file replaces the whole policy; it goes with no other clause")
    wanted = load(file, UsePolicy) if file is not None else None
    with connected(ctx) as at:
        found = at.client.datasets.get(dataset_id(at.client, dataset))
        if wanted is None and budget is not None:
            delta = found.policy.budget.delta if found.policy.budget is not None else 1e-5
            changes["budget"] = {"epsilon": budget, "delta": delta}
        if wanted is None and changes:
            wanted = UsePolicy.model_validate({**plain(found.policy), **changes})
        if wanted is not None:
            found = at.client.datasets.set_policy(found.id, wanted)
        if as_json:
            write_json(at.around, plain(found.policy))
        else:
            at.around.out.print(policy_text(found))


def _changes(**given: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}
