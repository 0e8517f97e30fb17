"""Datasets as metadata, their policies and their ledgers."""

from collections.abc import Iterator
from uuid import UUID

from isthmus.client._service import Service, segment
from isthmus.wire.base import Page
from isthmus.wire.datasets import AnnounceDataset, ConfirmDataset, DatasetView, UsePolicy
from isthmus.wire.ledger import LedgerEntryView, LedgerPage


class Datasets:
    """`client.datasets`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def announce(self, name: str, body: AnnounceDataset) -> DatasetView:
        """A worker says which data it can read and what for, signed. It may be repeated, also with other metadata."""
        return self._service.ask("PUT", f"datasets/{segment(name)}", DatasetView, body)

    def list(self) -> Iterator[DatasetView]:
        """Every dataset that this key may see; pages are read as they are needed."""
        return self._service.pages("datasets", Page[DatasetView])

    def page(self, *, limit: int | None = None, cursor: str | None = None) -> Page[DatasetView]:
        """One page of the list."""
        return self._service.ask("GET", "datasets", Page[DatasetView], query={"limit": limit, "cursor": cursor})

    def get(self, dataset_id: UUID) -> DatasetView:
        """One dataset."""
        return self._service.ask("GET", f"datasets/{dataset_id}", DatasetView)

    def confirm(self, dataset_id: UUID, other_records: bool = False) -> DatasetView:
        """A steward confirms that the announced data is the organization's; only then is it asked for in jobs.

        With `other_records` the budget begins anew. Say so only if these are other records than were announced under
        this name before, and the worker gave them another lineage.
        """
        body = ConfirmDataset(other_records=other_records)
        return self._service.ask("POST", f"datasets/{dataset_id}/confirm", DatasetView, body)

    def retire(self, dataset_id: UUID) -> DatasetView:
        """Take a dataset out of use."""
        return self._service.ask("POST", f"datasets/{dataset_id}/retire", DatasetView)

    def set_policy(self, dataset_id: UUID, policy: UsePolicy) -> DatasetView:
        """Say what of the worker's own policy holds for the dataset: tighten it, as it cannot be loosened here."""
        return self._service.ask("PUT", f"datasets/{dataset_id}/policy", DatasetView, policy)

    def ledger(self, dataset_id: UUID) -> Iterator[LedgerEntryView]:
        """Everything that was promised and released of the dataset's records; pages are read as they are needed."""
        return self._service.pages(f"datasets/{dataset_id}/ledger", LedgerPage)

    def ledger_page(self, dataset_id: UUID, *, limit: int | None = None, cursor: str | None = None) -> LedgerPage:
        """One page of the ledger, and where the budget stands."""
        return self._service.ask(
            "GET", f"datasets/{dataset_id}/ledger", LedgerPage, query={"limit": limit, "cursor": cursor}
        )
