"""Addresses of datasets."""

from typing import Annotated, Final
from uuid import UUID

from fastapi import APIRouter, Body

from app.datasets import queries, service
from app.dependencies import Agent, DatasetReader, DatasetWriter, Transaction
from app.pagination import Page as Paging
from app.problems import refuses
from isthmus.wire.base import Name, Page
from isthmus.wire.datasets import AnnounceDataset, ConfirmDataset, DatasetView, UsePolicy
from isthmus.wire.problems import ProblemCode

router = APIRouter(prefix="/datasets", tags=["datasets"])

Announcement = Annotated[
    AnnounceDataset,
    Body(
        openapi_examples={
            "heart disease": {
                "value": {
                    "data_schema": {
                        "columns": [
                            {"name": "age", "kind": "number"},
                            {"name": "chol", "kind": "number", "missing": True},
                            {"name": "disease", "kind": "number"},
                        ]
                    },
                    "rows": 303,
                    "description": "Angiography patients, 1981 to 1984",
                    "policy": {"purposes": ["heart disease research"], "budget": {"epsilon": 10.0, "delta": 1e-5}},
                    "lineage": "6c1f0b2ad6c0f9d5a0f6f1a5a2b4d7c3e8f9a0b1c2d3e4f5061728394a5b6c7d",
                    "signed_at": "2026-01-31T12:00:00Z",
                    "signature": "00" * 64,
                }
            }
        }
    ),
]
Policy = Annotated[
    UsePolicy,
    Body(
        openapi_examples={
            "one purpose, records hidden, at most epsilon 3 a job": {
                "value": {
                    "purposes": ["heart disease research"],
                    "modes": ["record"],
                    "budget": {"epsilon": 10.0, "delta": 1e-5},
                    "max_epsilon": 3.0,
                }
            },
            "closed": {"value": {}},
        }
    ),
]

Confirmation = Annotated[
    ConfirmDataset,
    Body(
        openapi_examples={
            "the budget stays": {"value": {}},
            "other records, with a budget of their own": {"value": {"other_records": True}},
        }
    ),
]
SAME_RECORDS: Final = ConfirmDataset()


@router.put(
    "/{name}",
    summary="Announce a dataset",
    responses=refuses(ProblemCode.DATASET_SERVED_ELSEWHERE, ProblemCode.POLICY_SIGNATURE_INVALID),
)
async def announce_dataset(name: Name, body: Announcement, caller: Agent, session: Transaction) -> DatasetView:
    """Say which columns and how many rows this worker can read under a name, and what for; repeating it is safe.

    Policy and lineage are signed by the worker's own key. A policy that allows more than the last one waits for the
    steward, one that allows less is in force at once, and one that was signed before the last one is refused.
    """
    return await service.announce_dataset(session, name, body, caller=caller)


@router.get("", summary="List datasets", responses=refuses(ProblemCode.CURSOR_INVALID))
async def list_datasets(caller: DatasetReader, session: Transaction, paging: Paging) -> Page[DatasetView]:
    """List the datasets of the caller's organization; a researcher sees those confirmed anywhere, an admin all."""
    return await queries.page_datasets(session, paging, caller=caller)


@router.get("/{dataset_id}", summary="Read a dataset", responses=refuses(ProblemCode.NOT_FOUND))
async def get_dataset(dataset_id: UUID, caller: DatasetReader, session: Transaction) -> DatasetView:
    """Read the metadata and the policy of a dataset."""
    return await queries.get_view(session, dataset_id, caller=caller)


@router.post(
    "/{dataset_id}/confirm",
    summary="Confirm a dataset",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT),
)
async def confirm_dataset(
    dataset_id: UUID, caller: DatasetWriter, session: Transaction, body: Confirmation = SAME_RECORDS
) -> DatasetView:
    """Let a dataset of one's own organization take part in jobs, as far as its policy goes; a body is optional.

    Its budget stays, with what was spent of it, even where another worker announced another lineage. Only with
    `other_records` does the budget begin anew.
    """
    return await service.confirm_dataset(session, dataset_id, body, caller=caller)


@router.post("/{dataset_id}/retire", summary="Retire a dataset", responses=refuses(ProblemCode.NOT_FOUND))
async def retire_dataset(dataset_id: UUID, caller: DatasetWriter, session: Transaction) -> DatasetView:
    """Take a dataset of one's own organization out of all future rounds; its ledger stays."""
    return await service.retire_dataset(session, dataset_id, caller=caller)


@router.put(
    "/{dataset_id}/policy",
    summary="Tighten the use policy",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.POLICY_LOOSENED),
)
async def set_policy(dataset_id: UUID, body: Policy, caller: DatasetWriter, session: Transaction) -> DatasetView:
    """Say what of its worker's own policy holds for a dataset; this replaces what was said before.

    No clause may allow more than `announced_policy` does. Whether jobs are granted by rule is decided here alone.
    """
    return await service.set_policy(session, dataset_id, body, caller=caller)
