"""The ledger of a dataset: what its privacy budget was reserved and spent for, in an order that nobody can change."""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import Field

from isthmus.wire.base import Page, Response


class LedgerKind(StrEnum):
    """What an entry says."""

    RESERVE = "reserve"  # a grant's whole cost, when it is approved
    SPEND = "spend"  # one release, before a byte of it is read
    REFUND = "refund"  # what of a reservation was never released, once its grant or job is over


class LedgerEntryView(Response):
    """One entry. Costs are RDP at the orders of `orders_version`, in whole billionths; they add up exactly."""

    id: UUID
    sequence: int
    kind: LedgerKind
    lineage: str
    dataset_id: UUID
    job_id: UUID
    participation_id: UUID
    round_number: int | None
    """None for reservations and refunds, which are of many rounds."""
    release: str | None
    """What was released: `train`, `statistics` or `evaluate`."""
    mode: str
    """The job's privacy mode. `none` costs nothing here because nothing bounds what it tells."""
    event: dict[str, Any] | None
    """The mechanism, from which the cost can be computed again; None where nothing is claimed."""
    orders_version: str
    rdp_nano: list[int]
    draws: int
    """Integer noise coordinates drawn: the sampler adds 2^-63 to delta for each."""
    elements: int
    digest: str | None
    """The released bytes."""
    reserved_epsilon: float
    """Epsilon of everything reserved and spent, at the budget's delta, after this entry."""
    spent_epsilon: float
    """Epsilon of everything spent, at the budget's delta, after this entry."""
    created_at: datetime
    previous_hash: str
    hash: str
    """SHA-256 over this entry and the one before, see `isthmus.privacy.chain`."""


class BudgetView(Response):
    """Where a dataset's privacy budget stands, over all jobs."""

    epsilon: float
    delta: float
    spent_epsilon: float
    """Of everything that was released."""
    reserved_epsilon: float
    """Of everything that was released or is promised to running jobs; never above `epsilon`, but for one that was
    lowered later."""
    unaccounted_releases: int
    """Releases of jobs without a privacy unit: nothing bounds what they tell, and no budget counts them."""
    entries: int
    closed: bool
    """The budget was lowered below what was promised: nothing more is reserved or spent."""


class LedgerPage(Page[LedgerEntryView]):
    """One page of a dataset's ledger, and where its budget stands."""

    budget: BudgetView | None = Field(description="None: the dataset has no privacy budget.")
