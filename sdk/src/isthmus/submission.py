"""From a job as written to a job that runs: the draft, its initial model, the start. What `isthmus job submit` does."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from isthmus.client import Client, IsthmusError, Progress
from isthmus.wire.jobs import JobSpec, JobView
from isthmus.wire.models import ModelKind


class CannotDraw(IsthmusError):
    """The initial model cannot be made here; nothing was sent."""


def submit(
    client: Client,
    spec: JobSpec,
    model: Path | bytes | None = None,
    *,
    start: bool = True,
    on_created: Callable[[JobView], None] | None = None,
    progress: Progress | None = None,
) -> JobView:
    """Create the job, upload its initial model and start it.

    Args:
        model: the initial model as safetensors. None: the weights of a declared model are drawn, by torch, from the
            job's seed (the service's own, where `spec` names none), so that whoever has the spec can draw them again.
        start: False leaves a draft that has its model.
        on_created: called with the draft, before its model is there.

    Raises:
        CannotDraw: there is no model and none can be drawn. Nothing was sent.
        IsthmusError: as the calls of `client.jobs`. A draft that was created stays; the error's notes name it.
    """
    if model is None:
        require_drawable(spec)
    job = client.jobs.create(spec)
    try:
        if on_created is not None:
            on_created(job)
        job = client.jobs.upload_model(job.id, draw_model(job.spec) if model is None else model, progress=progress)
        return client.jobs.start(job.id) if start else job
    except IsthmusError as error:
        error.add_note(f"The draft {job.id} was created and is left as it is.")
        raise


def require_drawable(spec: JobSpec) -> None:
    """Raise CannotDraw unless `draw_model` can draw this job's initial model."""
    if spec.model.kind is ModelKind.ENTRY_POINT:
        raise CannotDraw(
            f"The model is the entry point {spec.model.entry_point!r}: its initial weights must be given, "
            "as a safetensors file (--model FILE)."
        )
    if find_spec("torch") is None:
        raise CannotDraw(
            "Drawing the initial weights needs torch, which is not installed here: pip install 'isthmus[torch]', "
            "or give them as a safetensors file (--model FILE)."
        )


def draw_model(spec: JobSpec) -> bytes:
    """The initial model of a declared job as safetensors: a function of its layers and its seed.

    Raises:
        CannotDraw: the model is an entry point, or torch is not installed.
        ValueError: the spec has no seed; the service's answer to `jobs.create` always has one.
    """
    require_drawable(spec)
    if spec.seed is None:
        raise ValueError("the job has no seed: take the spec from the draft that the service made")
    from isthmus.codec.arrays import encode  # noqa: PLC0415 - NumPy and torch only where something is drawn
    from isthmus.torch import draw_initial  # noqa: PLC0415

    return encode(draw_initial(spec.model, spec.seed))
