"""All secured rounds that the agent is in, as its main thread sees them.

A secured task is served in two pieces, so that nobody waits for anybody: what is kept of the update is computed as for
any task, while its session exchanges keys and shares; once both are there, the update is masked and handed in. In
between the agent claims other tasks. A session that is ready while another task is computed does not wait for that: its
update is masked by a second child and handed in meanwhile. A session that has handed in goes on by itself until it has
revealed its shares; if it is lost before, it is begun again after a pause.

Sessions write nothing. They hand pieces of that to this thread, which does them whenever it looks (`tick`): between
tasks, and all the time while a child works or an upload runs.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from uuid import UUID

from isthmus.client import Client
from isthmus.client.receipts import ReceiptInvalid
from isthmus.secagg.violations import ProtocolViolation
from isthmus.wire.rounds import TaskOffer, UpdateReceipt
from isthmus_worker.files import digest_of_file
from isthmus_worker.heart import Heart
from isthmus_worker.journal import Journal, Release, key_of
from isthmus_worker.messages import Mask, MaskKey
from isthmus_worker.outcomes import Outcome
from isthmus_worker.release import LONGEST_PAUSE_S, HandedIn, Outgoing, send
from isthmus_worker.secured.checks import other_sum_objections, others_of
from isthmus_worker.secured.records import UPLOADED, Record, SessionKey, session_key
from isthmus_worker.secured.sending import MaskedBooks, charge_before_revealing, charged_at_the_end
from isthmus_worker.secured.session import Ending, Session
from isthmus_worker.settings import Settings
from isthmus_worker.state import Credentials, StateDir
from isthmus_worker.trainer import Trainer, WorkCancelled, WorkFailed, WorkRefused

if TYPE_CHECKING:
    from isthmus_worker.secured.standing import Standing

log = logging.getLogger(__name__)

MOST_PARKED: Final = 8
"""So many secured tasks may wait for their others at a time; with more, the agent claims nothing until one goes on."""
PAST: Final = timedelta(hours=1)
"""So long after an attempt was to close, what the service never had of it is deleted; clocks may differ by that."""
AGAIN_S: Final = 15.0
"""So long after a session was lost it is begun again, the first time; then twice as long, and so on."""
_LOOK_S: Final = 1.0


class Host(Protocol):
    """The agent, as far as secured rounds need it."""

    settings: Settings
    state: StateDir
    credentials: Credentials
    client: Client
    journal: Journal
    trainer: Trainer
    masker: Trainer
    """Has no child but while it masks beside the trainer's."""

    def check(self) -> None:
        """Raise what ends us, if a library has made another error of it."""
        ...

    def objections(self, offer: TaskOffer) -> list[str]:
        """Why nothing is released for an offer, as the policy and the ledger are now."""
        ...

    def looked(self) -> None:
        """The main thread goes on."""
        ...

    def compute(self, offer: TaskOffer, heart: Heart, unwanted: Callable[[], bool]) -> Release:
        """Have a task's bytes computed and journalled.

        Raises:
            WorkRefused, WorkFailed, WorkCancelled
        """
        ...

    def refuse(self, offer: TaskOffer, reason: str, where: str = "") -> Outcome:
        """Refuse a task."""
        ...

    def fail(self, offer: TaskOffer, reason: str, where: str = "") -> Outcome:
        """Give a task up."""
        ...

    def rest(self, seconds: float) -> None:
        """Wait, and do meanwhile what sessions ask for."""
        ...


