"""Whether a receipt is the service's. The cryptography is loaded with the first receipt: only workers get any."""

from isthmus.client.errors import IsthmusError
from isthmus.wire.rounds import UpdateReceipt, receipt_bytes


class ReceiptInvalid(IsthmusError):
    """The receipt was not signed by the service that the worker enrolled with."""


def verify_receipt(receipt: UpdateReceipt, service_public_key: str) -> None:
    """Check a receipt against the key that was pinned at enrolment. It returns only if the signature holds.

    Args:
        receipt: as `tasks.submit_update` gave it.
        service_public_key: 32 bytes in hexadecimal, `WorkerEnrolled.service_public_key`.

    Raises:
        ReceiptInvalid: the signature is not that key's over this receipt.
        ValueError: `service_public_key` is no Ed25519 public key.
    """
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - see above
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(service_public_key))
    signed = receipt_bytes(receipt.task_id, receipt.digest, receipt.received_at)
    try:
        key.verify(bytes.fromhex(receipt.signature), signed)
    except (InvalidSignature, ValueError):
        raise ReceiptInvalid(
            f"The receipt for task {receipt.task_id} does not carry the signature of the service's pinned key."
        ) from None
