"""A service that cheats: the member leaves with a reason of its own for each way, and reveals nothing."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from isthmus.secagg import client, server
from isthmus.secagg.context import context_of
from isthmus.secagg.derivation import agree, channel_key
from isthmus.secagg.messages import ADVERTISEMENT_BYTES, SEALED_BYTES, Advertisement, keys_statement, u32s
from isthmus.secagg.parameters import threshold_of
from isthmus.secagg.roster import Member, Roster
from isthmus.secagg.shamir import PRIME, secret_from
from isthmus.secagg.violations import ProtocolViolation
from isthmus.wire.secured import Step
from tests.sdk.secagg.driver import Attempt, Indices, drawn

ALL = (0, 1, 2, 3)
ME = 1
Answers = dict[Step, bytes]
Cheat = Callable[[Attempt], tuple[Step, bytes]]


def honest(attempt: Attempt, survivors: Indices = ALL) -> Answers:
    """What member 1 is answered by a service that does what it should."""
    messages = {i: attempt.share_out(ALL, i) for i in ALL}
    return {
        Step.KEYS: attempt.keys_answer(ALL),
        Step.SHARES: attempt.shares_answer(ALL, ALL, ME, messages),
        Step.UPDATE: server.survivors_answer(survivors),
        Step.SURVIVORS: attempt.confirm(survivors, survivors),
    }


def play(attempt: Attempt, answers: Answers, *, needed: int = 3) -> bytes:
    """Member 1 through all its steps; what it reveals at the end."""
    mine = attempt.secrets[ME]
    digest = attempt.roster.digest()
    keyed = client.open_keys(attempt.context, digest, len(attempt), ME, mine, answers[Step.KEYS])
    shared = client.open_shares(attempt.context, ME, mine, keyed, answers[Step.SHARES])
    survivors = client.open_survivors(ME, shared, answers[Step.UPDATE], needed=needed)
    client.open_confirmations(attempt.context, keyed.roster, survivors, answers[Step.SURVIVORS])
    return client.reveal(shared, survivors)


def keys_from(attempt: Attempt, index: int, **changed: bytes) -> bytes:
    """A keys message of a member that plays along with the service, signed as it should be."""
    fields = replace(Advertisement.from_bytes(attempt.advertisements[index]), **changed)
    return fields.fields() + attempt.sign(index)(keys_statement(attempt.context, fields.fields()))


def keys_answer(attempt: Attempt, **changed: bytes) -> tuple[Step, bytes]:
    """The answer to the keys with other messages for members 0 to 3, by the names m0 to m3."""
    messages = {i: changed.get(f"m{i}", attempt.advertisements[i]) for i in ALL}
    return Step.KEYS, server.keys_answer(attempt.roster, messages)


def another(attempt: Attempt, **changed: object) -> Attempt:
    """The same members and secrets in another attempt, round or model."""
    return Attempt(len(attempt), **changed)  # type: ignore[arg-type]


def with_an_invented_member(attempt: Attempt) -> Roster:
    invented = Ed25519PrivateKey.from_private_bytes(drawn("invented")).public_key().public_bytes_raw()
    return Roster([*attempt.roster.members, Member("org-zzz", "patients", invented, 1)])


def with_another_identity(attempt: Attempt) -> Roster:
    members = list(attempt.roster.members)
    invented = Ed25519PrivateKey.from_private_bytes(drawn("invented")).public_key().public_bytes_raw()
    return Roster([*members[:3], replace(members[3], identity=invented)])


def raw_keys_answer(attempt: Attempt, roster: bytes, messages: list[bytes]) -> tuple[Step, bytes]:
    return Step.KEYS, u32s([len(roster)]) + roster + u32s([len(messages)]) + b"".join(messages)


def shares_from(attempt: Attempt, sender: int, plain: bytes) -> tuple[Step, bytes]:
    """The answer to the shares, where one member encrypted something else for member 1."""
    theirs = X25519PrivateKey.from_private_bytes(attempt.secrets[sender].channel)
    mine = Advertisement.from_bytes(attempt.advertisements[ME]).channel
    key = channel_key(attempt.context, agree(theirs, mine), sender, ME)
    sealed = AESGCM(key).encrypt(u32s((sender, ME, 1)), plain, attempt.context + u32s((sender, ME)))
    messages = {i: attempt.share_out(ALL, i) for i in ALL}
    parts = {i: server.ciphertext_for(messages[i], i, ME, ALL) for i in ALL if i != ME}
    return Step.SHARES, server.shares_answer(ME, ALL, parts | {sender: sealed})


def shares_answer(attempt: Attempt, indices: Indices, senders: Indices, *, swap: bool = False) -> tuple[Step, bytes]:
    messages = {i: attempt.share_out(ALL, i) for i in ALL}
    parts = {i: server.ciphertext_for(messages[i], i, ME, ALL) for i in senders}
    if swap:
        parts[senders[0]], parts[senders[1]] = parts[senders[1]], parts[senders[0]]
    return Step.SHARES, server.shares_answer(ME, indices, parts)


def shares_meant_for_another(attempt: Attempt) -> tuple[Step, bytes]:
    messages = {i: attempt.share_out(ALL, i) for i in ALL}
    parts = {i: server.ciphertext_for(messages[i], i, ME, ALL) for i in ALL if i != ME}
    return Step.SHARES, server.shares_answer(ME, ALL, parts | {0: server.ciphertext_for(messages[0], 0, 2, ALL)})


def shares_of_another_attempt(attempt: Attempt) -> tuple[Step, bytes]:
    return Step.SHARES, honest(another(attempt, number=2))[Step.SHARES]


def signatures(attempt: Attempt, signing: Indices, survivors: Indices = ALL) -> tuple[Step, bytes]:
    found = {i: client.confirm(attempt.context, survivors, attempt.sign(i)) for i in signing}
    return Step.SURVIVORS, server.confirmations_answer(found)


def signatures_twice(attempt: Attempt) -> tuple[Step, bytes]:
    one = u32s([2]) + client.confirm(attempt.context, ALL, attempt.sign(2))
    return Step.SURVIVORS, u32s([3]) + one * 3


CHEATS: dict[str, tuple[Cheat, str]] = {
    # the answer to the keys
    "an invented member": (
        lambda a: raw_keys_answer(a, with_an_invented_member(a).to_bytes(), list(a.advertisements.values())),
        "The roster is not the one that the task was offered with",
    ),
    "another identity in the roster": (
        lambda a: raw_keys_answer(a, with_another_identity(a).to_bytes(), list(a.advertisements.values())),
        "The roster is not the one that the task was offered with",
    ),
    "keys of nobody in the roster": (
        lambda a: keys_answer(a, m3=u32s([4]) + a.advertisements[3][4:]),
        "Keys came of a member that is not in the roster",
    ),
    "keys of one member twice": (
        lambda a: keys_answer(a, m3=a.advertisements[2]),
        "The answer to the keys names members twice or not in their order",
    ),
    "keys in another order": (
        lambda a: keys_answer(a, m0=a.advertisements[1], m1=a.advertisements[0]),
        "The answer to the keys names members twice or not in their order",
    ),
    "keys that the service made itself": (
        lambda a: keys_answer(a, m2=a.advertisements[2][:4] + Attempt(4, seed="service").advertisements[2][4:]),
        "The keys of org-002 cannot be trusted: the signature of the keys is not this identity's, for this attempt",
    ),
    "keys of an earlier attempt": (
        lambda a: keys_answer(a, m2=another(a, number=2).advertisements[2]),
        "The keys of org-002 cannot be trusted: the signature of the keys is not this identity's, for this attempt",
    ),
    "keys of an earlier round": (
        lambda a: keys_answer(a, m0=another(a, round_number=2).advertisements[0]),
        "The keys of org-000 cannot be trusted: the signature of the keys is not this identity's, for this attempt",
    ),
    "keys of a member that was shown another model": (
        lambda a: keys_answer(a, m0=another(a, model="another").advertisements[0]),
        "The keys of org-000 cannot be trusted: the signature of the keys is not this identity's, for this attempt",
    ),
    "a key that is zero": (
        lambda a: keys_answer(a, m2=keys_from(a, 2, mask=bytes(32))),
        "The keys of org-002 cannot be trusted: a public key is a point of low order",
    ),
    "a channel key that is zero": (
        lambda a: keys_answer(a, m2=keys_from(a, 2, channel=bytes(32))),
        "The keys of org-002 cannot be trusted: a public key is a point of low order",
    ),
    "a key in another form": (
        lambda a: keys_answer(a, m2=keys_from(a, 2, mask=b"\xff" * 32)),
        "The keys of org-002 cannot be trusted: a public key is not in its canonical form",
    ),
    "my own mask key as somebody else's": (
        lambda a: keys_answer(a, m2=keys_from(a, 2, mask=a.advertisements[ME][36:68])),
        "The same public key comes twice",
    ),
    "my own channel key as somebody else's mask key": (
        lambda a: keys_answer(a, m2=keys_from(a, 2, mask=a.advertisements[ME][4:36])),
        "The same public key comes twice",
    ),
    "one key for both purposes": (
        lambda a: keys_answer(a, m2=keys_from(a, 2, mask=a.advertisements[2][4:36])),
        "The same public key comes twice",
    ),
    "my keys left out": (
        lambda a: raw_keys_answer(a, a.roster.to_bytes(), [a.advertisements[i] for i in (0, 2, 3)]),
        "The answer to the keys leaves out this member's own",
    ),
    "other keys of mine": (
        lambda a: keys_answer(a, m1=keys_from(a, ME, mask=Attempt(4, seed="mine").advertisements[ME][36:68])),
        "The answer to the keys has other keys of this member than it sent",
    ),
    "too few keys": (
        lambda a: raw_keys_answer(a, a.roster.to_bytes(), [a.advertisements[i] for i in (0, 1)]),
        "Only 2 of 4 members sent keys; 3 have to",
    ),
    "no roster": (lambda a: raw_keys_answer(a, b"", []), "The roster ends too early"),
    "more keys than members": (
        lambda a: raw_keys_answer(a, a.roster.to_bytes(), [*a.advertisements.values(), b"\xff" * ADVERTISEMENT_BYTES]),
        "Keys came of a member that is not in the roster",
    ),
    # the answer to the shares
    "swapped shares": (
        lambda a: shares_answer(a, ALL, (0, 2, 3), swap=True),
        "The shares from org-000 are not what it encrypted for this member",
    ),
    "shares meant for another member": (
        shares_meant_for_another,
        "The shares from org-000 are not what it encrypted for this member",
    ),
    "shares of an earlier attempt": (
        shares_of_another_attempt,
        "The shares from org-000 are not what it encrypted for this member",
    ),
    "shares that are no numbers of the field": (
        lambda a: shares_from(a, 3, PRIME.to_bytes(33, "big") + bytes(33)),
        "The shares from org-003 are not numbers of the field",
    ),
    "a second share that is no number of the field": (
        lambda a: shares_from(a, 3, bytes(33) + b"\xff" * 33),
        "The shares from org-003 are not numbers of the field",
    ),
    "shares of a member without keys": (
        lambda a: shares_answer(a, (0, 1, 2, 3, 4), (0, 2, 3)),
        "Shares came of a member that has sent no keys",
    ),
    "my shares left out": (
        lambda a: shares_answer(a, (0, 2, 3), (0, 2, 3)),
        "The answer to the shares leaves out this member's own",
    ),
    "too few shares": (lambda a: shares_answer(a, (0, 1), (0,)), "Only 2 members sent shares; 3 have to"),
    "fewer shares than it says": (lambda a: shares_answer(a, ALL, (0, 2)), "The answer to the shares ends too early"),
    "more shares than it says": (
        lambda a: shares_answer(a, (0, 1, 2), (0, 2, 3)),
        f"The answer to the shares has {SEALED_BYTES} bytes more than belong to it",
    ),
    "one sharing twice": (
        lambda a: shares_answer(a, (0, 1, 2, 2), (0, 2, 3)),
        "The answer to the shares names members twice or not in their order",
    ),
    # the answer to the update
    "a sum with a stranger": (
        lambda a: (Step.UPDATE, server.survivors_answer((0, 1, 2, 4))),
        "A member is said to be in the sum that has not shared its secrets",
    ),
    "a sum without me": (
        lambda a: (Step.UPDATE, server.survivors_answer((0, 2, 3))),
        "This member's own update is not in the sum",
    ),
    "a sum of me and one more": (
        lambda a: (Step.UPDATE, server.survivors_answer((0, 1))),
        "Only 2 updates are in the sum; 3 have to be",
    ),
    "somebody in the sum twice": (
        lambda a: (Step.UPDATE, server.survivors_answer((0, 1, 1, 2))),
        "The answer to the update names members twice or not in their order",
    ),
    "more bytes than survivors": (
        lambda a: (Step.UPDATE, server.survivors_answer(ALL) + b"\0"),
        "The answer to the update has 1 bytes more than belong to it",
    ),
    # the answer to the survivors
    "another set for the others": (
        lambda a: signatures(a, (0, 2, 3), (0, 2, 3)),
        "org-000 did not sign this set of survivors in this attempt",
    ),
    "signatures of an earlier attempt": (
        lambda a: signatures(another(a, number=2), ALL),
        "org-000 did not sign this set of survivors in this attempt",
    ),
    "too few signatures": (lambda a: signatures(a, (0, 1)), "Only 2 members signed the survivors; 3 have to"),
    "one signature three times": (
        signatures_twice,
        "The answer to the survivors names members twice or not in their order",
    ),
    "a signature of nobody in the sum": (
        lambda a: (Step.SURVIVORS, u32s([1, 4]) + bytes(64)),
        "Somebody signed the survivors who is not one of them",
    ),
}


@pytest.fixture(scope="module")
def attempt() -> Attempt:
    return Attempt(4)


def test_an_honest_service_is_told_the_shares(attempt: Attempt) -> None:
    revealed = play(attempt, honest(attempt))
    server.check_reveal(revealed, ALL, ALL)
    assert revealed == play(attempt, honest(attempt))


@pytest.mark.parametrize("name", CHEATS)
def test_each_cheat_ends_the_members_part_with_its_own_reason(attempt: Attempt, name: str) -> None:
    cheat, reason = CHEATS[name]
    step, answer = cheat(attempt)
    with pytest.raises(ProtocolViolation, match=f"^{re.escape(reason)}") as violation:
        play(attempt, honest(attempt) | {step: answer})
    assert violation.value.reason == str(violation.value)
    assert violation.value.reason.endswith(".")


def test_a_sum_of_fewer_than_the_job_needs_is_refused(attempt: Attempt) -> None:
    assert play(attempt, honest(attempt, (0, 1, 2)), needed=3)
    with pytest.raises(ProtocolViolation, match="Only 3 updates are in the sum; 4 have to be"):
        play(attempt, honest(attempt, (0, 1, 2)), needed=4)


def test_the_threshold_is_needed_even_where_the_job_needs_fewer(attempt: Attempt) -> None:
    with pytest.raises(ProtocolViolation, match="Only 2 updates are in the sum; 3 have to be"):
        play(attempt, honest(attempt) | {Step.UPDATE: server.survivors_answer((0, 1))}, needed=1)


def test_another_set_of_as_many_is_another_set() -> None:
    attempt = Attempt(5)
    one, other = (0, 1, 2, 3), (0, 1, 2, 4)
    answer = server.confirmations_answer({i: client.confirm(attempt.context, one, attempt.sign(i)) for i in (0, 1, 2)})
    with pytest.raises(ProtocolViolation, match="org-000 did not sign this set"):
        client.open_confirmations(attempt.context, attempt.roster, other, answer)


def test_a_roster_of_another_size_than_offered_is_refused(attempt: Attempt) -> None:
    with pytest.raises(ProtocolViolation, match="The roster has 4 members; the offer said 5"):
        client.open_keys(
            attempt.context, attempt.roster.digest(), 5, ME, attempt.secrets[ME], honest(attempt)[Step.KEYS]
        )


def test_a_roster_that_was_swapped_with_its_digest_has_keys_that_nobody_signed_for_it(attempt: Attempt) -> None:
    """A service that tells one member another roster, digest and all: the others signed for theirs."""
    told = Attempt(4)
    told.roster = with_another_identity(attempt)
    told.context = drawn("the context with that roster")
    mine = client.advertise(told.context, ME, told.secrets[ME], told.sign(ME))
    answer = server.keys_answer(told.roster, attempt.advertisements | {ME: mine})
    with pytest.raises(ProtocolViolation, match="The keys of org-000 cannot be trusted"):
        play(told, {Step.KEYS: answer})


def test_members_that_were_shown_different_models_share_nothing() -> None:
    """Below the signatures, too: neither do ciphertexts open nor masks cancel."""
    one, other = Attempt(4), Attempt(4, model="another")
    assert one.context != other.context
    keyed, elsewhere = one.keyed(ALL), other.keyed(ALL)
    message = client.share_out(other.context, 0, other.secrets[0], elsewhere[0])
    parts = {i: server.ciphertext_for(one.share_out(ALL, i), i, ME, ALL) for i in (2, 3)}
    parts[0] = server.ciphertext_for(message, 0, ME, ALL)
    with pytest.raises(ProtocolViolation, match="The shares from org-000 are not what it encrypted"):
        one.open_shares(ALL, ME, server.shares_answer(ME, ALL, parts))
    here, there = ({mask.key for mask in a.masks(ALL, ALL, i)} for a, i in ((one, 0), (other, 1)))
    assert not here & there
    assert {mask.key for mask in one.masks(ALL, ALL, 0)} & {mask.key for mask in one.masks(ALL, ALL, 1)}
    assert keyed[0].advertisements[1].mask == elsewhere[0].advertisements[1].mask  # the keys were the same


def flipped(raw: bytes) -> list[bytes]:
    """The bytes with one bit turned over, for each bit."""
    return [raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :] for at in range(len(raw)) for bit in range(8)]


@pytest.mark.parametrize("step", [Step.KEYS, Step.SHARES, Step.UPDATE, Step.SURVIVORS])
def test_every_flipped_bit_of_an_answer_is_a_violation(attempt: Attempt, step: Step) -> None:
    answers = honest(attempt)
    for changed in flipped(answers[step]):
        with pytest.raises(ProtocolViolation):
            play(attempt, answers | {step: changed})


@pytest.mark.parametrize("step", [Step.KEYS, Step.SHARES, Step.UPDATE, Step.SURVIVORS])
def test_answers_that_end_too_early_or_go_on_too_long_are_violations(attempt: Attempt, step: Step) -> None:
    answers = honest(attempt)
    whole = answers[step]
    for changed in [*(whole[:length] for length in range(len(whole))), whole + b"\0", whole + whole, b"\xff" * 2000]:
        with pytest.raises(ProtocolViolation):
            play(attempt, answers | {step: changed})


@pytest.mark.parametrize("members", [3, 4, 5, 6, 7, 10])
def test_two_sets_of_survivors_are_never_both_confirmed(members: int) -> None:
    """The service shows the one half one set and the other half another, and colluding members sign both."""
    attempt = Attempt(members)
    everybody = tuple(range(members))
    colluding = everybody[: (members - 1) // 3]
    honest_ones = everybody[len(colluding) :]
    sets = (everybody, everybody[:-1])
    confirmed = []
    for split in range(len(honest_ones) + 1):
        seen = []
        for survivors, shown in zip(sets, (honest_ones[:split], honest_ones[split:]), strict=True):
            signing = tuple(sorted({*colluding, *shown} & set(survivors)))
            signatures = {i: client.confirm(attempt.context, survivors, attempt.sign(i)) for i in signing}
            answer = server.confirmations_answer(signatures)
            try:
                client.open_confirmations(attempt.context, attempt.roster, survivors, answer)
                seen.append(survivors)
            except ProtocolViolation as violation:
                assert "signed the survivors" in violation.reason  # noqa: PT017
        assert len(seen) <= 1
        confirmed += seen
    assert everybody in confirmed


def test_a_member_reveals_one_share_of_each_and_never_both(attempt: Attempt) -> None:
    known = attempt.shared(ALL, ALL)[ME]
    for survivors in (s for size in (3, 4) for s in combinations(ALL, size) if ME in s):
        revealed = client.reveal(known, survivors)
        entries = [revealed[at : at + 38] for at in range(0, len(revealed), 38)]
        assert [int.from_bytes(entry[:4], "big") for entry in entries] == list(ALL)
        for member, entry in enumerate(entries):
            own_mask, mask_key = known.held[member]
            assert entry[4:] == (b"\0" + own_mask if member in survivors else b"\1" + mask_key)
            assert (mask_key if member in survivors else own_mask) not in revealed


@pytest.mark.parametrize("survivors", [(), (0, 1), (0, 2, 3), (0, 1, 2, 4)])
def test_nothing_is_revealed_for_a_set_that_cannot_have_been_confirmed(attempt: Attempt, survivors: Indices) -> None:
    with pytest.raises(ProtocolViolation, match="for no other set of survivors"):
        client.reveal(attempt.shared(ALL, ALL)[ME], survivors)


def test_shares_below_the_threshold_say_nothing() -> None:
    """Two shares of a secret fit every secret equally: a third one can always be made that gives any wanted one."""
    attempt = Attempt(4)
    known = attempt.shared(ALL, ALL)
    xs = (1, 2)
    values = [int.from_bytes(known[i].held[3][0], "big") for i in (0, 1)]
    for wanted in (0, 1, PRIME - 1, int.from_bytes(attempt.secrets[3].seed, "big")):
        # Through (0, wanted) and the two known points goes one polynomial of degree two.
        a0 = wanted
        (x1, y1), (x2, y2) = zip(xs, values, strict=True)
        a2 = ((y2 - a0) * x1 - (y1 - a0) * x2) * pow(x1 * x2 * (x2 - x1), -1, PRIME) % PRIME
        a1 = ((y1 - a0) * pow(x1, -1, PRIME) - a2 * x1) % PRIME
        assert [(a0 + a1 * x + a2 * x * x) % PRIME for x in xs] == values
    true = [*values, int.from_bytes(known[2].held[3][0], "big")]
    assert secret_from((1, 2, 3), true) == int.from_bytes(attempt.secrets[3].seed, "big")


def test_everything_is_made_again_byte_for_byte_from_the_journalled_secrets(attempt: Attempt) -> None:
    secrets = client.Secrets.from_bytes(attempt.secrets[ME].to_bytes())
    assert secrets == attempt.secrets[ME]
    assert len(secrets.to_bytes()) == 128
    assert client.advertise(attempt.context, ME, secrets, attempt.sign(ME)) == attempt.advertisements[ME]
    keyed = client.open_keys(attempt.context, attempt.roster.digest(), 4, ME, secrets, attempt.keys_answer(ALL))
    message = client.share_out(attempt.context, ME, secrets, keyed)
    assert message == attempt.share_out(ALL, ME)
    assert len(message) == 3 * 82
    shared = client.open_shares(attempt.context, ME, secrets, keyed, honest(attempt)[Step.SHARES])
    assert shared == attempt.shared(ALL, ALL)[ME]
    assert client.masks_of(attempt.context, ME, secrets, keyed, shared) == attempt.masks(ALL, ALL, ME)


def test_new_secrets_differ_and_odd_ones_are_refused() -> None:
    drawn_secrets = [client.Secrets.draw() for _ in range(20)]
    parts = {part for secrets in drawn_secrets for part in (secrets.channel, secrets.mask, secrets.seed, secrets.coins)}
    assert len(parts) == 80
    with pytest.raises(ValueError, match="128 bytes, not 127"):
        client.Secrets.from_bytes(bytes(127))
    with pytest.raises(ValueError, match="32 bytes"):
        client.Secrets(bytes(32), bytes(32), bytes(32), bytes(31))


def test_sharing_again_for_fewer_members_gives_the_others_the_same_shares() -> None:
    """A service that closes the keys differently for one member's second try gets no second polynomial."""
    attempt = Attempt(4)
    fewer = (0, 1, 2)
    whole, part = attempt.share_out(ALL, ME), attempt.share_out(fewer, ME)
    assert part == whole[: 2 * SEALED_BYTES]