class SecuredTasks:
    """The sessions of an agent. To be used from its main thread, but for what `Office` names."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._open: dict[SessionKey, Session] = {}
        self._due_at: dict[SessionKey, float] = {}
        """When sessions are begun again that were lost after their upload."""
        self._pause_s: dict[SessionKey, float] = {}
        """How long the last pause before that was."""
        self._beside: Callable[[], None] | None = None
        """Set while something is done for a session beside a child's work: a sign of life for that."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = threading.Event()

    # --- for the loop ------------------------------------------------------------------------------------------------

    @property
    def are_open(self) -> bool:
        """Whether there is any session."""
        return bool(self._open)

    @property
    def are_looked_after(self) -> bool:
        """Whether there is any, or will be without an offer."""
        return bool(self._open or self._due_at)

    @property
    def due_s(self) -> float:
        """In how many seconds one has to be begun again."""
        return max(0.0, min(self._due_at.values(), default=math.inf) - time.monotonic())

    @property
    def is_full(self) -> bool:
        """Whether too many tasks wait already for another to be claimed."""
        return len(self.held()) >= MOST_PARKED

    def held(self) -> tuple[UUID, ...]:
        """The tasks of sessions that have not handed in yet."""
        return tuple(session.offer.task_id for session in self._open.values() if session.heart is not None)

    def tick(self) -> None:
        """Do what sessions have asked for."""
        self._host.looked()
        while True:
            try:
                piece = self._inbox.get_nowait()
            except queue.Empty:
                return
            piece()

    def wait(self, seconds: float) -> None:
        """Do what sessions ask for as soon as one does, or return after so long."""
        try:
            piece = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return
        piece()
        self.tick()

    def post(self, piece: Callable[[], None]) -> None:
        """From any thread: have the main thread do something at its next look."""
        self._inbox.put(piece)

    def advance(self) -> Outcome | None:
        """Close one session that has ended, or mask and hand in for one that is ready; None: there is none."""
        return self._advance(lambda _session: True)

    def advance_meanwhile(self, working: TaskOffer, alive: Callable[[], None]) -> None:
        """The same while a child works at a task; called from within. Its own session is left to whoever has it done.

        Args:
            working: the task.
            alive: a sign of life for it. Nobody hears its child meanwhile; once this returns, what it has said counts.
        """
        assert self._beside is None, "what is done beside a child's work computes nothing"
        self._beside = alive
        try:
            self._advance(lambda session: session.offer.task_id != working.task_id)
        finally:
            self._beside = None
            self._host.masker.stop()

    def _advance(self, is_meant: Callable[[Session], bool]) -> Outcome | None:
        self._begin_again()
        for session in filter(is_meant, list(self._open.values())):
            if session.ended is not None:
                return self._conclude(session)
            if session.masks_known and session.heart is not None and self._vector(session.offer) is not None:
                outcome = self._mask_and_hand_in(session)
                log.info("secured task over", extra={**_words(session), "outcome": outcome})
                return outcome
        return None

    def leave_earlier(self, offer: TaskOffer) -> None:
        """A participation has one session at most, that of the offer that came last."""
        for key, session in list(self._open.items()):
            if key.participation_id == str(offer.participation_id):
                self._drop(session, Ending.LOST, "it is offered again")

    def serve(self, offer: TaskOffer) -> Outcome:
        """Begin with an offer that has passed all checks, or go on with it."""
        host, sessions = self._host, self._host.journal.sessions
        record = sessions.find(session_key(offer))
        if record is None:
            record = sessions.begin(offer, _fresh_secrets())
        else:
            record = sessions.readdress(record.key, offer)
            log.info("same keys again", extra={"task": offer.task_id, "state": record.state})
        heart = Heart(host.client, offer, host.settings.resources.max_silence_s, host.state.note_contact)
        heart.begin()
        session = self._start(record, heart)
        self.tidy()
        try:
            release = host.journal.find(key_of(offer))
            if release is None:
                host.compute(offer, heart, lambda: session.ended is not None)
            else:
                host.journal.readdress(release, offer)
                log.info("same vector again", extra=_words(session))
        except WorkRefused as refusal:
            self._drop(session, Ending.OVER, str(refusal))
            return host.refuse(offer, str(refusal), refusal.where)
        except WorkFailed as failure:
            self._drop(session, Ending.LOST, str(failure))
            return host.fail(offer, str(failure), failure.where)
        except WorkCancelled:
            return self._conclude(session)
        except BaseException:
            session.stop(Ending.LOST, "the worker stops")
            raise
        self.tick()
        return self.advance_one(session)

    def advance_one(self, session: Session) -> Outcome:
        """What can be done for a session now that its vector is kept."""
        if session.ended is not None:
            return self._conclude(session)
        return self._mask_and_hand_in(session) if session.masks_known else Outcome.PARKED

    def settle(self) -> None:
        """Hand in what an earlier run may have handed in; then go on with all that the service has signed for."""
        sessions = self._host.journal.sessions
        self.tidy()
        for record in sessions.masked():
            if not record.asked:
                continue
            offer, release = record.offer, self._vector(record.offer)
            if release is None:
                sessions.end(record.key, "its vector is gone")
                continue
            try:
                outcome, reason = self._hand_in(record, release, self._standing_of(record), None)
            except WorkFailed as error:  # the next offer of this attempt, or the next start, has it masked again
                outcome, reason = HandedIn.KEPT, str(error)
            except ProtocolViolation as error:
                sessions.end(record.key, str(error))
                outcome, reason = HandedIn.DISCARDED, str(error)
            words = {"job": offer.job, "round": offer.round_number, "outcome": outcome, "reason": reason}
            log.info("settled", extra=words)
        for record in sessions.uploaded():
            self._start(record, None)

    def tidy(self) -> None:
        """Delete secrets of attempts that were to close long ago, and masked updates that nobody will send any more.

        And whatever else the journal holds that has become too old.
        """
        for record in self._host.journal.sessions.past(PAST):
            if record.key not in self._open:
                self._host.journal.sessions.end(record.key, "its round is over")
        wanted = {self._masked_path(record.key) for record in self._host.journal.sessions.masked()}
        for path in self._host.state.masked.iterdir():
            if path not in wanted:
                path.unlink(missing_ok=True)
        self._host.journal.tidy()

    def close(self) -> None:
        """Stop all sessions; what they ask for is not done any more."""
        self._closed.set()
        for session in self._open.values():
            session.stop(Ending.LOST, "the worker stops")
            if session.heart is not None:
                session.heart.end()

    # --- for the sessions' threads (`Office`) ------------------------------------------------------------------------

    def keys_came(self, session: Session, answer: bytes) -> None:
        """See `Office`."""
        self._ask(session, lambda: self._keep_keys(session, answer))

    def shares_came(self, session: Session, answer: bytes) -> None:
        """See `Office`."""
        self._ask(session, lambda: self._host.journal.sessions.keep_shares(session.record.key, answer))

    def survivors_came(self, session: Session, answer: bytes) -> None:
        """See `Office`."""
        self._ask(session, lambda: self._keep_survivors(session, answer))

    def about_to_reveal(self, session: Session) -> None:
        """See `Office`."""
        self._ask(session, lambda: self._keep_revealed(session))

    def wake(self) -> None:
        """See `Office`."""
        self._inbox.put(lambda: None)

    def _ask(self, session: Session, piece: Callable[[], object]) -> None:
        """Have the main thread do something and wait for it; what it raises is raised here.

        Raises:
            ProtocolViolation: it was not done, or not to its end.
        """
        over, ended = threading.Event(), list[Exception | None]()

        def run() -> None:
            try:
                if self._open.get(session.record.key) is not session:
                    raise ProtocolViolation("This session was given up.")
                piece()
                ended.append(None)
            except Exception as error:  # it belongs to the session that asked, unless it is our own end
                self._host.check()
                ended.append(error)
            finally:
                over.set()

        self._inbox.put(run)
        while not over.wait(_LOOK_S):
            if self._closed.is_set():
                raise ProtocolViolation("The worker stops.")
        if not ended:  # a piece that was interrupted is not one that was done: nothing may be revealed after it
            raise ProtocolViolation("The worker stops.")
        if ended[0] is not None:
            raise ended[0]

    # --- pieces that the main thread does ----------------------------------------------------------------------------

    def _keep_keys(self, session: Session, answer: bytes) -> None:
        """Against the peers that are pinned, and new ones are."""
        journal, roster = self._host.journal, session.standing.keyed.roster
        others = others_of(roster, session.standing.index)
        if found := journal.peers.objections(others, trusted_only=self._host.settings.policy.pinned_peers_only):
            raise ProtocolViolation(" ".join(found))
        for peer in journal.peers.pin(others):
            log.info("peer pinned", extra={"organization": peer.organization, "fingerprint": peer.public_key})
        journal.sessions.keep_keys(session.record.key, answer)

    def _keep_survivors(self, session: Session, answer: bytes) -> None:
        key, sessions = session.record.key, self._host.journal.sessions
        revealed = sessions.revealed_sums(key.participation_id, key.round_number)
        if found := other_sum_objections(revealed, session.standing.summed()):
            raise ProtocolViolation(" ".join(found))
        sessions.keep_survivors(key, answer)

    def _keep_revealed(self, session: Session) -> None:
        journal, key = self._host.journal, session.record.key
        record, release = journal.sessions.get(key), journal.find(key_of(session.offer))
        if charged_at_the_end(session.offer):
            if release is None or record.receipt is None:
                raise ProtocolViolation("This worker has no account any more of what it would reveal.")
            charge_before_revealing(journal, release, UpdateReceipt.model_validate_json(record.receipt))
        journal.sessions.keep_revealed(key, session.standing.summed())

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _start(self, record: Record, heart: Heart | None) -> Session:
        announced = self._host.journal.sessions.announced_rows(record.offer.dataset)
        session = Session(self._host.client, record, lambda: self._standing_of(record, announced), self, heart)
        self._open[record.key] = session
        self._due_at.pop(record.key, None)
        session.start()
        return session

    def _begin_again(self) -> None:
        """Go on with sessions that were lost after their upload, as at a start, if their pause is over."""
        for key in [key for key, due_at in self._due_at.items() if due_at <= time.monotonic()]:
            del self._due_at[key]
            record = self._host.journal.sessions.find(key)
            if record is not None:
                log.info("secured round taken up again", extra={"task": record.offer.task_id, "state": record.state})
                self._start(record, None)

    def _lost(self, session: Session) -> None:
        """Look again later, where the service has the update and its round may still be open."""
        key = session.record.key
        record = self._host.journal.sessions.find(key)
        if record is None or record.state not in UPLOADED or datetime.now(UTC) > record.offer.closes_at + PAST:
            return
        self._pause_s[key] = min(LONGEST_PAUSE_S, 2 * self._pause_s.get(key, AGAIN_S / 2))
        self._due_at[key] = time.monotonic() + self._pause_s[key]

    def _standing_of(self, record: Record, announced: frozenset[int] | None = None) -> "Standing":
        """Imported when it is needed: cryptography takes its time."""
        from isthmus_worker.secured.standing import Standing  # noqa: PLC0415 - see above

        if announced is None:
            announced = self._host.journal.sessions.announced_rows(record.offer.dataset)
        identity = self._host.state.identity()
        public_key = identity.public_key().public_bytes_raw()
        return Standing.of(record, identity=public_key, sign=identity.sign, announced_rows=announced)

    def _conclude(self, session: Session) -> Outcome:
        """Close a session that has ended; the service is told where it still waits for us."""
        ended = session.ended
        how, reason = (ended.how, ended.reason) if ended is not None else (Ending.LOST, "the work was stopped")
        held = session.heart is not None
        self._drop(session, how, reason)
        words = {**_words(session), "reason": reason}
        if how is Ending.DONE:
            log.info("secured round over", extra=words)
            return Outcome.SUMMED
        if how is Ending.BROKEN:
            log.error("secured round left: a rule is broken", extra=words)
            return self._host.refuse(session.offer, reason) if held else Outcome.REFUSED
        if how is Ending.SPOILT:
            log.error("secured round left: somebody else may have broken a rule", extra=words)
            return self._host.fail(session.offer, reason) if held else Outcome.CANCELLED
        if how is Ending.LOST:
            self._lost(session)
        log.info("secured round left", extra=words)
        return Outcome.CANCELLED

    def _drop(self, session: Session, how: Ending, reason: str) -> None:
        """Forget a session, and its secrets unless it may go on with a later offer."""
        session.stop(how, reason)
        if session.heart is not None:
            session.heart.end()
        if self._open.get(session.record.key) is session:
            del self._open[session.record.key]
        if how not in (Ending.LOST, Ending.SPOILT):
            self._pause_s.pop(session.record.key, None)
            self._host.journal.sessions.end(session.record.key, reason or how.value)
            self._masked_path(session.record.key).unlink(missing_ok=True)

    # --- the masked update -------------------------------------------------------------------------------------------

    def _vector(self, offer: TaskOffer) -> Release | None:
        release = self._host.journal.find(key_of(offer))
        return release if release is not None and release.vector is not None else None

    def _mask_and_hand_in(self, session: Session) -> Outcome:
        host, offer, heart = self._host, session.offer, session.heart
        release = self._vector(offer)
        assert release is not None and heart is not None, "only sessions that are ready are handed in"  # noqa: PT018
        if found := host.objections(offer):  # much may have been spent since it was parked
            self._drop(session, Ending.OVER, " ".join(found))
            return host.refuse(offer, " ".join(found))
        session.is_handing_in = True
        try:
            record = host.journal.sessions.get(session.record.key)
            outcome, reason = self._hand_in(record, release, session.standing, heart)
        except WorkFailed as failure:
            self._drop(session, Ending.LOST, str(failure))
            return host.fail(offer, str(failure), failure.where)
        except ProtocolViolation as violation:
            self._drop(session, Ending.BROKEN, violation.reason)
            return host.refuse(offer, violation.reason)
        except WorkCancelled:
            self._drop(session, Ending.LOST, heart.lost or "the work was stopped")
            return Outcome.CANCELLED
        if outcome is HandedIn.ACKNOWLEDGED:
            heart.end()
            session.heart = None
            session.uploaded()
            return Outcome.SUBMITTED
        log.warning("masked update refused", extra={**_words(session), "reason": reason, "bytes": outcome})
        self._drop(session, Ending.OVER if outcome is HandedIn.DISCARDED else Ending.LOST, reason)
        return Outcome.REFUSED if outcome is HandedIn.DISCARDED else Outcome.KEPT

    def _hand_in(
        self, record: Record, release: Release, standing: "Standing", heart: Heart | None
    ) -> tuple[HandedIn, str]:
        """Mask, unless it was done, and hand in.

        Raises:
            WorkFailed, WorkCancelled: it cannot be masked.
            ProtocolViolation: masked again, it is another update than before.
        """
        host, offer = self._host, record.offer

        def on_progress() -> None:
            if heart is not None:
                heart.alive()
            if self._beside is not None:
                self._beside()
            self.tick()

        def rest(seconds: float) -> None:
            for piece in range(math.ceil(seconds / _LOOK_S)):
                on_progress()
                host.rest(min(_LOOK_S, seconds - piece * _LOOK_S))

        def lost() -> bool:
            on_progress()
            return heart is not None and heart.lost is not None

        digest = self._masked(record, release, standing, lost)
        books = MaskedBooks(host.journal, release, record.key, at_the_end=charged_at_the_end(offer))
        path = self._masked_path(record.key)
        try:
            outcome, reason = send(
                host.client,
                Outgoing(offer.task_id, offer.fence, path, digest),
                books,
                service_public_key=host.credentials.service_public_key,
                sleep=rest,
                on_progress=on_progress,
                wanted=lambda: not lost(),
            )
        except ReceiptInvalid as error:
            log.error("receipt not valid", extra={"job": offer.job, "task": offer.task_id, "reason": str(error)})
            return HandedIn.KEPT, str(error)
        if outcome is not HandedIn.KEPT:
            path.unlink(missing_ok=True)
        if outcome is HandedIn.DISCARDED:
            host.journal.sessions.end(record.key, reason)
        return outcome, reason

    def _masked(self, record: Record, release: Release, standing: "Standing", unwanted: Callable[[], bool]) -> str:
        """The digest of the one masked update of this attempt; its file is there."""
        path = self._masked_path(record.key)
        if record.masked_digest is not None and path.exists() and digest_of_file(path)[0] == record.masked_digest:
            return record.masked_digest
        assert release.vector is not None, "the caller has looked whether it is held"
        order = Mask(
            number=0,
            offer=record.offer,
            vector_path=release.vector,
            masked_path=path,
            masks=tuple(MaskKey(key=mask.key.hex(), sign=1 if mask.sign > 0 else -1) for mask in standing.masks()),
            weight_share=standing.weight_share(),
        )
        try:
            trainer = self._host.trainer if self._beside is None else self._host.masker
            done = trainer.mask(order, lambda _progress: None, unwanted)
        except WorkRefused as refusal:
            raise WorkFailed(str(refusal), refusal.where) from refusal
        if record.masked_digest is None:
            self._host.journal.sessions.keep_masked(record.key, done.digest)
        elif record.masked_digest != done.digest:
            path.unlink(missing_ok=True)
            raise ProtocolViolation(
                "Masked again with the same keys, the update is another one than before, and two of them would show "
                "what the masks hide."
            )
        return done.digest

    def _masked_path(self, key: SessionKey) -> Path:
        return self._host.state.masked / f"{key.participation_id}-{key.round_number}-{key.attempt}.safetensors"


def _fresh_secrets() -> bytes:
    from isthmus.secagg.client import Secrets  # noqa: PLC0415 - cryptography takes its time

    return Secrets.draw().to_bytes()


def _words(session: Session) -> dict[str, object]:
    offer = session.offer
    return {
        "job": offer.job,
        "round": offer.round_number,
        "attempt": offer.attempt,
        "dataset": offer.dataset,
        "task": offer.task_id,
    }
