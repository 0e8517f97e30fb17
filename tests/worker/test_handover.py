"""Handing a dataset on: the ledger goes with it, and only one worker can add to it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from isthmus.privacy.cost import Cost
from isthmus.wire.base import canonical_json
from isthmus.wire.datasets import Budget, handover_bytes
from isthmus.wire.rounds import TaskOffer
from isthmus_worker.contents import content_of
from isthmus_worker.handover import Document, HandoverRefused, SignedDocument, give, note_told, receive, untold
from isthmus_worker.journal import Journal
from isthmus_worker.ledger import Account, LedgerDamaged, charge_for, hash_of
from isthmus_worker.lineage import LineageRefused
from isthmus_worker.secured.records import session_key
from isthmus_worker.settings import CsvSettings, DatasetSettings
from isthmus_worker.state import StateDir
from tests.worker.factories import DATASET, ORGANIZATION, make_offer, make_record_spec, write_patients
from tests.worker.secured_round import SecuredRound

SPEC = make_record_spec()


@dataclass
class Ward:
    """A worker, as far as handing on goes."""

    state: StateDir
    journal: Journal
    dataset: DatasetSettings

    @classmethod
    def at(cls, folder: Path, name: str = DATASET) -> "Ward":
        folder.mkdir(exist_ok=True)
        path = folder / "patients.csv"
        if not path.exists():
            write_patients(path)
        state = StateDir.open(folder / "state")
        state.identity()
        return cls(state, Journal.open(state), DatasetSettings(name=name, source=CsvSettings(path=path)))

    @property
    def key(self) -> str:
        found = self.state.public_key()
        assert found is not None
        return found

    def serve(self) -> str:
        return self.journal.lineages.of(self.dataset, content_of(self.dataset.source, None))

    def release(self, offer: TaskOffer, epsilon: float = 10.0) -> None:
        account = Account(self.serve(), Budget(epsilon=epsilon))
        assert self.journal.ledger_objections(offer, 100, account) == []
        self.journal.pin(offer)
        content, draft = str(offer.round_number).encode(), self.state.scratch / "upload.safetensors"
        draft.write_bytes(content)
        digest = sha256(content).hexdigest()
        release = self.journal.prepare(
            offer, draft, digest=digest, size_bytes=len(content), metrics={}, account=account
        )
        self.journal.mark_released(release)
        self.journal.connection.execute("UPDATE releases SET state = 'acknowledged', file = NULL")

    def objections(self, offer: TaskOffer, epsilon: float = 10.0) -> list[str]:
        return self.journal.ledger_objections(offer, 100, Account(self.serve(), Budget(epsilon=epsilon)))

    def give(self, taker: str, name: str = DATASET, configured: tuple[str, ...] = (DATASET,)) -> str:
        return give(
            self.journal, self.state.identity(), ORGANIZATION, name, taker=taker,
            holdout_key=self.state.holdout_key().hex(), configured=configured,
        ).model_dump_json()  # fmt: skip

    def receive(self, text: str, giver: str, organization: str = ORGANIZATION) -> Document:
        return receive(self.journal, self.state.identity(), organization, text, giver=giver)


@pytest.fixture
def old(tmp_path: Path) -> Ward:
    """A worker that has released statistics and a round."""
    ward = Ward.at(tmp_path / "old")
    for number in (0, 1):
        ward.release(make_offer(SPEC, number))
    return ward


@pytest.fixture
def new(tmp_path: Path) -> Ward:
    """One that has never served anything."""
    return Ward.at(tmp_path / "new")


def test_the_new_worker_goes_on_where_the_old_one_stopped(old: Ward, new: Ward) -> None:
    lineage, spent = old.serve(), old.journal.spent(old.serve())

    text = old.give(new.key)
    new.receive(text, old.key)

    assert new.serve() == lineage
    assert new.journal.spent(lineage) == spent != Cost.zero()
    assert new.journal.lineages.holdout_key(lineage) == old.state.holdout_key().hex()  # the split stays what it was
    new.journal.verify()
    assert "no longer held" in new.objections(make_offer(SPEC, 1))[0]  # nothing is noised twice
    assert new.objections(make_offer(SPEC, 2)) == []  # the running job goes on
    assert "another job_seed" in new.objections(make_offer(SPEC, 2, job_seed="ab" * 32))[0]
    assert "another participation" in new.objections(make_offer(SPEC, 2, participation_id=UUID(int=9)))[0]
    new.release(make_offer(SPEC, 2))
    assert new.journal.ledgers.total(lineage).cost == spent + charge_for(make_offer(SPEC, 2), lineage).cost
    claimed = new.journal.ledgers.claimed(str(make_offer(SPEC).participation_id))
    assert claimed == new.journal.ledgers.total(lineage).cost


def test_what_the_old_worker_spent_is_spent_at_the_new_one(old: Ward, new: Ward) -> None:
    epsilon = old.journal.spent(old.serve()).epsilon(1e-5) * 1.01
    new.receive(old.give(new.key), old.key)

    assert "budget: by this worker's own ledger" in new.objections(make_offer(SPEC, 2), epsilon)[0]


def test_the_old_worker_serves_the_data_no_more_under_any_name(old: Ward, new: Ward) -> None:
    old.give(new.key)

    with pytest.raises(LineageRefused, match="was handed on"):
        old.serve()
    old.dataset = old.dataset.model_copy(update={"name": "renamed"})
    with pytest.raises(LineageRefused, match="was handed on"):
        old.serve()


def test_both_have_signed_what_the_service_is_told(old: Ward, new: Ward) -> None:
    lineage, text = old.serve(), old.give(new.key)
    document = new.receive(text, old.key)

    terms = untold(new.journal, lineage, DATASET)
    assert terms is not None
    said = handover_bytes(
        ORGANIZATION, DATASET, giver=old.key, taker=new.key, lineage=lineage, entries=3,
        head=document.entries[-1].hash, document=terms.document, signed_at=document.signed_at,
    )  # fmt: skip
    for key, signature in ((old.key, terms.given), (new.key, terms.taken)):
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), said)
    assert terms.document == sha256(canonical_json(document.model_dump(mode="json"))).hexdigest()
    assert untold(new.journal, lineage, "another") is None
    assert untold(old.journal, lineage, DATASET) is None

    note_told(new.journal, lineage)
    assert untold(new.journal, lineage, DATASET) is None


def test_handing_on_and_taking_over_again_change_nothing(old: Ward, new: Ward) -> None:
    text = old.give(new.key)

    assert old.give(new.key) == text
    assert new.receive(text, old.key) == new.receive(text, old.key)
    assert new.journal.ledgers.total(new.serve()).entries == 3
    with pytest.raises(HandoverRefused, match="Only that one can hand it on now"):
        old.give("ab" * 32)


def test_data_move_back_and_forth_and_an_old_document_is_never_taken_again(old: Ward, new: Ward) -> None:
    first = old.give(new.key)
    new.receive(first, old.key)
    new.release(make_offer(SPEC, 2))
    back = new.give(old.key)
    with pytest.raises(HandoverRefused, match="it is an old one"):
        new.receive(first, old.key)
    with pytest.raises(LineageRefused):
        new.serve()

    old.receive(back, new.key)

    lineage = old.serve()
    assert old.journal.ledgers.total(lineage).entries == 5
    claimed = old.journal.ledgers.claimed(str(make_offer(SPEC).participation_id))
    assert claimed == old.journal.ledgers.total(lineage).cost  # with what the other worker released
    assert "no longer held" in old.objections(make_offer(SPEC, 2))[0]
    old.release(make_offer(SPEC, 3))
    with pytest.raises(HandoverRefused, match="it is an old one"):
        old.receive(back, new.key)
    third = old.give(new.key)
    assert json.loads(third) != json.loads(first)
    new.receive(third, old.key)
    assert new.journal.ledgers.total(new.serve()) == old.journal.ledgers.total(lineage)
    for ward in (old, new):
        ward.journal.verify()


def test_a_document_that_was_taken_and_went_on_is_not_taken_back_to_a_shorter_ledger(old: Ward, new: Ward) -> None:
    text = old.give(new.key)
    new.receive(text, old.key)
    new.release(make_offer(SPEC, 2))

    with pytest.raises(HandoverRefused, match="knows 4 entries"):
        new.receive(text, old.key)


def _with(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    plain = json.loads(text)
    change(plain["document"])
    return json.dumps(plain)


def _forget_last_release(document: dict[str, Any]) -> None:
    del document["entries"][1]


def _cheaper(document: dict[str, Any]) -> None:
    entry = document["entries"][1]
    body = {**json.loads(entry["body"]), "nano": [0] * 76}
    entry["body"] = canonical_json(body).decode()


@pytest.mark.parametrize(
    "change",
    [
        _forget_last_release,
        _cheaper,
        lambda document: document.update(taker="ab" * 32),
        lambda document: document.update(dataset="others"),
        lambda document: document.update(holdout_key="ab" * 32),
        lambda document: document["participations"].clear(),
        lambda document: document["releases"].pop(),
    ],
)
def test_a_document_that_was_changed_on_its_way_is_not_taken(
    old: Ward, new: Ward, change: Callable[[dict[str, Any]], None]
) -> None:
    text = _with(old.give(new.key), change)

    with pytest.raises(HandoverRefused, match="not signed by the worker"):
        new.receive(text, old.key)
    assert new.journal.ledgers.lineages() == []


def _signed_by(ward: Ward, text: str, change: Callable[[dict[str, Any]], None]) -> str:
    """What a worker would sign that lies."""
    document = SignedDocument.model_validate_json(_with(text, change)).document
    signature = ward.state.identity().sign(document.signed_bytes()).hex()
    return SignedDocument(document=document, signature=signature).model_dump_json()


def _rehashed(document: dict[str, Any]) -> None:
    """A ledger without its second entry, with hashes that fit."""
    del document["entries"][1]
    previous = "0" * 64
    for number, entry in enumerate(document["entries"], start=1):
        entry["previous_hash"] = previous
        entry["hash"] = previous = hash_of(document["lineage"], number, previous, entry["body"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_cheaper, "entry 2 does not have the hash"),
        (_forget_last_release, "entry 2 is missing"),
        (lambda document: document["entries"].pop(), "does not end with its being handed on"),
        (lambda document: document["entries"].clear(), "has no entry"),
        (lambda document: document.update(giver="ab" * 32), "comes from another worker"),
    ],
)
def test_a_ledger_that_is_no_whole_chain_is_not_taken_even_if_it_is_signed(
    old: Ward, new: Ward, change: Callable[[dict[str, Any]], None], word: str
) -> None:
    text = old.give(new.key)
    text = _with(text, change) if word == "has no entry" else _signed_by(old, text, change)

    with pytest.raises(HandoverRefused, match=word):
        new.receive(text, old.key)


def test_a_ledger_that_contradicts_the_one_we_know_is_not_taken(old: Ward, new: Ward) -> None:
    new.receive(old.give(new.key), old.key)
    new.release(make_offer(SPEC, 2))
    back = new.give(old.key)

    with pytest.raises(HandoverRefused, match="does not continue them"):
        old.receive(_signed_by(new, back, _rehashed), new.key)


def test_a_document_is_for_one_worker_of_one_organization(old: Ward, new: Ward, tmp_path: Path) -> None:
    text, third = old.give(new.key), Ward.at(tmp_path / "third")

    with pytest.raises(HandoverRefused, match="made out to the worker"):
        third.receive(text, old.key)
    with pytest.raises(HandoverRefused, match="belongs to 'geneva', this worker to 'zurich'"):
        new.receive(text, old.key, organization="zurich")
    with pytest.raises(HandoverRefused, match="not signed by"):
        new.receive(text, third.key)
    with pytest.raises(HandoverRefused, match="64 hexadecimal digits"):
        new.receive(text, "not a key")
    with pytest.raises(HandoverRefused, match="no handover of a dataset"):
        new.receive("{}", old.key)


def test_a_worker_that_has_served_the_same_data_by_itself_takes_no_second_ledger(old: Ward, new: Ward) -> None:
    new.serve()

    with pytest.raises(HandoverRefused, match="ledger of its own"):
        new.receive(old.give(new.key), old.key)


def test_nothing_is_handed_on_while_a_release_of_it_is_under_way(old: Ward, new: Ward) -> None:
    account = Account(old.serve(), Budget(epsilon=10))
    draft = old.state.scratch / "upload.safetensors"
    draft.write_bytes(b"noised")
    release = old.journal.prepare(
        make_offer(SPEC, 2), draft, digest=sha256(b"noised").hexdigest(), size_bytes=6, metrics={}, account=account
    )
    old.journal.note_asking(release, unanswered=True)
    with pytest.raises(HandoverRefused, match="Round 2 of job 'heart' was released and is not acknowledged"):
        old.give(new.key)
    assert old.serve() == account.lineage  # still ours

    old.journal.note_asking(release, unanswered=False)  # the service said that it did not admit it
    text = old.give(new.key)

    assert old.journal.find(release.key) is None
    new.receive(text, old.key)
    assert new.objections(make_offer(SPEC, 2)) == []  # it never left: computed anew, it is noised once


def test_what_is_not_ours_to_give_is_not_given(old: Ward, new: Ward) -> None:
    with pytest.raises(HandoverRefused, match="never served"):
        old.give(new.key, name="staff")
    with pytest.raises(HandoverRefused, match="own public key"):
        old.give(old.key)
    twin = old.dataset.model_copy(update={"name": "twin"})
    old.journal.lineages.of(twin, content_of(twin.source, None))
    with pytest.raises(HandoverRefused, match="shares its records, and so its ledger, with 'twin'"):
        old.give(new.key, configured=(DATASET, "twin"))


def test_a_damaged_ledger_is_not_handed_on(old: Ward, new: Ward) -> None:
    old.journal.connection.execute("UPDATE ledgers SET draws = 0")

    with pytest.raises(LedgerDamaged):
        old.give(new.key)


def test_a_taking_over_that_breaks_off_leaves_nothing_behind(
    old: Ward, new: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = old.give(new.key)
    monkeypatch.setattr("isthmus_worker.handover._import_rows", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        new.receive(text, old.key)

    assert (new.journal.ledgers.lineages(), new.journal.lineages.find(DATASET)) == ([], None)
    monkeypatch.undo()
    new.receive(text, old.key)


def test_a_dataset_that_is_handed_on_leaves_no_secrets_of_secured_rounds_behind(tmp_path: Path) -> None:
    giver, taker = Ward.at(tmp_path / "giver"), Ward.at(tmp_path / "taker")
    giver.serve()
    offer = SecuredRound(bytes(32)).offer()
    giver.journal.sessions.begin(offer, b"s" * 128)
    elsewhere = offer.model_copy(update={"dataset": "others", "participation_id": UUID(int=9)})
    giver.journal.sessions.begin(elsewhere, b"t" * 128)

    giver.give(taker.key)

    assert giver.journal.sessions.find(session_key(offer)) is None
    assert giver.journal.sessions.find(session_key(elsewhere)) is not None
