"""Central noise: spent for, and its key stored, before it is drawn; the same when drawn again; forgotten afterwards."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

import app.participations.service
import app.rounds.aggregation
from app.coordinator import sweep
from app.main import open_parts
from app.rounds.aggregation import aggregate_round
from app.settings import Settings
from isthmus.privacy.planning import plan_of, round_cost
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason, JobSpec, JobState, JobView, WithdrawParticipation
from isthmus.wire.ledger import LedgerKind
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase
from tests.app.test_budgets import ELEMENTS, ROWS, cost_of, entries, holding, total
from tests.app.test_deadlines import HalfAnUpload
from tests.app.test_grants import part_of
from tests.federation import CENTRAL, UNIFORM, Federation, filled, job_spec, round_id_of
from tests.running import refused

MakeFederation = Callable[..., Federation]
UPDATE = filled(0.1)


def central_spec(**changes: Any) -> JobSpec:
    """A job whose noise the service adds."""
    return job_spec(**{"privacy": CENTRAL, "strategy": UNIFORM, "rounds": 2, **changes})


def slice_of(spec: JobSpec) -> Any:
    """What a round of it costs a dataset of records."""
    plan = plan_of(spec, ROWS, ELEMENTS)
    assert plan is not None
    return round_cost(spec, plan, 1, ELEMENTS, ledger=True)


def full(federation: Federation, spec: JobSpec | None = None) -> JobView:
    """A job whose first round has all its updates and waits to be summed: there is no coordinator."""
    job = federation.start(spec or central_spec())
    for site in federation.sites:
        site.hand_in(site.claim(), UPDATE)
    assert federation.researcher.jobs.round(job.id, 1).phase is RoundPhase.AGGREGATING
    return job


def sum_it(federation: Federation, job: JobView) -> None:
    """Run the aggregation as a coordinator runs it."""
    settings = Settings(database_url=federation.platform.database_url, data_dir=federation.folder / "data")

    async def run() -> None:
        async with open_parts(settings) as parts:
            await aggregate_round(parts, round_id_of(federation, job, 1))

    asyncio.run(run())


def keys(federation: Federation) -> list[bytes | None]:
    return [row[0] for row in federation.platform.execute("SELECT noise_key FROM rounds ORDER BY number")]


@pytest.fixture
def quiet(make_federation: MakeFederation) -> Federation:
    """Three sites on a service without a coordinator."""
    return make_federation(coordinate=False)


def test_a_round_with_central_noise_spends_when_it_is_summed_and_forgets_its_inputs(federation: Federation) -> None:
    job = federation.start(central_spec())
    first, *others = federation.sites
    offer = first.claim()
    receipt = first.hand_in(offer, UPDATE)
    assert [entry.kind for entry in entries(first)] == [LedgerKind.RESERVE]
    for site in others:
        site.hand_in(site.claim(), UPDATE)
    federation.until(lambda: federation.job(job).current_round == 2)

    for site in federation.sites:
        (spend,) = entries(site, LedgerKind.SPEND)
        assert (spend.mode, spend.round_number, spend.release) == ("organization-central", 1, "train")
        assert total(site, LedgerKind.SPEND) == slice_of(central_spec())
    federation.until(lambda: federation.blobs("updates") == [])
    assert keys(federation) == [None, None]
    assert {row[0] for row in federation.platform.execute("SELECT blob_key FROM updates")} == {None}
    shown = federation.platform.admin.jobs.round(job.id, 1).updates
    assert len(shown) == 3
    assert receipt.digest in {update.digest for update in shown}
    assert first.hand_in(offer, UPDATE) == receipt


def test_the_published_model_is_noised(federation: Federation) -> None:
    job = federation.start(central_spec(rounds=1))
    for site in federation.sites:
        site.hand_in(site.claim(), UPDATE)
    federation.finish(job)

    model = federation.model(job)

    values = np.concatenate([model[name].reshape(-1) for name in sorted(model)])
    assert len(set(values.tolist())) == values.size
    assert 0.3 < values.std() < 4  # 4 / 3 of the clip, on six elements


class Failing:
    """A step that fails once, before it did anything or after it did all."""

    def __init__(self, step: Callable[..., Awaitable[Any]], *, after: bool) -> None:
        self._step, self._after = step, after
        self.seen: list[Any] = []

    async def __call__(self, *arguments: Any, **named: Any) -> Any:
        first = not self.seen
        self.seen.append(arguments)
        if first and not self._after:
            raise ConnectionError("the process was killed")
        found = await self._step(*arguments, **named)
        if first:
            raise ConnectionError("the process was killed")
        return found


@pytest.mark.parametrize(
    ("step", "after"), [("_next_model", False), ("_next_model", True), ("_complete", False), ("_complete", True)]
)
def test_a_sum_that_was_interrupted_is_the_same_release_when_it_is_done_again(
    quiet: Federation, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    job = full(quiet)
    failing = Failing(getattr(app.rounds.aggregation, step), after=after)
    noises: list[Any] = []
    write = app.rounds.aggregation.write_aggregate

    def noted(*arguments: Any) -> Any:
        result = write(*arguments)
        noises.append((arguments[-1], result))
        return result

    monkeypatch.setattr(app.rounds.aggregation, step, failing)
    monkeypatch.setattr(app.rounds.aggregation, "write_aggregate", noted)
    with pytest.raises(ConnectionError):
        sum_it(quiet, job)
    (key,) = keys(quiet)
    assert key is not None
    assert all(len(entries(site, LedgerKind.SPEND)) == 1 for site in quiet.sites)

    sum_it(quiet, job)

    assert quiet.researcher.jobs.round(job.id, 1).phase is RoundPhase.COMPLETED
    assert keys(quiet) == [None, None]
    assert {noise.key for noise, _ in noises} == {key}
    assert len({result for _, result in noises}) == 1
    assert quiet.blobs("updates") == []
    for site in quiet.sites:
        assert total(site, LedgerKind.SPEND) == slice_of(central_spec())


def test_a_crash_in_the_spending_transaction_leaves_neither_key_nor_spend(
    quiet: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = full(quiet)
    monkeypatch.setattr(
        app.rounds.aggregation, "spend_for_noise", Failing(app.rounds.aggregation.spend_for_noise, after=True)
    )

    with pytest.raises(ConnectionError):
        sum_it(quiet, job)

    assert keys(quiet) == [None]
    assert entries(quiet.sites[0], LedgerKind.SPEND) == []
    sum_it(quiet, job)
    assert quiet.researcher.jobs.round(job.id, 1).phase is RoundPhase.COMPLETED
    assert len(entries(quiet.sites[0], LedgerKind.SPEND)) == 1


def test_a_job_cancelled_while_it_is_summed_keeps_its_spends_and_no_key(
    quiet: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = full(quiet)
    monkeypatch.setattr(app.rounds.aggregation, "_complete", Failing(app.rounds.aggregation._complete, after=False))
    with pytest.raises(ConnectionError):
        sum_it(quiet, job)

    quiet.researcher.jobs.cancel(job.id)
    sum_it(quiet, job)

    assert keys(quiet) == [None]
    assert {row[0] for row in quiet.platform.execute("SELECT blob_key FROM updates")} == {None}
    assert all(len(entries(site, LedgerKind.SPEND)) == 1 for site in quiet.sites)


def test_one_who_withdraws_after_the_freeze_is_spent_for_and_given_the_rest_back(
    make_federation: MakeFederation,
) -> None:
    """Its update is in the sum: the rest of its reservation goes back once that is over, and not before."""
    federation = make_federation(coordinate=False)
    job = full(federation)
    site = federation.sites[0]
    site.steward.participations.withdraw(part_of(site, job).id, WithdrawParticipation(note="changed our mind"))
    sweep_once(federation)
    assert entries(site, LedgerKind.REFUND) == []

    sum_it(federation, job)
    sweep_once(federation)

    assert total(site, LedgerKind.SPEND) == slice_of(central_spec())
    assert total(site, LedgerKind.SPEND) + total(site, LedgerKind.REFUND) == cost_of(central_spec())


def sweep_once(federation: Federation) -> None:
    """One sweep, without the aggregations that it asks for."""
    settings = Settings(database_url=federation.platform.database_url, data_dir=federation.folder / "data")

    async def run() -> None:
        async with open_parts(settings) as parts:
            await sweep(parts, timedelta(hours=1))

    asyncio.run(run())


def test_an_update_that_was_withdrawn_before_the_freeze_is_not_told_by_its_digest(quiet: Federation) -> None:
    job = quiet.start(central_spec())
    first = quiet.sites[0]
    receipt = first.hand_in(first.claim(), UPDATE)

    first.steward.participations.withdraw(part_of(first, job).id, WithdrawParticipation(note="no"))

    events = quiet.platform.admin.events.list(f"job:{job.id}")
    (excluded,) = (event for event in events if event.kind is EventKind.UPDATE_EXCLUDED)
    assert excluded.data["digest"] is None
    assert all(receipt.digest not in str(event.data) for event in quiet.platform.admin.events.list(f"job:{job.id}"))


@pytest.mark.parametrize("received", [True, False], ids=["accepted", "in mid-upload"])
def test_what_is_withdrawn_before_the_freeze_is_given_back_whole(federation: Federation, received: bool) -> None:
    """Without central noise the release was spent when it was admitted, and would stay spent."""
    job = federation.start(central_spec())
    site = federation.sites[0]
    offer = site.claim()
    upload = None if received else HalfAnUpload(site, offer, 0.1)
    if received:
        site.hand_in(offer, UPDATE)

    site.steward.participations.withdraw(part_of(site, job).id, WithdrawParticipation(note="a patient asked"))

    assert upload is None or b"grant-withdrawn" in upload.finish()
    federation.until(lambda: entries(site, LedgerKind.REFUND))

    assert [entry.kind for entry in entries(site)] == [LedgerKind.RESERVE, LedgerKind.REFUND]
    assert total(site, LedgerKind.REFUND) == cost_of(central_spec())
    assert federation.blobs("updates") == []


def test_a_ledger_closed_before_the_sum_ends_the_round_before_any_noise_is_drawn(quiet: Federation) -> None:
    job = full(quiet)
    site = quiet.sites[0]
    site.steward.datasets.set_policy(site.dataset.id, holding(slice_of(central_spec())))

    sum_it(quiet, job)

    ended = quiet.job(job)
    assert (ended.state, ended.reason) == (JobState.FAILED, JobReason.AGGREGATE_REJECTED)
    assert ended.detail is not None
    assert "budget" in ended.detail
    assert keys(quiet) == [None]
    assert all(entries(each, LedgerKind.SPEND) == [] for each in quiet.sites)


def test_an_update_that_is_not_promised_for_is_not_admitted(quiet: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    async def skip(*_: Any, **__: Any) -> None:
        return None

    monkeypatch.setattr(app.participations.service, "reserve", skip)
    quiet.start(central_spec())
    site = quiet.sites[0]

    with refused(ProblemCode.BUDGET_EXHAUSTED):
        site.hand_in(site.claim(), UPDATE)


def test_an_update_that_its_worker_did_not_clip_is_refused(quiet: Federation) -> None:
    quiet.start(central_spec())
    site = quiet.sites[0]

    with refused(ProblemCode.NORM_TOO_LARGE):
        site.hand_in(site.claim(), filled(1.0))
