"""The version of the contract and how a client states its own."""

from typing import Final

API_PREFIX: Final = "/v1"
CONTRACT_VERSION: Final = "1.0"

TENSORS_MEDIA_TYPE: Final = "application/vnd.safetensors"
SECAGG_MEDIA_TYPE: Final = "application/vnd.isthmus.secagg"
PROBLEM_MEDIA_TYPE: Final = "application/problem+json"
EVENTS_MEDIA_TYPE: Final = "text/event-stream"

FENCE_HEADER: Final = "Isthmus-Fence"
IDEMPOTENCY_HEADER: Final = "Idempotency-Key"
DIGEST_HEADER: Final = "Repr-Digest"
