"""What a simulation and its processes say to each other: one JSON line each way. Arrays go through regions."""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from isthmus.wire.base import Finite
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import Manifest
from isthmus.wire.privacy import PrivacyPlan
from isthmus_worker.simulation.regions import Place


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExamplesAt(_Message):
    """Encoded records in the region of records."""

    inputs: Place
    targets: Place


class ClientAt(_Message):
    """A client's records, in two parts that share no row."""

    training: ExamplesAt
    holdout: ExamplesAt


class Begin(_Message):
    """The job, and where everything lies. Comes first, and again where another job follows."""

    order: Literal["begin"] = "begin"
    spec: JobSpec
    manifest: Manifest
    clients: list[ClientAt]
    plans: list[PrivacyPlan | None]
    """What the job's privacy section becomes at each of them."""
    test: list[ExamplesAt]
    """The test set, in pieces that are measured apart."""
    model: dict[str, Place]
    slots: list[dict[str, Place]]
    """Where updates go, one place a member of the cohort."""


class Draw(_Message):
    """Draw the initial model into the region of the model."""

    order: Literal["draw"] = "draw"


class Train(_Message):
    """One client's part in a training round."""

    order: Literal["train"] = "train"
    client: int
    round_number: int
    seed: str
    slot: int
    weight_share: float = 1.0
    """Its weight over the largest of the cohort: what its whole numbers are counted by, in a secured job."""


class Evaluate(_Message):
    """Measure the model on the records that a client holds out."""

    order: Literal["evaluate"] = "evaluate"
    client: int
    seed: str


class Test(_Message):
    """Measure the model on a piece of the test set."""

    order: Literal["test"] = "test"
    piece: int
    seed: str


class Finished(_Message):
    """It is done; arrays are where they belong."""

    answer: Literal["finished"] = "finished"
    metrics: dict[str, Finite] = {}


class Failed(_Message):
    """It cannot be done, in words for people."""

    answer: Literal["failed"] = "failed"
    reason: str


Order = Begin | Draw | Train | Evaluate | Test
Answer = Finished | Failed

ORDERS: Final[TypeAdapter[Order]] = TypeAdapter(Annotated[Order, Field(discriminator="order")])
ANSWERS: Final[TypeAdapter[Answer]] = TypeAdapter(Annotated[Answer, Field(discriminator="answer")])
