"""`isthmus simulate`"""

import os
from pathlib import Path
from typing import Annotated

import typer

from isthmus.commands.exits import ExitCode
from isthmus.commands.options import Json
from isthmus.commands.session import surroundings, write_json
from isthmus.jobfile import load_job


def simulate(
    ctx: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(help="The job, as YAML.")],
    data: Annotated[
        Path | None, typer.Option(help="Records to cut into clients: a .csv or .npz file.", show_default=False)
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="With --data: into how many clients.")] = 10,
    partition: Annotated[
        str, typer.Option(help="With --data: how they are cut: iid, classes:2 or dirichlet:0.5, with your number.")
    ] = "iid",
    seed: Annotated[int, typer.Option(min=0, help="With --data: the seed of the cut. (The job has its own.)")] = 0,
    min_rows: Annotated[int, typer.Option(min=1, help="With --data: fewest records of a client.")] = 10,
    clients_file: Annotated[
        Path | None, typer.Option(help="Instead of --data: a TOML file that lists the clients.", show_default=False)
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="Records that no client holds: every model is measured on them.", show_default=False),
    ] = None,
    drop_shared: Annotated[
        bool, typer.Option("--drop-shared", help="Take records that a client holds out of the test set.")
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="The initial model as safetensors (default: drawn from the job's seed).")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many train at once (default: as many as there are cores).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the model, the rounds and the pictures.")] = Path("simulation"),
    as_json: Json = False,
) -> None:
    """Run a job on this machine, over clients that it plays: no service, no network, the same model."""
    from isthmus_worker.simulation import conduct  # noqa: PLC0415 - NumPy is loaded where something is simulated

    around = surroundings(ctx)
    source: conduct.Cut | Path
    if data is not None and clients_file is None:
        source = conduct.Cut(data, clients, partition, seed, min_rows)
    elif clients_file is not None and data is None:
        source = clients_file
    else:
        raise typer.BadParameter("say who takes part: either with --data FILE or with --clients-file FILE")
    plan = conduct.Plan(
        spec=load_job(file),
        source=source,
        test=test,
        drop_shared=drop_shared,
        model=model,
        out=out,
        processes=processes or _cores(),
    )
    try:
        told = conduct.conduct(plan, around)
    except conduct.REFUSALS as refusal:
        around.complain(conduct.sentence(refusal))
        raise typer.Exit(ExitCode.USAGE) from None
    except conduct.SimulationFailed as failed:
        around.complain(str(failed))
        raise typer.Exit(ExitCode.JOB_UNSUCCESSFUL) from None
    if as_json:
        write_json(around, told.json)
    else:
        around.out.print(told.table)
        for line in told.lines:
            around.out.print(line, soft_wrap=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
