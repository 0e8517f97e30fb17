"""Where a process can be hit: named places in the real programs, and on the wire between them.

Only the standard library is imported here: the programs under torture load this file at their start.
"""

from dataclasses import dataclass
from typing import Final

SERVER: Final = "server"  # answers workers
COORDINATOR: Final = "coordinator"  # sweeps and aggregates; may be the same process
AGENT: Final = "agent"
CHILD: Final = "child"  # the agent's training process


@dataclass(frozen=True)
class Point:
    """A function of a program; the point is passed just before it is called, or just after it returned."""

    name: str
    program: str
    module: str
    attribute: str
    when: str  # "before" or "after"
    words: str
    needs: str = ""
    """Another point: it is passed only after a process of a site was killed there."""
    variant: str = ""
    """The job that passes it, where not every one does."""


def _points(program: str, *rows: tuple[str, ...], variant: str = "") -> list[Point]:
    """Rows of (name, when, module:attribute, words), and what it needs if anything."""
    return [
        Point(name, program, *where.split(":"), when, *words, variant=variant) for name, when, where, *words in rows
    ]


_STEPS: Final = "app.rounds.secured.steps"
_CLOSING: Final = "app.rounds.secured.closing"
_AGAIN: Final = "app.rounds.secured.again"
_UNMASKING: Final = "app.rounds.secured.unmasking"
_SESSIONS: Final = "isthmus_worker.secured.records:Sessions"
_STANDING: Final = "isthmus_worker.secured.standing:Standing"
_SENDING: Final = "isthmus_worker.secured.sending"
_MASKING: Final = "isthmus_worker.secured.masking"

