"""Refusals. Each class names a fact; anything else that is raised is a bug and stays a 500."""

from collections.abc import Sequence
from uuid import UUID

from isthmus.wire.problems import FieldProblem, ProblemCode


class PlatformError(Exception):
    """A refusal of the catalogue, with a sentence that says what was wrong and what to do."""

    code: ProblemCode

    def __init__(self, detail: str, *, errors: Sequence[FieldProblem] = (), retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)
        self.retry_after_s = retry_after_s


class Unauthenticated(PlatformError):
    """No key, or none that this service issued."""

    code = ProblemCode.UNAUTHENTICATED

    def __init__(self) -> None:
        super().__init__("Send `Authorization: Bearer isk_...` with a key that this service issued.")


class KeyExpired(PlatformError):
    """The key was good once."""

    code = ProblemCode.KEY_EXPIRED

    def __init__(self) -> None:
        super().__init__("This API key has expired. Ask an admin of the platform for a new one.")


class KeyRevoked(PlatformError):
    """Somebody ended the key, its principal or its worker."""

    code = ProblemCode.KEY_REVOKED

    def __init__(self) -> None:
        super().__init__("This API key was revoked. Ask an admin of the platform for a new one.")


class Forbidden(PlatformError):
    """The caller is known, but may not do that."""

    code = ProblemCode.FORBIDDEN


class NotFound(PlatformError):
    """Missing or another's: the answer is the same."""

    code = ProblemCode.NOT_FOUND

    def __init__(self, noun: str, key: UUID | str | int) -> None:
        super().__init__(f"There is no {noun} {key} that this key may see.")


class EnrollmentRefused(PlatformError):
    """A token that is unknown, used or expired: the answer does not say which."""

    code = ProblemCode.ENROLLMENT_REFUSED

    def __init__(self) -> None:
        super().__init__("The enrolment token is unknown, used or expired. Ask your steward or admin for a new one.")


class InvalidRequest(PlatformError):
    """Well-formed JSON that asks for something impossible."""

    code = ProblemCode.INVALID_REQUEST


class BodyTooLarge(PlatformError):
    """More bytes than this address takes."""

    code = ProblemCode.BODY_TOO_LARGE


class LengthRequired(PlatformError):
    """A body of tensors states its length before it is sent."""

    code = ProblemCode.LENGTH_REQUIRED


class UnsupportedMediaType(PlatformError):
    """Another kind of body than this address takes."""

    code = ProblemCode.UNSUPPORTED_MEDIA_TYPE


class RangeNotSatisfiable(PlatformError):
    """A range that begins after the end."""

    code = ProblemCode.RANGE_NOT_SATISFIABLE


class CursorInvalid(PlatformError):
    """A cursor that no list of ours gave out."""

    code = ProblemCode.CURSOR_INVALID

    def __init__(self) -> None:
        super().__init__("Give the `next_cursor` of the page before, unchanged, or none for the first page.")


class IdempotencyConflict(PlatformError):
    """One key, two different bodies."""

    code = ProblemCode.IDEMPOTENCY_CONFLICT

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used with another body in the last 24 hours. Use a new key.")


class SecretShownOnce(PlatformError):
    """A repeated creation whose answer held a secret."""

    code = ProblemCode.SECRET_SHOWN_ONCE

    def __init__(self) -> None:
        super().__init__("It was created by an earlier request with this Idempotency-Key; create or rotate a new one.")


class NameTaken(PlatformError):
    """Names are given once."""

    code = ProblemCode.NAME_TAKEN

    def __init__(self, noun: str, name: str) -> None:
        super().__init__(f"The name {name!r} of a new {noun} is taken. Names are never reused; choose another.")


class StateConflict(PlatformError):
    """Asked at the wrong time."""

    code = ProblemCode.STATE_CONFLICT


class JobNotDraft(PlatformError):
    """The job was started already."""

    code = ProblemCode.JOB_NOT_DRAFT


class JobNotRunning(PlatformError):
    """A task of a job that is paused or over."""

    code = ProblemCode.JOB_NOT_RUNNING


class ModelMissing(PlatformError):
    """A job cannot start from nothing."""

    code = ProblemCode.MODEL_MISSING

    def __init__(self) -> None:
        super().__init__("Upload the initial model with PUT /v1/jobs/{id}/model before starting the job.")


