"""What a worker tells of a dataset, under its own signature."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from isthmus.wire.datasets import AnnounceDataset, Handover, UsePolicy, announcement_bytes
from isthmus_worker.messages import Described
from isthmus_worker.settings import DatasetSettings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def signed_announcement(
    identity: "Ed25519PrivateKey",
    organization: str,
    dataset: DatasetSettings,
    *,
    policy: UsePolicy,
    described: Described,
    lineage: str,
    handover: Handover | None = None,
) -> AnnounceDataset:
    """The announcement of a dataset, signed now: its policy and its budget cannot be changed on their way.

    Args:
        identity: this worker's key, as the service has enrolled it.
        organization: ours.
        dataset: as it is configured.
        policy: what the configuration allows.
        described: what a child read of it.
        lineage: names its ledger.
        handover: by which we serve it, as long as the service has not heard of it.
    """
    signed_at = datetime.now(UTC)
    signed = announcement_bytes(organization, dataset.name, policy=policy, lineage=lineage, signed_at=signed_at)
    return AnnounceDataset(
        data_schema=described.data_schema,
        rows=described.rows,
        description=dataset.description,
        policy=policy,
        lineage=lineage,
        signed_at=signed_at,
        signature=identity.sign(signed).hex(),
        handover=handover,
    )
