"""The service refuses what is no message, and finds the secrets although some members tell wrong shares."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from isthmus.secagg import client, recovery, server
from isthmus.secagg.derivation import commitment_to
from isthmus.secagg.messages import REVEALED_BYTES, SEALED_BYTES, Advertisement, keys_statement, u32s
from isthmus.secagg.shamir import PRIME
from isthmus.secagg.violations import MessageInvalid, SharesWrong
from tests.sdk.secagg.driver import Attempt, Indices

ALL = (0, 1, 2, 3)


def flipped(raw: bytes) -> list[bytes]:
    """The bytes with one bit turned over, for each bit."""
    return [raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :] for at in range(len(raw)) for bit in range(8)]


@pytest.fixture(scope="module")
def attempt() -> Attempt:
    return Attempt(4)


def check_keys(attempt: Attempt, message: bytes, *, others: Indices = ()) -> None:
    messages = [attempt.advertisements[i] for i in others]
    server.check_keys(attempt.context, 2, attempt.roster[2].identity, message, others=messages)


def signed(attempt: Attempt, **changed: bytes | int) -> bytes:
    fields = replace(Advertisement.from_bytes(attempt.advertisements[2]), **changed).fields()  # type: ignore[arg-type]
    return fields + attempt.sign(2)(keys_statement(attempt.context, fields))


def test_every_flipped_bit_of_a_keys_message_is_noticed(attempt: Attempt) -> None:
    message = attempt.advertisements[2]
    check_keys(attempt, message, others=(0, 1, 3))
    for changed in flipped(message):
        with pytest.raises(MessageInvalid):
            check_keys(attempt, changed)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda a: a.advertisements[2][:-1], "A keys message has 164 bytes here, not 163"),
        (lambda a: a.advertisements[2] + b"\0", "not 165"),
        (lambda a: b"", "not 0"),
        (lambda a: a.advertisements[1], "The keys are of member 1; the sender is member 2"),
        (lambda a: signed(a, index=3), "The keys are of member 3"),
        (lambda a: u32s([2]) + a.advertisements[1][4:], "the signature of the keys"),
        (lambda a: Attempt(4, number=2).advertisements[2], "the signature of the keys"),
        (lambda a: signed(a, mask=bytes(32)), "a point of low order"),
        (lambda a: signed(a, channel=b"\1" + bytes(31)), "a point of low order"),
        (lambda a: signed(a, mask=b"\xff" * 32), "canonical form"),
        (lambda a: signed(a, mask=Advertisement.from_bytes(a.advertisements[2]).channel), "comes twice"),
        (lambda a: signed(a, mask=Advertisement.from_bytes(a.advertisements[0]).mask), "comes twice"),
        (lambda a: signed(a, channel=Advertisement.from_bytes(a.advertisements[3]).mask), "comes twice"),
    ],
)
def test_keys_that_others_would_refuse_are_refused(
    attempt: Attempt, make: Callable[[Attempt], bytes], reason: str
) -> None:
    with pytest.raises(MessageInvalid, match=reason):
        check_keys(attempt, make(attempt), others=(0, 1, 3))


def test_a_shares_message_has_a_part_for_each_of_the_others(attempt: Attempt) -> None:
    message = attempt.share_out(ALL, 2)
    server.check_shares(message, 4)
    for wrong in (message[:-1], message + b"\0", message[SEALED_BYTES:], b""):
        with pytest.raises(MessageInvalid, match="A shares message has 246 bytes here"):
            server.check_shares(wrong, 4)
    parts = [server.ciphertext_for(message, 2, to, ALL) for to in (0, 1, 3)]
    assert b"".join(parts) == message
    for nobody in (2, 4):
        with pytest.raises(ValueError, match="not in list"):
            server.ciphertext_for(message, 2, nobody, ALL)


def test_a_confirmation_is_of_this_member_this_set_and_this_attempt(attempt: Attempt) -> None:
    identity = attempt.roster[1].identity
    message = client.confirm(attempt.context, ALL, attempt.sign(1))
    server.check_confirmation(attempt.context, ALL, identity, message)
    wrong = [
        *flipped(message),
        client.confirm(attempt.context, (0, 1, 2), attempt.sign(1)),
        client.confirm(attempt.context, ALL, attempt.sign(2)),
        client.confirm(Attempt(4, number=2).context, ALL, attempt.sign(1)),
    ]
    for other in wrong:
        with pytest.raises(MessageInvalid, match="not this identity's"):
            server.check_confirmation(attempt.context, ALL, identity, other)
    for other in (b"", message[:-1], message + b"\0"):
        with pytest.raises(MessageInvalid, match="A survivors message has 64 bytes"):
            server.check_confirmation(attempt.context, ALL, identity, other)


def test_an_unmask_message_has_what_was_asked_for_and_nothing_else(attempt: Attempt) -> None:
    survivors = (0, 1, 2)
    message = attempt.reveals(ALL, ALL, survivors, (1,))[1]
    entries = [message[at : at + REVEALED_BYTES] for at in range(0, len(message), REVEALED_BYTES)]
    own_mask, mask_key = attempt.shared(ALL, ALL)[1].held[3]

    def refused(changed: bytes, reason: str) -> None:
        with pytest.raises(MessageInvalid, match=reason):
            server.check_reveal(changed, ALL, survivors)

    refused(message[:-1], "An unmask message has 152 bytes here, not 151")
    refused(message + b"\0", "not 153")
    refused(b"", "not 0")
    refused(b"".join([entries[1], entries[0], *entries[2:]]), "Share 0 is not of member 0, whose turn it is")
    refused(b"".join([*entries[:3], u32s([3]) + b"\0" + own_mask]), "The share of member 3 is not of the secret that")
    refused(b"".join([*entries[:2], u32s([3]) + b"\0" + own_mask, u32s([3]) + b"\1" + mask_key]), "not of member 2")
    refused(b"".join([*entries[:3], u32s([3]) + b"\2" + mask_key]), "not of the secret that was asked for")
    refused(b"".join([*entries[:3], u32s([3]) + b"\1" + PRIME.to_bytes(33, "big")]), "not a number of the field")
    for place in range(4):
        for byte in range(5):
            for bit in range(8):
                at = place * REVEALED_BYTES + byte
                refused(message[:at] + bytes([message[at] ^ 1 << bit]) + message[at + 1 :], r"Share|The share")


class Liars:
    """An attempt among 10, of whom one left after its shares, where some of those who answer tell wrong shares."""

    def __init__(self, members: int = 10, left: int = 4) -> None:
        self.attempt = Attempt(members)
        self.everybody = tuple(range(members))
        self.survivors = tuple(i for i in self.everybody if i != left)
        self.reveals = self.attempt.reveals(self.everybody, self.everybody, self.survivors, self.survivors)
        self.rows = self.attempt.masked(self.everybody, self.everybody)

    def told(self, answering: Indices, wrong: dict[int, Indices]) -> dict[int, bytes]:
        """The messages of those that answer; a liar's shares of these members are wrong."""
        found = {i: self.reveals[i] for i in answering}
        for liar, dealers in wrong.items():
            message = bytearray(found[liar])
            for dealer in dealers:
                message[dealer * REVEALED_BYTES + 20 + liar % 10] ^= 1 + dealer
            found[liar] = bytes(message)
        for message in found.values():
            server.check_reveal(message, self.everybody, self.survivors)
        return found

    def rebuild(self, answering: Indices, wrong: dict[int, Indices]) -> server.Rebuilt:
        return self.attempt.rebuild(self.everybody, self.survivors, self.told(answering, wrong))

    def sum_with(self, rebuilt: server.Rebuilt) -> bool:
        total = self.attempt.unmasked(self.rows, self.survivors, rebuilt.masks)
        right = self.attempt.vectors[list(self.survivors)].sum(axis=0, dtype=np.uint32)
        return bool(np.array_equal(total, right))