class NoMatchingDataset(PlatformError):
    """Too few datasets could ever take part."""

    code = ProblemCode.NO_MATCHING_DATASET


class GrantRefusedByPolicy(PlatformError):
    """The dataset's own policy forbids the grant."""

    code = ProblemCode.GRANT_REFUSED_BY_POLICY


class PrivacyImpossible(PlatformError):
    """No noise reaches what the job promises."""

    code = ProblemCode.PRIVACY_IMPOSSIBLE


class BudgetExhausted(PlatformError):
    """More would be promised or released than all jobs together may learn."""

    code = ProblemCode.BUDGET_EXHAUSTED


class PolicyLoosened(PlatformError):
    """A steward's policy that would allow more than the worker's own."""

    code = ProblemCode.POLICY_LOOSENED


class PolicySignatureInvalid(PlatformError):
    """A policy that the dataset's worker did not sign, or not last."""

    code = ProblemCode.POLICY_SIGNATURE_INVALID


class LedgerTampered(PlatformError):
    """A ledger's entries are not those that were written."""

    code = ProblemCode.LEDGER_TAMPERED


class DatasetServedElsewhere(PlatformError):
    """One dataset, one worker."""

    code = ProblemCode.DATASET_SERVED_ELSEWHERE


class DatasetNotConfirmed(PlatformError):
    """The dataset was retired, or its columns changed, since the task was offered."""

    code = ProblemCode.DATASET_NOT_CONFIRMED

    def __init__(self) -> None:
        super().__init__("The dataset is not confirmed: nothing of it is taken until its steward confirms it.")


class LeaseLost(PlatformError):
    """The fence has moved on."""

    code = ProblemCode.LEASE_LOST

    def __init__(self) -> None:
        super().__init__("The lease of this task was taken away and the task is offered anew: claim again.")


class TaskNotOpen(PlatformError):
    """The task is over."""

    code = ProblemCode.TASK_NOT_OPEN


class TaskNotClaimed(PlatformError):
    """Nobody holds the task, so nobody can hand in for it."""

    code = ProblemCode.TASK_NOT_CLAIMED

    def __init__(self) -> None:
        super().__init__("Claim the task before working on it.")


class RoundNotCollecting(PlatformError):
    """An update arrived for a round that is not collecting."""

    code = ProblemCode.ROUND_NOT_COLLECTING

    def __init__(self, phase: str) -> None:
        super().__init__(f"The round is {phase}; it takes updates only while collecting.")


class GrantWithdrawn(PlatformError):
    """The participation is no longer approved."""

    code = ProblemCode.GRANT_WITHDRAWN

    def __init__(self, state: str) -> None:
        super().__init__(f"The participation is {state}: nothing of this dataset is taken for this job any more.")


class UpdateConflict(PlatformError):
    """Other bytes than those that were charged for."""

    code = ProblemCode.UPDATE_CONFLICT

    def __init__(self) -> None:
        super().__init__(
            "Other bytes were admitted for this dataset in this round. A second noising of the same data would be a "
            "second release: send the first bytes again."
        )


class StepClosed(PlatformError):
    """A step of a secured round went on without this member, or the round is over."""

    code = ProblemCode.STEP_CLOSED


class StepConflict(PlatformError):
    """Another message than the one that is in."""

    code = ProblemCode.STEP_CONFLICT

    def __init__(self, step: str) -> None:
        super().__init__(
            f"Another message of step {step} came from this participation in this attempt: send that one again, or "
            "wait for the next attempt."
        )


class StepMessageInvalid(PlatformError):
    """Not what the step takes, or not yet."""

    code = ProblemCode.MESSAGE_INVALID


class DigestMismatch(PlatformError):
    """The body is not what its header declared."""

    code = ProblemCode.DIGEST_MISMATCH


class LengthMismatch(PlatformError):
    """The body ended early or ran on."""

    code = ProblemCode.LENGTH_MISMATCH


class TensorsMismatch(PlatformError):
    """Not the tensors of the manifest."""

    code = ProblemCode.TENSORS_MISMATCH


class NormTooLarge(PlatformError):
    """Longer than clipping and noise can explain."""

    code = ProblemCode.NORM_TOO_LARGE


class NotReady(PlatformError):
    """A part that the service needs does not answer."""

    code = ProblemCode.NOT_READY
