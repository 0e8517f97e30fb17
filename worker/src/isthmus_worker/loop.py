"""The agent: claims tasks, checks them, has them done, and hands in what may leave. One task at a time.

A task under secure aggregation is put aside while it waits for the others of its round (`secured.serving`). As long as
there are such, work is claimed in a second thread, so that what comes first is done first.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

from isthmus.client import BadResponse, Client, IsthmusError, NoWork, Refused, TimedOut, Unreachable
from isthmus.wire.privacy import PrivacyUnit
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import ClaimTask, FailTask, RefuseTask, TaskOffer
from isthmus_worker.announcements import signed_announcement
from isthmus_worker.files import VerifiedFiles
from isthmus_worker.handover import note_told, untold
from isthmus_worker.heart import Heart
from isthmus_worker.journal import BytesDamaged, Journal, Release, key_of
from isthmus_worker.ledger import Account, BudgetRefused, accounts
from isthmus_worker.lineage import LineageRefused
from isthmus_worker.messages import Described, Work
from isthmus_worker.offers import contradictions, needs_model
from isthmus_worker.outcomes import Outcome
from isthmus_worker.policy import objections, resource_objections
from isthmus_worker.refusals import UNTOLD
from isthmus_worker.release import LONGEST_PAUSE_S, HandedIn, ReceiptInvalid, backoff_s, hand_in
from isthmus_worker.secured.checks import attempt_objections
from isthmus_worker.secured.claiming import Claims
from isthmus_worker.secured.serving import SecuredTasks
from isthmus_worker.settings import DatasetSettings, Settings, announced_policy
from isthmus_worker.state import Credentials, StateDir
from isthmus_worker.trainer import Trainer, WorkCancelled, WorkFailed, WorkRefused

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

SHORTEST_WAIT_S: Final = 40
WAIT_S: Final = 50
"""Length of a long poll for work, at most: what stands between often cuts a connection that is silent for a minute."""
MODELS_KEPT: Final = 3
LONGEST_REASON: Final = 1000

KEY_REFUSED: Final = frozenset(
    {ProblemCode.UNAUTHENTICATED, ProblemCode.KEY_EXPIRED, ProblemCode.KEY_REVOKED, ProblemCode.FORBIDDEN}
)

BUSY: Final = frozenset({ProblemCode.NOT_READY, ProblemCode.TOO_MANY_REQUESTS})
"""Refusals that only ask for patience."""


def a_poll_s() -> int:
    """Seconds of one long poll. Not always the same: agents that came back together must not stay together."""
    return random.randint(SHORTEST_WAIT_S, WAIT_S)  # noqa: S311 -- jitter


class KeyRefused(Exception):
    """The service does not know this worker any more."""

    def __init__(self, refusal: Refused) -> None:
        super().__init__(
            f"The service refuses this worker's key: {refusal.detail} [{refusal.code}]. "
            "Ask a steward of your organization for a new enrolment token, and run `isthmus-worker enroll --again` "
            "with another --name and the SAME state directory: it holds your account of what left."
        )


class NothingToServe(Exception):
    """None of the configured datasets can be served."""

    def __init__(self) -> None:
        super().__init__("None of the configured datasets can be served; the lines above say why.")


@dataclass
class Agent:
    """What the agent works with. Its own process holds no record and no array."""

    settings: Settings
    state: StateDir
    credentials: Credentials
    client: Client
    journal: Journal
    trainer: Trainer
    sleep: Callable[[float], None] = time.sleep
    check: Callable[[], None] = lambda: None
    """Raises what ends us, if a library has made another error of it: errors are borne here, and that is none."""
    _served: list[str] = field(default_factory=list)
    _accounts: dict[str, Account] = field(default_factory=dict)
    """By dataset: what its releases are charged to."""
    _verified: VerifiedFiles = field(default_factory=VerifiedFiles)
    masker: Trainer = field(init=False)
    """Masks while the trainer trains for another job; then it ends."""
    _secured: SecuredTasks = field(init=False)
    _claims: Claims = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is open yet."""
        self.masker = Trainer(self.settings.resources, self.state.scratch.with_name("masking"))
        self._secured = SecuredTasks(self)
        self._claims = Claims(self._secured.post, self._heart_of)

    def run(self) -> None:
        """Announce the datasets, settle what an earlier run left, then work until something stops us.

        Raises:
            KeyRefused: the service does not know us any more.
            NothingToServe: no dataset can be read, or all are served by other workers.
            LedgerDamaged: the account of what left is not what we wrote.
        """
        self.journal.verify()
        self.journal.recover()
        self._patiently(self.settle)
        self.announce()
        log.info("ready", extra={"datasets": ",".join(self._served), "service": self.settings.service_url})
        try:
            while True:
                self._patiently(lambda: self.step(a_poll_s()))
        finally:
            self.close()

    def close(self) -> None:
        """Stop what goes on beside the main thread; nothing more is sent."""
        self._secured.close()
        self._claims.close()
        self.masker.stop()

    def announce(self) -> None:
        """Tell the service which columns and how many records each dataset has, and what our policy lets be done.

        A child reads the records; we never do. Which data they are (`lineage`), and so which ledger counts, is found
        out for all datasets before the first is told: the budget of records that two of them hold is the smaller one.
        """
        self._served, self._accounts = [], {}
        found = [(dataset, read) for dataset in self.settings.datasets if (read := self._read(dataset)) is not None]
        self._accounts = accounts([(dataset, lineage) for dataset, (_described, lineage) in found])
        for dataset, (described, _lineage) in found:
            account = self._accounts[dataset.name]
            self.journal.ledgers.note_budget(account)
            if self._patiently(lambda told=(dataset, described, account): self._announced(*told)):  # type: ignore[misc]  # bound now
                self._served.append(dataset.name)
        self.trainer.stop()
        if not self._served:
            raise NothingToServe

    def _read(self, dataset: DatasetSettings) -> tuple[Described, str] | None:
        """What a child reads of a dataset, and which data it is; None if it cannot be served."""
        try:
            described = self.trainer.describe(
                dataset, self.journal.lineages.known_stamp(dataset.source), self._secured.tick
            )
            return described, self.journal.lineages.of(dataset, described.content)
        except (WorkRefused, WorkFailed) as error:
            reason, where = str(error), error.where
        except LineageRefused as error:
            reason, where = str(error), ""
        log.error("dataset cannot be served", extra={"dataset": dataset.name, "reason": reason, "where": where})
        return None

    def settle(self) -> None:
        """Hand in what an earlier run may have spent: its leases may still be held, or only the receipt was lost.

        What was only prepared waits for its round to be offered again, and for the policy that we have by then.
        """
        for release in self.journal.unsettled():
            outcome, reason = self._hand_in(release)
            log.info(
                "settled",
                extra={"job": release.job, "round": release.key.round_number, "outcome": outcome, "reason": reason},
            )
        self._secured.settle()

    def step(self, wait_s: int = WAIT_S) -> Outcome:
        """Wait for one task and see it through.

        Raises:
            KeyRefused: the service does not know us any more.
            Unreachable, TimedOut, BadResponse: it cannot be asked for work now.
        """
        offer = self._next(wait_s)
        if isinstance(offer, Outcome):
            return offer
        if offer is None or isinstance(offer, NoWork):
            self._end_idle_child()
            self._secured.tidy()
            return Outcome.IDLE
        began = time.monotonic()
        try:
            outcome = self.serve(offer)
        except (ValueError, OverflowError) as error:  # what no check foresaw must not end the agent, again and again
            self.check()
            log.exception("unexpected", extra=_words(offer))
            outcome = self.fail(offer, f"An unexpected {type(error).__name__} ended the task.")
        took_s = round(time.monotonic() - began, 3)
        log.info("task over", extra={**_words(offer), "outcome": outcome, "took_s": took_s})
        return outcome

    def _next(self, wait_s: int) -> TaskOffer | NoWork | Outcome | None:
        """The next offer, or what was done for a secured task before there was one; None: nothing came in time."""
        if not self._secured.are_looked_after and not self._claims.are_open:
            return self._claim(self._poll_s(wait_s))
        until = time.monotonic() + wait_s
        while True:
            self._secured.tick()
            if (outcome := self._secured.advance()) is not None:
                return outcome
            if (answer := self._claims.take()) is not None:
                return answer
            left_s = until - time.monotonic()
            if left_s <= 0:
                return None
            if not self._claims.are_open and not self._secured.is_full:
                self._claims.ask(partial(self._claim, self._poll_s(wait_s), self._secured.held()))
            self._secured.wait(min(left_s, self._secured.due_s))

    def serve(self, offer: TaskOffer) -> Outcome:
        """See one offer through: check, compute unless it was computed before, hand in."""
        if found := self.objections(offer):
            return self.refuse(offer, " ".join(found))
        self.journal.pin(offer)
        self._secured.leave_earlier(offer)
        self.journal.retire_before(str(offer.participation_id), offer.round_number)
        return self._serve_openly(offer) if offer.secured is None else self._secured.serve(offer)

    def _serve_openly(self, offer: TaskOffer) -> Outcome:
        with self._heart_of(offer) as heart:
            release = self.journal.find(key_of(offer))
            if release is not None:
                release = self.journal.readdress(release, offer)
                log.info("same bytes again", extra=_words(offer))
            else:
                try:
                    release = self.compute(offer, heart)
                except WorkRefused as refusal:
                    return self.refuse(offer, str(refusal), refusal.where)
                except WorkFailed as failure:
                    return self.fail(offer, str(failure), failure.where)
                except WorkCancelled:
                    log.info("task cancelled", extra={**_words(offer), "reason": heart.lost})
                    return Outcome.CANCELLED
            outcome, reason = self._hand_in(release, heart.alive, lambda: heart.lost is None)
        if outcome is HandedIn.ACKNOWLEDGED:
            return Outcome.SUBMITTED
        log.warning("upload refused", extra={**_words(offer), "reason": reason, "bytes": outcome})
        return Outcome.REFUSED if outcome is HandedIn.DISCARDED else Outcome.KEPT

    def _heart_of(self, offer: TaskOffer) -> Heart:
        return Heart(self.client, offer, self.settings.resources.max_silence_s, self.state.note_contact)

    def looked(self) -> None:
        """The main thread goes on: what it has claimed is not forgotten."""
        self._claims.alive()

    def objections(self, offer: TaskOffer) -> list[str]:
        """Why nothing is released for an offer, as the policy and the ledger are now; empty if something may be."""
        found = contradictions(offer, organization=self.credentials.organization, datasets=self._served)
        if found:
            return found  # what contradicts itself has no cost that could be computed
        dataset = self.settings.dataset(offer.dataset)
        assert dataset is not None, "an offer for another dataset contradicts what we serve"
        found = objections(announced_policy(self.settings, dataset), self.settings.policy, offer)
        found += resource_objections(self.settings.resources, offer)
        if offer.secured is not None:
            found += attempt_objections(self.journal.sessions, offer)
        account = self._accounts[offer.dataset]
        return found + self.journal.ledger_objections(offer, self.settings.policy.max_rounds, account)

    def compute(self, offer: TaskOffer, heart: Heart, unwanted: Callable[[], bool] = lambda: False) -> Release:
        """Have the bytes of a task computed and journalled.

        Args:
            offer: has passed all checks.
            heart: beats for it.
            unwanted: whether the work may stop, for another reason than that the lease is lost.

        Raises:
            WorkRefused, WorkFailed, WorkCancelled
        """
        dataset = self.settings.dataset(offer.dataset)
        assert dataset is not None, "an offer for another dataset was refused"

        def cancelled() -> bool:
            self._secured.tick()
            self._secured.advance_meanwhile(offer, heart.alive)
            return heart.lost is not None or unwanted()

        account, unit = self._accounts[offer.dataset], offer.spec.privacy.unit
        self.trainer.warm()
        model_path = self._model(offer, heart) if needs_model(offer) else None
        draft = self.state.scratch / "upload.safetensors"
        draft.unlink(missing_ok=True)
        order = Work(
            number=0,
            offer=offer,
            dataset=dataset,
            model_path=model_path,
            upload_path=draft,
            holdout_key=self.journal.lineages.holdout_key(account.lineage) or self.state.holdout_key().hex(),
            entry_points=self.settings.policy.entry_points,
            min_rows=self.settings.policy.min_rows,
            tell_counts=self.settings.policy.allow_exact_statistics and unit is PrivacyUnit.NONE,
        )
        try:
            done = self.trainer.work(order, heart.alive, cancelled)
        except WorkFailed as failure:
            if unit is not PrivacyUnit.RECORD:
                raise
            raise WorkFailed(UNTOLD, where=f"{failure} {failure.where}".rstrip()) from failure
        heart.alive(1.0)
        try:
            return self.journal.prepare(
                offer, draft, digest=done.digest, size_bytes=done.size_bytes, metrics=done.metrics, account=account
            )
        except BudgetRefused as refusal:
            raise WorkRefused(str(refusal)) from refusal
        except (BytesDamaged, FileNotFoundError) as error:
            raise WorkFailed("The training process left another file than it said.", where=str(error)) from error

    def _model(self, offer: TaskOffer, heart: Heart) -> Path:
        """The round's model as a file whose digest was checked, from the cache if it is there."""
        path = self.state.models / f"{offer.model.digest}.safetensors"

        def arriving(_done: int, _all: int | None) -> None:
            heart.alive(0.0)
            self._secured.tick()

        if self._verified.holds(path, offer.model.digest):
            path.touch()
            self._verified.note(path, offer.model.digest)
            return path
        attempt = 0
        while True:
            attempt += 1
            try:
                self.client.tasks.download_model(offer.model, path, progress=arriving)
            except (Unreachable, TimedOut, Refused) as error:
                if isinstance(error, Refused) and error.code not in BUSY:
                    raise WorkFailed("The round's model cannot be fetched.", where=str(error)) from error
                if heart.lost is not None:
                    raise WorkCancelled from error
                log.warning("model not fetched yet", extra={**_words(offer), "reason": str(error)})
                asked_s = (error.retry_after_s or 0.0) if isinstance(error, Refused) else 0.0
                self.rest(min(LONGEST_PAUSE_S, max(backoff_s(attempt), asked_s)))
            except BadResponse as error:
                raise WorkFailed("The round's model cannot be fetched.", where=str(error)) from error
            except OSError as error:
                raise WorkFailed(
                    "The round's model cannot be written to the worker's disk.", where=str(error)
                ) from error
            else:
                break
        self._verified.note(path, offer.model.digest)
        for old in sorted(self.state.models.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)[MODELS_KEPT:]:
            self._verified.delete(old)
        return path

    def _hand_in(
        self,
        release: Release,
        on_progress: Callable[[], None] = lambda: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> tuple[HandedIn, str]:
        def progressing() -> None:
            on_progress()
            self._secured.tick()

        try:
            return hand_in(
                self.client,
                self.journal,
                release,
                service_public_key=self.credentials.service_public_key,
                sleep=self.rest,
                on_progress=progressing,
                wanted=wanted,
            )
        except ReceiptInvalid as error:
            log.error("receipt not valid", extra={"job": release.job, "task": release.task_id, "reason": str(error)})
            return HandedIn.KEPT, str(error)

    def rest(self, seconds: float) -> None:
        """Wait, and do meanwhile what sessions of secured rounds ask for."""
        if not self._secured.are_open:
            self.sleep(seconds)
            return
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            self._secured.wait(left_s)

    def _claim(self, wait_s: int, holding: tuple[UUID, ...] = ()) -> TaskOffer | NoWork:
        """Ask for work. Perhaps in a second thread: it touches nothing but the client."""
        began = time.monotonic()
        try:
            offer = self.client.tasks.claim(ClaimTask(datasets=tuple(self._served), holding=holding), wait_s=wait_s)
        except Refused as refusal:
            if refusal.code in KEY_REFUSED:
                raise KeyRefused(refusal) from refusal
            raise
        self.state.note_contact()
        if isinstance(offer, NoWork):
            waited_s = time.monotonic() - began
            self.sleep(min(LONGEST_PAUSE_S, max(offer.retry_after_s, 0.0 if waited_s > min(1, wait_s) / 2 else 1.0)))
        return offer

    def _poll_s(self, wait_s: int) -> int:
        """Not longer than until the child has been idle for long enough."""
        idle_s = self.trainer.idle_s()
        if idle_s is None:
            return wait_s
        return max(1, min(wait_s, round(self.settings.resources.idle_s - idle_s)))

    def _end_idle_child(self) -> None:
        idle_s = self.trainer.idle_s()
        if idle_s is not None and idle_s >= self.settings.resources.idle_s:
            self.trainer.stop()

    def _announced(self, dataset: DatasetSettings, described: Described, account: Account) -> bool:
        name = dataset.name
        body = signed_announcement(
            self.state.identity(),
            self.credentials.organization,
            dataset,
            policy=announced_policy(self.settings, dataset),
            described=described,
            lineage=account.lineage,
            handover=untold(self.journal, account.lineage, name),
        )
        try:
            view = self.client.datasets.announce(name, body)
        except Refused as refusal:
            if refusal.code in KEY_REFUSED - {ProblemCode.FORBIDDEN}:
                raise KeyRefused(refusal) from refusal
            if refusal.code in (ProblemCode.NOT_READY, ProblemCode.TOO_MANY_REQUESTS, ProblemCode.INTERNAL):
                raise
            log.error("dataset refused", extra={"dataset": name, "reason": refusal.detail})
            return False
        self.state.note_contact()
        self.journal.sessions.note_rows(name, body.rows)
        if body.handover is not None:
            note_told(self.journal, account.lineage)
        log.info("dataset announced", extra={"dataset": name, "rows": body.rows, "state": view.state})
        return True

    def refuse(self, offer: TaskOffer, reason: str, where: str = "") -> Outcome:
        """Refuse a task: final for its round."""
        log.warning("task refused", extra={**_words(offer), "reason": reason, "where": where})
        body = RefuseTask(fence=offer.fence, reason=reason[:LONGEST_REASON])
        self._tell(lambda: self.client.tasks.refuse(offer.task_id, body), offer)
        return Outcome.REFUSED

    def fail(self, offer: TaskOffer, reason: str, where: str = "") -> Outcome:
        """Give a task up: it may be offered again."""
        log.error("task failed", extra={**_words(offer), "reason": reason, "where": where})
        body = FailTask(fence=offer.fence, reason=reason[:LONGEST_REASON])
        self._tell(lambda: self.client.tasks.fail(offer.task_id, body), offer)
        return Outcome.FAILED

    def _tell(self, call: Callable[[], object], offer: TaskOffer) -> None:
        """Say it once; if that does not arrive, the lease ends and tells the same."""
        try:
            call()
        except IsthmusError as error:
            log.warning("not told", extra={**_words(offer), "reason": str(error)})

    def _patiently(self, call: Callable[[], Answer]) -> Answer:
        """Call until the service answers: it may be restarted at any time."""
        attempt = 0
        while True:
            attempt += 1
            self.check()
            try:
                return call()
            except (Unreachable, TimedOut, BadResponse, Refused) as error:
                asked_s = (error.retry_after_s or 0.0) if isinstance(error, Refused) else 0.0
                wait_s = min(LONGEST_PAUSE_S, max(backoff_s(attempt), asked_s))
                log.warning("service not available", extra={"reason": str(error), "again_in_s": round(wait_s, 1)})
                self._end_idle_child()
                self.rest(wait_s)


def _words(offer: TaskOffer) -> dict[str, object]:
    return {
        "job": offer.job,
        "round": offer.round_number,
        "kind": offer.kind,
        "dataset": offer.dataset,
        "task": offer.task_id,
    }