POINTS: Final[dict[str, Point]] = {
    point.name: point
    for point in [
        *_points(
            SERVER,
            ("offer-uncommitted", "after", "app.rounds.offers:claim_task", "offering: claimed, not committed"),
            ("offer-unanswered", "before", "isthmus.wire.rounds:TaskOffer.model_dump_json", "committed, not said"),
            ("admission-asked", "before", "app.rounds.uploads:admit_update", "an upload's headers are read"),
            ("ledger-charged", "after", "app.ledger.service:charge", "charged in the admission's transaction"),
            ("admission-uncommitted", "after", "app.rounds.uploads:admit_update", "admitted, not committed"),
            ("admission-unsaid", "before", "app.blobs:DirectoryBlobStore.receive", "committed, no 100 Continue yet"),
            ("update-spooled", "after", "app.blobs:_Spool.write", "collecting: some of a body is on the disk"),
            ("update-unnamed", "before", "app.blobs:_publish", "a body is synced and has no name"),
            ("update-durable", "before", "app.rounds.uploads:accept_update", "a body is durable, nothing knows of it"),
            ("accept-uncommitted", "after", "app.rounds.uploads:accept_update", "accepted, not committed"),
            ("receipt-unsent", "after", "app.rounds.uploads:receipt_of", "accepted, the receipt has not left"),
            ("round-due", "before", "app.rounds.closing:_freeze", "the last update is in, the set is not fixed"),
            ("freeze-uncommitted", "after", "app.rounds.closing:_freeze", "the set is fixed, not committed"),
            ("reoffer-uncommitted", "after", "app.rounds.closing:_offer_again", "offered anew", "in-an-epoch"),
            ("change-heard", "before", "app.wakeups:Wakeups._wake_workers", "a notification came, nobody was woken"),
        ),
        *_points(
            COORDINATOR,
            ("aggregation-begun", "before", "app.rounds.aggregation:_plan", "the round's lock is held"),
            ("aggregation-reading", "before", "app.rounds.aggregation:write_aggregate", "the updates are not read yet"),
            ("aggregate-half-written", "after", "isthmus.codec.blocks:TensorFileWriter.write_block", "half of the sum"),
            ("aggregate-written", "after", "app.rounds.aggregation:write_aggregate", "the sum is synced, a draft"),
            ("aggregate-stored", "after", "app.blobs:DirectoryBlobStore.adopt", "the sum has its name"),
            ("aggregate-unpublished", "before", "app.rounds.aggregation:_complete", "between aggregate and commit"),
            ("opening-next", "before", "app.rounds.opening:_open", "the next round is about to be opened"),
            ("opened-uncommitted", "after", "app.rounds.opening:_open", "the next round is open, not committed"),
            ("published-uncommitted", "after", "app.rounds.aggregation:_complete", "published, not committed"),
            ("published-untold", "after", "app.rounds.aggregation:aggregate_round", "between commit and notify"),
            ("sweep-begun", "before", "app.coordinator:sweep", "a sweep begins"),
            ("leases-uncommitted", "after", "app.coordinator:lapse_leases", "a lease is lost", "task-in-hand"),
            ("sweep-rounds", "before", "app.coordinator:list_due_rounds", "a sweep has done leases and grants"),
        ),
        *_points(
            COORDINATOR,
            ("noise-due", "before", "app.rounds.aggregation:spend_for_noise", "nothing is spent for central noise yet"),
            ("noise-spent", "after", "app.rounds.aggregation:spend_for_noise", "spent, with the key, not committed"),
            ("inputs-forgotten", "after", "app.rounds.aggregation:forget_inputs", "key and updates go, not committed"),
            variant="central",
        ),
        *_points(
            SERVER,
            ("step-asked", "before", f"{_STEPS}:take_message", "a message of a step came, nothing is locked"),
            ("step-checked", "after", f"{_STEPS}:_check", "a step's message is right, and not kept"),
            ("step-uncommitted", "after", f"{_STEPS}:take_message", "a message is kept, not committed"),
            ("step-unanswered", "after", f"{_STEPS}:find_answer", "committed, the answer has not left"),
            ("step-due", "before", f"{_CLOSING}:_close_early_step", "keys or shares are about to close"),
            ("step-closed", "after", f"{_CLOSING}:_close_early_step", "they closed, not committed"),
            ("survivors-due", "before", f"{_CLOSING}:_freeze", "the last masked update is in"),
            ("survivors-fixed", "after", f"{_CLOSING}:_freeze", "who is in the sum, not committed"),
            ("unmasking-due", "before", f"{_CLOSING}:_open_unmasking", "enough have signed the set"),
            ("unmasking-open", "after", f"{_CLOSING}:_open_unmasking", "shares may be told, not committed"),
            ("unmasked", "after", f"{_CLOSING}:_begin_aggregation", "enough were told, not committed"),
            variant="secured",
        ),
        *_points(
            COORDINATOR,
            ("secrets-rebuilt", "after", f"{_UNMASKING}:rebuild", "what is taken off is known, in memory"),
            ("sum-half-written", "after", "isthmus.federation.secured:exact_squares", "some is unmasked, not written"),
            ("sum-written", "after", f"{_UNMASKING}:write_sum", "the sum is a draft"),
            ("mean-written", "after", "app.rounds.aggregation:_write_mean_of_sum", "the next model is a draft"),
            ("attempt-forgotten", "after", "app.rounds.ending:forget_attempt", "roster and messages go, not committed"),
            ("masked-undeleted", "before", "app.rounds.discarding:delete_blobs", "published, masked updates lie on"),
            variant="secured",
        ),
        *_points(
            SERVER,
            ("shares-unspent", "before", f"{_CLOSING}:spend_for_survivors", "nothing is spent for the set"),
            ("shares-spent", "after", f"{_CLOSING}:spend_for_survivors", "spent for the set, not committed"),
            variant="distributed",
        ),
        *_points(
            COORDINATOR,
            ("attempt-given-up", "before", f"{_AGAIN}:begin_again", "too few stayed", "keys-kept"),
            ("attempt-begun-again", "after", f"{_AGAIN}:begin_again", "not committed", "keys-kept"),
            variant="hasty",
        ),
        *_points(
            AGENT,
            ("task-in-hand", "before", "isthmus_worker.loop:Agent.serve", "a task was claimed, nothing is done"),
            ("model-unfetched", "before", "isthmus_worker.loop:Agent._model", "the model is about to be fetched"),
            ("model-fetched", "after", "isthmus.client._transfer:download", "the model is here"),
            ("training-ordered", "before", "isthmus_worker.trainer:Trainer._await", "the training process is busy"),
            ("trained", "before", "isthmus_worker.journal:Journal.prepare", "trained, not journalled"),
            ("bytes-named", "after", "isthmus_worker.journal:move_durably", "the bytes are in place, without a row"),
            ("prepared", "after", "isthmus_worker.journal:Journal.prepare", "journalled, not asked for admission"),
            ("asking", "after", "isthmus_worker.journal:Journal.note_asking", "about to ask for admission"),
            ("admitted", "before", "isthmus_worker.journal:Journal.mark_released", "admitted, no spend recorded"),
            ("spent", "after", "isthmus_worker.journal:Journal.mark_released", "spend recorded, nothing sent"),
            ("receipt-in-hand", "before", "isthmus.client.receipts:verify_receipt", "a receipt came, not verified"),
            ("receipt-verified", "before", "isthmus_worker.journal:Journal.mark_acknowledged", "verified, not kept"),
            ("acknowledged", "after", "isthmus_worker.journal:Journal.mark_acknowledged", "the receipt is kept"),
        ),
        *_points(
            AGENT,
            ("keys-made", "after", f"{_SESSIONS}.begin", "secrets are kept, nothing is sent"),
            ("keys-came", "before", f"{_SESSIONS}.keep_keys", "checked, not kept"),
            ("keys-kept", "after", f"{_SESSIONS}.keep_keys", "no share is made of our secrets"),
            ("shares-made", "after", f"{_STANDING}.shares_message", "shares are not sent"),
            ("shares-came", "before", f"{_SESSIONS}.keep_shares", "checked, not kept"),
            ("shares-kept", "after", f"{_SESSIONS}.keep_shares", "nothing is masked"),
            ("masking-due", "before", "isthmus_worker.trainer:Trainer.mask", "masks are known, the child has no order"),
            ("masked", "before", f"{_SESSIONS}.keep_masked", "masked, its digest is not kept"),
            ("masked-kept", "after", f"{_SESSIONS}.keep_masked", "kept, nothing was asked"),
            ("masked-asking", "after", f"{_SESSIONS}.note_asking", "about to be admitted"),
            ("masked-taken", "before", f"{_SESSIONS}.keep_receipt", "receipt not kept here"),
            ("masked-over", "after", f"{_SESSIONS}.keep_receipt", "the receipt is kept"),
            ("survivors-came", "before", f"{_SESSIONS}.keep_survivors", "checked, not kept"),
            ("survivors-kept", "after", f"{_SESSIONS}.keep_survivors", "the set is not signed"),
            ("survivors-signed", "before", f"{_STANDING}.open_confirmations", "all signed it"),
            ("revealing", "before", f"{_SESSIONS}.keep_revealed", "nothing says for whom"),
            ("revealed", "after", f"{_SESSIONS}.keep_revealed", "no share is told yet"),
            ("session-over", "before", f"{_SESSIONS}.end", "told; the secrets are still kept"),
            variant="secured",
        ),
        *_points(
            AGENT,
            ("reveal-charged", "after", f"{_SENDING}:charge_before_revealing", "spent, nothing told"),
            variant="distributed",
        ),
        *_points(
            CHILD,
            ("mask-half-written", "after", f"{_MASKING}:add_masks", "a stretch is masked, not written"),
            ("mask-written", "after", f"{_MASKING}:write_masked", "masked, the agent was not told"),
            variant="secured",
        ),
        *_points(
            CHILD,
            ("work-begun", "before", "isthmus_worker.work:Desk.perform", "an order came"),
            ("in-an-epoch", "after", "isthmus_worker.training:loss_of", "some batches are done"),
            ("composing", "before", "isthmus_worker.work:_composed", "trained, nothing is written"),
            ("upload-written", "after", "isthmus_worker.work:write", "the upload is written, the agent was not told"),
        ),
        *_points(
            CHILD,
            ("noise-drawn", "after", "isthmus_worker.record_clipping:ClippedSum.take", "between two noised steps"),
            variant="record",
        ),
    ]
}  # fmt: skip