def test_the_context_changes_with_everything_that_all_have_to_agree_on() -> None:
    digests = ["a" * 64, "b" * 64]
    seen = {
        context_of(
            round_id=UUID(int=round_id),
            spec_digest=spec,
            model_digest=model,
            terms_digest=terms,
            roster_digest=roster,
            round_number=number,
            attempt=attempt,
        )
        for round_id, spec, model, terms, roster, number, attempt in product((1, 2), *[digests] * 4, (1, 2), (1, 2))
    }
    assert len(seen) == 128
    for bad in (
        {"spec_digest": "a" * 63},
        {"model_digest": "g" * 64},
        {"terms_digest": ""},
        {"attempt": -1},
        {"round_number": 1 << 32},
    ):
        with pytest.raises(ValueError, match=r"digest|hex|numbers"):
            context_of(
                **(
                    {
                        "round_id": UUID(int=1),
                        "spec_digest": digests[0],
                        "model_digest": digests[0],
                        "terms_digest": digests[0],
                        "roster_digest": digests[0],
                        "round_number": 1,
                        "attempt": 1,
                    }
                    | bad
                )
            )


def test_no_threshold_lets_two_groups_do_without_a_common_honest_member() -> None:
    for members in range(3, 513):
        colluding = (members - 1) // 3
        assert 2 * threshold_of(members) - members > colluding
