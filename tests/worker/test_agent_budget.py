"""The agent and its own ledger, against a service that approves of everything."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from isthmus.privacy.cost import Cost
from isthmus.wire.datasets import AnnounceDataset, UsePolicy, announcement_bytes
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import TaskOffer
from isthmus_worker.handover import give, receive
from isthmus_worker.journal import Journal
from isthmus_worker.ledger import LedgerDamaged, charge_for
from isthmus_worker.loop import Agent, NothingToServe, Outcome
from isthmus_worker.settings import Settings, announced_policy
from isthmus_worker.state import StateDir
from isthmus_worker.trainer import Trainer
from tests.worker.factories import (
    DATASET,
    LINEAGE,
    ORGANIZATION,
    make_local_spec,
    make_offer,
    make_record_spec,
    make_settings,
)
from tests.worker.fake_service import FakeService


@pytest.fixture
def announcing(agent: Agent) -> Iterator[Agent]:
    """The agent with a child of its own: announcing ends it."""
    agent.trainer = Trainer(agent.settings.resources, agent.state.scratch)
    yield agent
    agent.trainer.stop()


def _with_budget(agent: Agent, epsilon: float) -> None:
    dataset = agent.settings.datasets[0]
    assert dataset.budget is not None
    budget = dataset.budget.model_copy(update={"epsilon": epsilon})
    account = agent._accounts[DATASET]
    agent._accounts[DATASET] = type(account)(account.lineage, budget)


def test_a_job_that_protects_records_is_worked_through_and_charged_round_by_round(
    agent: Agent, service: FakeService
) -> None:
    spent = Cost.zero()
    for number in (0, 1, 2, 3, 4):
        offer = make_offer(make_record_spec(), number)
        service.offer(offer)
        assert agent.step() is Outcome.SUBMITTED, service.refused + service.failed
        spent = spent + charge_for(offer, LINEAGE).cost
        assert agent.journal.ledgers.total(LINEAGE).cost == spent

    assert offer.plan is not None
    assert spent.epsilon(offer.plan.delta) == offer.plan.epsilon <= 3.0
    kinds = [entry.plain["kind"] for entry in agent.journal.ledgers.entries(LINEAGE)]
    assert kinds == ["statistics", "train", "train", "train", "evaluate"]
    agent.journal.verify()


def test_an_overdraft_that_the_service_approves_is_refused_before_any_work(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_offer(make_local_spec())
    _with_budget(agent, charge_for(first, LINEAGE).cost.epsilon(1e-5) * 1.01)
    service.offer(first)
    assert agent.step() is Outcome.SUBMITTED
    other, orders = {"job_id": UUID(int=50), "participation_id": UUID(int=51)}, list[Any]()
    monkeypatch.setattr(agent.trainer, "work", _heard(agent.trainer.work, orders))
    service.offer(make_offer(make_local_spec(), **other))

    assert agent.step() is Outcome.REFUSED

    assert "by this worker's own ledger epsilon" in service.refused[0]
    assert len(service.updates) == 1
    assert sum(agent.journal.counts().values()) == 1
    assert orders == []  # nothing was computed


def test_an_overdraft_between_the_check_and_the_end_of_the_work_is_refused_too(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = make_offer(make_local_spec())
    _with_budget(agent, charge_for(offer, LINEAGE).cost.epsilon(1e-5) * 0.5)
    monkeypatch.setattr(agent.journal, "ledger_objections", lambda *_: [])
    service.offer(offer)

    assert agent.step() is Outcome.REFUSED

    assert "by this worker's own ledger epsilon" in service.refused[0]
    assert service.updates == {}
    assert sum(agent.journal.counts().values()) == 0


@pytest.mark.parametrize(
    ("lie", "word"),
    [
        ({"noise_multiplier": 0.9}, "noise multiplier is 0.9; the job's is 1"),
        ({"epsilon": 1.0}, "not 1 as it says"),
        ({"sampling_probability": 0.5}, "samples records"),
    ],
)
def test_a_plan_that_breaks_the_jobs_promise_is_refused_with_its_reason(
    agent: Agent, service: FakeService, lie: dict[str, Any], word: str
) -> None:
    offer = make_offer(make_local_spec())
    assert offer.plan is not None
    service.offer(offer.model_copy(update={"plan": offer.plan.model_copy(update=lie)}))

    assert agent.step() is Outcome.REFUSED

    assert word in service.refused[0]
    assert sum(agent.journal.counts().values()) == 0


def _announcement(service: FakeService, name: str = DATASET) -> AnnounceDataset:
    return AnnounceDataset.model_validate(service.announced[name])


def test_an_announcement_is_signed_with_the_policy_of_the_file(announcing: Agent, service: FakeService) -> None:
    announcing.announce()
    body = _announcement(service)

    key = announcing.state.public_key()
    assert key is not None
    said = announcement_bytes(ORGANIZATION, DATASET, policy=body.policy, lineage=body.lineage, signed_at=body.signed_at)
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(body.signature), said)
    assert body.policy == announced_policy(announcing.settings, announcing.settings.datasets[0]) != UsePolicy()
    assert body.handover is None

    policy = announcing.settings.policy.model_copy(update={"max_epsilon": 1.0})
    announcing.settings = announcing.settings.model_copy(update={"policy": policy})
    announcing.announce()
    again = _announcement(service)
    assert (again.policy.max_epsilon, again.lineage) == (1.0, body.lineage)
    assert again.signed_at > body.signed_at
    assert again.signature != body.signature


def test_a_dataset_keeps_its_ledger_when_it_is_renamed_and_its_worker_registered_anew(
    announcing: Agent, service: FakeService
) -> None:
    announcing.announce()
    lineage = _announcement(service).lineage
    service.offer(make_offer(make_local_spec()))
    assert announcing.step() is Outcome.SUBMITTED
    spent = announcing.journal.spent(lineage)
    assert spent != Cost.zero()

    renamed = announcing.settings.datasets[0].model_copy(update={"name": "renamed"})
    announcing.settings = announcing.settings.model_copy(update={"datasets": (renamed,)})
    announcing.state.renew_identity()
    announcing.announce()

    assert _announcement(service, "renamed").lineage == lineage
    assert announcing._accounts["renamed"].lineage == lineage
    _with = charge_for(make_offer(make_local_spec()), lineage).cost.epsilon(1e-5) * 1.01
    account = announcing._accounts["renamed"]
    assert account.budget is not None
    announcing._accounts["renamed"] = type(account)(lineage, account.budget.model_copy(update={"epsilon": _with}))
    service.offer(make_offer(make_local_spec(), dataset="renamed", participation_id=UUID(int=9), job_id=UUID(int=8)))
    assert announcing.step() is Outcome.REFUSED
    assert "own ledger" in service.refused[0]


def test_two_datasets_of_the_same_data_share_a_lineage_and_the_smaller_budget(
    announcing: Agent, service: FakeService, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.csv"
    copy.write_text((tmp_path / "patients.csv").read_text() + "44,120,M,0\n")
    first = announcing.settings.datasets[0]
    second = first.model_copy(
        update={
            "name": "twin",
            "source": first.source.model_copy(update={"path": copy}),
            "budget": first.budget.model_copy(update={"epsilon": 2.0}) if first.budget else None,
        }
    )
    announcing.settings = announcing.settings.model_copy(update={"datasets": (first, second)})

    announcing.announce()

    assert _announcement(service).lineage == _announcement(service, "twin").lineage
    budgets = [announcing._accounts[name].budget for name in (DATASET, "twin")]
    assert [budget.epsilon if budget else None for budget in budgets] == [2.0, 2.0]


def test_an_agent_whose_ledger_was_changed_does_not_start(announcing: Agent, service: FakeService) -> None:
    announcing.announce()
    service.offer(make_offer(make_local_spec()))
    announcing.step()
    announcing.journal.connection.execute("UPDATE ledgers SET draws = 0")
    service.claim_refusal = ProblemCode.KEY_REVOKED  # else an agent that does start would work for ever

    with pytest.raises(LedgerDamaged, match="changed by hand"):
        announcing.run()

    assert service.claims == 1


def test_a_dataset_that_was_handed_on_is_served_by_the_other_worker_and_told_to_the_service_once(
    announcing: Agent, service: FakeService, tmp_path: Path
) -> None:
    announcing.announce()
    lineage = _announcement(service).lineage
    service.offer(make_offer(make_local_spec()))
    announcing.step()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "patients.csv").write_bytes((tmp_path / "patients.csv").read_bytes())
    settings = make_settings(tmp_path / "new", service_url=service.url)
    new = _agent_like(announcing, settings)
    document = give(
        announcing.journal, announcing.state.identity(), ORGANIZATION, DATASET, taker=new.state.public_key() or "",
        holdout_key=announcing.state.holdout_key().hex(), configured=[DATASET],
    ).model_dump_json()  # fmt: skip
    receive(new.journal, new.state.identity(), ORGANIZATION, document, giver=announcing.state.public_key() or "")

    with pytest.raises(NothingToServe):
        announcing.announce()
    new.announce()
    told = _announcement(service)
    new.announce()

    assert told.lineage == lineage
    assert told.handover is not None
    assert (told.handover.entries, told.handover.taker) == (2, new.state.public_key())
    assert _announcement(service).handover is None
    service.offer(make_offer(make_local_spec()))
    assert new.step() is Outcome.REFUSED  # that round was released by the old worker
    service.offer(make_offer(make_local_spec(), 2))
    orders = list[Any]()
    new.trainer.work = _heard(new.trainer.work, orders)  # type: ignore[method-assign]
    assert new.step() is Outcome.SUBMITTED
    assert orders[0].holdout_key == announcing.state.holdout_key().hex()
    assert new.journal.ledgers.total(lineage).entries == 3
    new.trainer.stop()
    new.journal.close()


def _agent_like(agent: Agent, settings: Settings) -> Agent:
    state = StateDir.open(settings.state_dir)
    state.identity()
    return Agent(
        settings, state, agent.credentials, agent.client, Journal.open(state),
        Trainer(settings.resources, state.scratch), sleep=lambda _s: None,
    )  # fmt: skip


def _heard(real: Callable[..., Any], orders: list[Any]) -> Callable[..., Any]:
    def work(order: Any, *more: Any) -> Any:
        orders.append(order)
        return real(order, *more)

    return work


def test_a_release_that_a_lost_answer_left_open_is_sent_again_though_the_budget_is_full(
    agent: Agent, service: FakeService
) -> None:
    offer: TaskOffer = make_offer(make_local_spec())
    service.forged = True  # admitted and stored, but the receipt is no proof
    service.offer(offer)
    assert agent.step() is Outcome.KEPT
    _with_budget(agent, 0.1)  # lowered meanwhile
    service.forged = False
    service.offer(make_offer(make_local_spec(), fence=2, attempt=2))

    assert agent.step() is Outcome.SUBMITTED

    assert agent.journal.ledgers.total(LINEAGE).entries == 1