@dataclass(frozen=True)
class WirePoint:
    """A place in the talk between one agent and the service, seen from the relay between them.

    It is passed when `after_bytes` of the body went on (`upwards`: of the request's), or at the answer's first byte,
    which is then held back. `request` and `answer` are how their first lines begin.
    """

    name: str
    request: bytes
    upwards: bool
    after_bytes: int | None
    answer: bytes
    words: str
    within: bytes = b""
    """What else the request's first line holds."""
    variant: str = "wide"
    """The job whose talk passes it; `wide` has bodies that come in pieces."""


WIRE: Final[dict[str, WirePoint]] = {
    point.name: point
    for point in [
        WirePoint("wire-offer", b"POST /v1/tasks/claim", False, None, b"HTTP/1.1 200", "the offer does not arrive"),
        WirePoint("wire-model", b"GET /v1/checkpoints/", False, 400, b"HTTP/1.1 20", "while fetching the model"),
        WirePoint("wire-admission", b"PUT /v1/tasks/", False, None, b"HTTP/1.1 100", "100 Continue does not arrive"),
        WirePoint("wire-update", b"PUT /v1/tasks/", True, 500, b"", "while uploading"),
        WirePoint("wire-receipt", b"PUT /v1/tasks/", False, None, b"HTTP/1.1 200", "the receipt does not arrive"),
        WirePoint(
            "wire-step",
            b"POST /v1/tasks/",
            False,
            None,
            b"HTTP/1.1 20",
            "a step's answer does not arrive",
            within=b"/steps/",
            variant="secured",
        ),
        WirePoint(
            "wire-told",
            b"POST /v1/tasks/",
            True,
            1,
            b"",
            "a step's message is on its way",
            within=b"/steps/",
            variant="secured",
        ),
    ]
}