@pytest.fixture(scope="module")
def liars() -> Liars:
    return Liars()


def test_wrong_shares_among_just_enough_are_noticed_and_everybody_is_a_suspect(liars: Liars) -> None:
    seven = liars.survivors[:7]
    assert liars.sum_with(liars.rebuild(seven, {}))
    with pytest.raises(SharesWrong, match="do not fit together") as wrong:
        liars.rebuild(seven, {5: liars.everybody})
    assert wrong.value.suspects == seven


def test_a_secret_that_cannot_be_rebuilt_names_its_dealer(liars: Liars) -> None:
    with pytest.raises(SharesWrong) as wrong:
        liars.rebuild(liars.survivors[:7], {5: (2,)})
    assert wrong.value.suspects == (2,)


@pytest.mark.parametrize("liar", [0, 3, 8])
@pytest.mark.parametrize("about", [tuple(range(10)), (4,), (0, 9)])
def test_one_more_answer_finds_one_liar(liars: Liars, liar: int, about: Indices) -> None:
    eight = tuple(sorted({*liars.survivors[:7], 8, liar}))
    assert len(eight) == 8
    rebuilt = liars.rebuild(eight, {liar: about})
    assert liars.sum_with(rebuilt)
    # A wrong share that was never looked at harms nobody and is not noticed.
    assert rebuilt.suspects in ((liar,), ())
    assert rebuilt.suspects == (liar,) or liar == 8


def test_two_more_answers_find_two_liars(liars: Liars) -> None:
    rebuilt = liars.rebuild(liars.survivors, {0: liars.everybody, 7: liars.everybody})
    assert liars.sum_with(rebuilt)
    assert rebuilt.suspects == (0, 7)


