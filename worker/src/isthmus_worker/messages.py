"""What the agent and its training process say to each other: JSON lines over the child's standard input and output."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from isthmus.wire.base import Digest, Finite
from isthmus.wire.data import DatasetSchema
from isthmus.wire.models import EntryPoint
from isthmus.wire.rounds import TaskOffer
from isthmus_worker.likeness import Sketch
from isthmus_worker.settings import DatasetSettings


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Warm(_Message):
    """Import torch now: work is about to come."""

    order: Literal["warm"] = "warm"


class Describe(_Message):
    """Tell the columns and the number of records of a dataset."""

    order: Literal["describe"] = "describe"
    dataset: DatasetSettings
    known: str | None = None
    """Stamp of the file when its content was taken last; it is not taken again from the same file."""


class Work(_Message):
    """Do a task whose offer the agent has checked."""

    order: Literal["work"] = "work"
    number: int
    """Counts the orders of one child, so that a cancellation finds the right one."""
    offer: TaskOffer
    dataset: DatasetSettings
    model_path: Path | None
    """None: the task needs no model."""
    upload_path: Path
    holdout_key: str
    """In hexadecimal."""
    entry_points: tuple[EntryPoint, ...]
    """Model functions that this organization allows."""
    min_rows: int
    """Fewest training records, and fewest held-out ones behind numbers that leave as they are."""
    tell_counts: bool
    """Whether a refusal may tell the service how many records are concerned; never with a privacy unit."""


class MaskKey(_Message):
    """One mask of an update: a stream of numbers that is added to it, or taken off."""

    key: Digest = Field(repr=False)
    """In hexadecimal."""
    sign: Literal[1, -1]


class Mask(_Message):
    """Write the masked update of a secured round, from the vector that is kept."""

    order: Literal["mask"] = "mask"
    number: int
    offer: TaskOffer
    vector_path: Path
    masked_path: Path
    masks: tuple[MaskKey, ...] = Field(repr=False)
    weight_share: float
    """The update's weight over the largest of the roster."""


class Cancel(_Message):
    """Stop working on this order."""

    order: Literal["cancel"] = "cancel"
    number: int


class Alive(_Message):
    """Said by the thread that works, as it works."""

    answer: Literal["alive"] = "alive"
    progress: float = 0.0


class Content(_Message):
    """What stands for the content of a file. It stays with the worker."""

    stamp: str
    """Changes whenever the file does."""
    digest: Digest
    """SHA-256 of the file."""
    sketch: Sketch | None
    """Of the records of a CSV file, by which an edited copy is known again."""


class Described(_Message):
    """What a dataset holds: no values."""

    answer: Literal["described"] = "described"
    data_schema: DatasetSchema
    rows: int
    content: Content | None = None
    """None: it is no file, or the one that is known."""


class Done(_Message):
    """The upload is in its file."""

    answer: Literal["done"] = "done"
    digest: str
    size_bytes: int
    metrics: dict[str, Finite]
    """What was measured, whether or not it is part of the upload."""


class Refusal(_Message):
    """The data cannot serve this task: that will not change within the round."""

    answer: Literal["refusal"] = "refusal"
    reason: str
    """For the service: names columns, and counts only where the policy lets them leave; never a value."""
    where: str = ""
    """For the log of this worker."""


class Failure(_Message):
    """The work broke."""

    answer: Literal["failure"] = "failure"
    reason: str
    where: str = ""


class Cancelled(_Message):
    """Stopped as asked."""

    answer: Literal["cancelled"] = "cancelled"


Order = Warm | Describe | Work | Mask | Cancel
Answer = Alive | Described | Done | Refusal | Failure | Cancelled

ORDERS: Final[TypeAdapter[Order]] = TypeAdapter(Annotated[Order, Field(discriminator="order")])
ANSWERS: Final[TypeAdapter[Answer]] = TypeAdapter(Annotated[Answer, Field(discriminator="answer")])
