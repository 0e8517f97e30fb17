"""The catalogue of refusals (RFC 9457): a stable code, its status and its title, written once for server and client."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from isthmus.wire.base import Response


class ProblemCode(StrEnum):
    """Stable names of refusals. A code is never renamed and never changes its meaning."""

    # who asks
    UNAUTHENTICATED = "unauthenticated"
    KEY_EXPIRED = "key-expired"
    KEY_REVOKED = "key-revoked"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not-found"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    ENROLLMENT_REFUSED = "enrollment-refused"
    # what is asked
    INVALID_REQUEST = "invalid-request"
    POLICY_SIGNATURE_INVALID = "policy-signature-invalid"
    BODY_TOO_LARGE = "body-too-large"
    LENGTH_REQUIRED = "length-required"
    UNSUPPORTED_MEDIA_TYPE = "unsupported-media-type"
    RANGE_NOT_SATISFIABLE = "range-not-satisfiable"
    CURSOR_INVALID = "cursor-invalid"
    IDEMPOTENCY_CONFLICT = "idempotency-conflict"
    SECRET_SHOWN_ONCE = "secret-shown-once"  # noqa: S105 -- a name
    NAME_TAKEN = "name-taken"
    STATE_CONFLICT = "state-conflict"
    # jobs and participations
    JOB_NOT_DRAFT = "job-not-draft"
    JOB_NOT_RUNNING = "job-not-running"
    MODEL_MISSING = "model-missing"
    NO_MATCHING_DATASET = "no-matching-dataset"
    GRANT_REFUSED_BY_POLICY = "grant-refused-by-policy"
    PRIVACY_IMPOSSIBLE = "privacy-impossible"
    BUDGET_EXHAUSTED = "budget-exhausted"
    POLICY_LOOSENED = "policy-loosened"
    LEDGER_TAMPERED = "ledger-tampered"
    DATASET_SERVED_ELSEWHERE = "dataset-served-elsewhere"
    DATASET_NOT_CONFIRMED = "dataset-not-confirmed"
    # tasks and updates
    LEASE_LOST = "lease-lost"
    TASK_NOT_OPEN = "task-not-open"
    TASK_NOT_CLAIMED = "task-not-claimed"
    ROUND_NOT_COLLECTING = "round-not-collecting"
    GRANT_WITHDRAWN = "grant-withdrawn"
    UPDATE_CONFLICT = "update-conflict"
    STEP_CLOSED = "step-closed"
    STEP_CONFLICT = "step-conflict"
    MESSAGE_INVALID = "message-invalid"
    DIGEST_MISMATCH = "digest-mismatch"
    LENGTH_MISMATCH = "length-mismatch"
    NOT_SAFETENSORS = "not-safetensors"
    TENSORS_MISMATCH = "tensors-mismatch"
    NON_FINITE = "non-finite"
    NORM_TOO_LARGE = "norm-too-large"
    # the service
    TOO_MANY_REQUESTS = "too-many-requests"
    NOT_READY = "not-ready"
    INTERNAL = "internal"


class ProblemSpec(NamedTuple):
    """Status and title of a refusal."""

    status: int
    title: str


PROBLEMS: Final[Mapping[ProblemCode, ProblemSpec]] = MappingProxyType(
    {
        ProblemCode.UNAUTHENTICATED: ProblemSpec(401, "The request carries no valid API key"),
        ProblemCode.KEY_EXPIRED: ProblemSpec(401, "The API key has expired"),
        ProblemCode.KEY_REVOKED: ProblemSpec(401, "The API key was revoked"),
        ProblemCode.FORBIDDEN: ProblemSpec(403, "This key may not do that"),
        ProblemCode.NOT_FOUND: ProblemSpec(404, "There is nothing here that this key may see"),
        ProblemCode.METHOD_NOT_ALLOWED: ProblemSpec(405, "This address does not take that method"),
        ProblemCode.ENROLLMENT_REFUSED: ProblemSpec(403, "The enrolment token is not valid"),
        ProblemCode.INVALID_REQUEST: ProblemSpec(422, "The request does not fit the contract"),
        ProblemCode.POLICY_SIGNATURE_INVALID: ProblemSpec(422, "The policy is not signed by the dataset's worker"),
        ProblemCode.BODY_TOO_LARGE: ProblemSpec(413, "The body is larger than allowed"),
        ProblemCode.LENGTH_REQUIRED: ProblemSpec(411, "The request must state its Content-Length"),
        ProblemCode.UNSUPPORTED_MEDIA_TYPE: ProblemSpec(415, "The body has another media type than this address takes"),
        ProblemCode.RANGE_NOT_SATISFIABLE: ProblemSpec(416, "The range lies outside of the content"),
        ProblemCode.CURSOR_INVALID: ProblemSpec(400, "The cursor is not one of this list"),
        ProblemCode.IDEMPOTENCY_CONFLICT: ProblemSpec(422, "The idempotency key was used with another body"),
        ProblemCode.SECRET_SHOWN_ONCE: ProblemSpec(409, "This was created before, and its secret is shown only once"),
        ProblemCode.NAME_TAKEN: ProblemSpec(409, "The name is taken"),
        ProblemCode.STATE_CONFLICT: ProblemSpec(409, "The present state does not allow that"),
        ProblemCode.JOB_NOT_DRAFT: ProblemSpec(409, "The job is not a draft any more"),
        ProblemCode.JOB_NOT_RUNNING: ProblemSpec(409, "The job is not running"),
        ProblemCode.MODEL_MISSING: ProblemSpec(409, "The job has no initial model yet"),
        ProblemCode.NO_MATCHING_DATASET: ProblemSpec(409, "Too few datasets fit the job"),
        ProblemCode.GRANT_REFUSED_BY_POLICY: ProblemSpec(409, "The dataset's policy refuses this use"),
        ProblemCode.PRIVACY_IMPOSSIBLE: ProblemSpec(409, "No noise reaches the job's privacy target"),
        ProblemCode.BUDGET_EXHAUSTED: ProblemSpec(409, "The dataset's privacy budget does not allow it"),
        ProblemCode.POLICY_LOOSENED: ProblemSpec(409, "A policy may be tightened here, never loosened"),
        ProblemCode.LEDGER_TAMPERED: ProblemSpec(409, "The dataset's ledger was changed by hand"),
        ProblemCode.DATASET_SERVED_ELSEWHERE: ProblemSpec(409, "Another worker serves this dataset"),
        ProblemCode.DATASET_NOT_CONFIRMED: ProblemSpec(409, "The dataset is not confirmed by its steward"),
        ProblemCode.LEASE_LOST: ProblemSpec(409, "The lease was taken away; the task is offered anew"),
        ProblemCode.TASK_NOT_OPEN: ProblemSpec(409, "The task is over"),
        ProblemCode.TASK_NOT_CLAIMED: ProblemSpec(409, "The task is not held by this worker"),
        ProblemCode.ROUND_NOT_COLLECTING: ProblemSpec(409, "The round takes no updates"),
        ProblemCode.GRANT_WITHDRAWN: ProblemSpec(409, "The grant no longer holds"),
        ProblemCode.UPDATE_CONFLICT: ProblemSpec(409, "Another update was handed in or admitted for this task"),
        ProblemCode.STEP_CLOSED: ProblemSpec(409, "The step closed without this worker"),
        ProblemCode.STEP_CONFLICT: ProblemSpec(409, "Another message was sent for this step"),
        ProblemCode.MESSAGE_INVALID: ProblemSpec(422, "The message is not one that this step takes"),
        ProblemCode.DIGEST_MISMATCH: ProblemSpec(422, "The body does not have the digest that was declared"),
        ProblemCode.LENGTH_MISMATCH: ProblemSpec(422, "The body does not have the length that was declared"),
        ProblemCode.NOT_SAFETENSORS: ProblemSpec(422, "The body is not well-formed safetensors"),
        ProblemCode.TENSORS_MISMATCH: ProblemSpec(422, "The tensors are not those of the manifest"),
        ProblemCode.NON_FINITE: ProblemSpec(422, "The update holds NaN or an infinity"),
        ProblemCode.NORM_TOO_LARGE: ProblemSpec(422, "The update is longer than the clipping bound allows"),
        ProblemCode.TOO_MANY_REQUESTS: ProblemSpec(429, "Too many requests"),
        ProblemCode.NOT_READY: ProblemSpec(503, "The service is not ready"),
        ProblemCode.INTERNAL: ProblemSpec(500, "The service failed; this is a bug of ours"),
    }
)


class FieldProblem(Response):
    """One field that does not fit: where it stands in the body, and what is wrong with it."""

    field: str
    message: str


class Problem(Response):
    """A refusal as sent over the wire: `application/problem+json`."""

    type: str
    code: str
    status: int
    title: str
    detail: str
    instance: str | None = None
    errors: tuple[FieldProblem, ...] = ()
    """For `invalid-request`: every field that does not fit."""


def problem(code: ProblemCode, detail: str, **more: Any) -> Problem:
    """The problem document of a catalogued refusal."""
    spec = PROBLEMS[code]
    return Problem(
        type=f"urn:isthmus:problem:{code}", code=code, status=spec.status, title=spec.title, detail=detail, **more
    )