def test_liars_that_lie_about_different_members_are_all_found(liars: Liars) -> None:
    rebuilt = liars.rebuild(liars.survivors, {0: (0, 1), 3: (4,), 6: (9,)})
    assert liars.sum_with(rebuilt)
    assert rebuilt.suspects == (0, 3, 6)


def test_an_honest_member_that_was_left_out_with_liars_is_no_suspect() -> None:
    twelve = Liars(13)  # 9 shares are needed: decoding finds one liar, leaving out three members in turn finds two
    rebuilt = twelve.rebuild(twelve.survivors, {0: twelve.everybody, 7: twelve.everybody})
    assert twelve.sum_with(rebuilt)
    assert rebuilt.suspects == (0, 7)


def test_more_liars_than_answers_to_spare_are_noticed(liars: Liars) -> None:
    with pytest.raises(SharesWrong) as wrong:
        liars.rebuild(liars.survivors, dict.fromkeys((0, 1, 2), liars.everybody))
    assert wrong.value.suspects == liars.survivors


def test_many_liars_among_many_are_found_by_decoding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "TRIED_SUBSETS", 0)
    many = Liars(31)  # 21 shares are needed; 30 answer: four may lie
    rebuilt = many.rebuild(many.survivors, dict.fromkeys((0, 2, 11, 20), many.everybody))
    assert many.sum_with(rebuilt)
    assert rebuilt.suspects == (0, 2, 11, 20)
    with pytest.raises(SharesWrong):
        many.rebuild(many.survivors, dict.fromkeys((0, 2, 11, 20, 21), many.everybody))


def test_the_search_for_liars_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Liars(40)  # 27 shares are needed
    tried = []
    combine = recovery.secret_from

    def counted(xs: list[int], shares: list[int]) -> int:
        tried.append(len(xs))
        return combine(xs, shares)

    monkeypatch.setattr(recovery, "secret_from", counted)
    with pytest.raises(SharesWrong) as wrong:
        many.rebuild(many.survivors[:29], dict.fromkeys(range(3), many.everybody))
    assert wrong.value.suspects == many.survivors[:29]
    assert len(tried) == recovery.TRIED_SUBSETS + 40


def test_a_dealer_whose_shares_do_not_fit_its_promise_is_named() -> None:
    """It commits to one seed and shares another one: no answers of the others can ever rebuild it."""
    attempt = Attempt(4)
    promised = Advertisement.from_bytes(attempt.advertisements[2])
    fields = replace(promised, commitment=commitment_to(attempt.context, bytes(32))).fields()
    attempt.advertisements[2] = fields + attempt.sign(2)(keys_statement(attempt.context, fields))
    reveals = {}
    # The dealer's own check of the answer would stop it; a cheating one does not check. All others go on.
    everybody = {i: attempt.open_keys(i, attempt.keys_answer(ALL)) for i in (0, 1, 3)}
    everybody[2] = replace(everybody[0], peers=(0, 1, 3))
    messages = {i: client.share_out(attempt.context, i, attempt.secrets[i], everybody[i]) for i in ALL}
    for i in (0, 1, 3):
        answer = attempt.shares_answer(ALL, ALL, i, messages)
        known = client.open_shares(attempt.context, i, attempt.secrets[i], everybody[i], answer)
        reveals[i] = client.reveal(known, ALL)
    with pytest.raises(SharesWrong) as wrong:
        attempt.rebuild(ALL, ALL, reveals)
    assert wrong.value.suspects == (2,)


def test_the_rebuilt_masks_are_just_those_that_do_not_cancel(attempt: Attempt) -> None:
    survivors = (0, 1, 3)
    rebuilt = attempt.rebuild(ALL, survivors, attempt.reveals(ALL, ALL, survivors, survivors))
    applied = {i: {(mask.key, mask.sign) for mask in attempt.masks(ALL, ALL, i)} for i in ALL}
    own = {(attempt.masks(ALL, ALL, i)[0].key, -1) for i in survivors}
    pairs = {(key, -sign) for i in survivors for key, sign in applied[i] if (key, -sign) in applied[2]}
    assert len(pairs) == 3
    assert {(mask.key, mask.sign) for mask in rebuilt.masks} == own | pairs
    assert attempt.masks(ALL, ALL, 2)[0].key not in {mask.key for mask in rebuilt.masks}
    public = server.reconstruct(
        attempt.context,
        attempt.roster,
        attempt.advertisements,
        ALL,
        survivors,
        attempt.reveals(ALL, ALL, survivors, survivors),
    )
    assert public == rebuilt.masks


def test_survivors_have_shared_and_only_they_answer(attempt: Attempt) -> None:
    reveals = attempt.reveals(ALL, ALL, ALL, ALL)
    with pytest.raises(ValueError, match="only they tell shares"):
        attempt.rebuild((0, 1, 2), ALL, reveals)
    with pytest.raises(ValueError, match="only they tell shares"):
        attempt.rebuild(ALL, (0, 1, 2), reveals)
