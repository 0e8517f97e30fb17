"""The bytes on the wire are what `vectors.json` says, and what it says is read with nothing but the description."""

import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.sdk.secagg import vectors

SAVED: dict[str, Any] = json.loads(vectors.FILE.read_text(encoding="utf-8"))
ATTEMPTS = [name for name in SAVED if name != "what"]
P = 2**256 + 297


def test_the_same_secrets_give_the_same_bytes_as_ever() -> None:
    assert json.loads(json.dumps(vectors.made())) == SAVED


# What follows uses nothing of isthmus: it is the description in another few lines, by the letter.


def u32(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in numbers)


def derived(secret: bytes, info: bytes, length: int = 32) -> bytes:
    extracted = hmac.digest(b"isthmus/secagg/v1", secret, hashlib.sha256)
    found = block = b""
    for number in range(1, 1 + -(-length // 32)):
        block = hmac.digest(extracted, block + info + bytes([number]), hashlib.sha256)
        found += block
    return found[:length]


def agreed(secret: str, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(secret)).exchange(
        X25519PublicKey.from_public_bytes(public)
    )


def share(context: bytes, coins: bytes, label: bytes, secret: bytes, threshold: int, x: int) -> bytes:
    value = int.from_bytes(secret, "big")
    for power in range(1, threshold):
        value += int.from_bytes(derived(coins, context + label + u32(power), 64), "big") * pow(x, power, P)
    return (value % P).to_bytes(33, "big")


def words(key: bytes, count: int) -> list[int]:
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count))
    return [int.from_bytes(stream[at : at + 4], "little") for at in range(0, 4 * count, 4)]


@pytest.mark.parametrize("name", ATTEMPTS)
def test_another_implementation_makes_the_same_of_it(name: str) -> None:  # noqa: PLR0912 - a whole attempt, in its order
    saved = SAVED[name]
    members = len(saved["keys"])
    everybody, survivors = range(members), saved["survivors"]
    roster, context = bytes.fromhex(saved["roster"]), bytes.fromhex(saved["context"])
    asked = saved["context_of"]
    assert hashlib.sha256(roster).hexdigest() == saved["roster_digest"] == asked["roster_digest"]
    terms = json.dumps(saved["terms"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(terms.encode()).hexdigest() == asked["terms_digest"]
    digests = bytes.fromhex("".join(asked[f"{name}_digest"] for name in ("spec", "model", "terms", "roster")))
    round_id = bytes.fromhex(asked["round_id"].replace("-", ""))
    numbers = u32(asked["round_number"], asked["attempt"])
    assert hashlib.sha256(b"isthmus/secagg/v1" + round_id + digests + numbers).digest() == context
    threshold = max(2, 2 * members // 3 + 1)
    assert saved["threshold"] == threshold

    # The roster and the keys.
    identities, at = [], 4
    for _ in everybody:
        at += 1 + roster[at]
        at += 1 + roster[at]
        identities.append(roster[at : at + 32])
        at += 40
    assert at == len(roster)
    assert roster[:4] == u32(members)
    keys = [bytes.fromhex(message) for message in saved["keys"]]
    for i, message in enumerate(keys):
        seed = bytes.fromhex(saved["secrets"][i]["seed"])
        assert len(message) == 164
        assert message[:4] == u32(i)
        assert message[68:100] == hashlib.sha256(b"b" + context + seed).digest()
        signed = b"isthmus/secagg/keys" + context + message[:100]
        Ed25519PublicKey.from_public_bytes(identities[i]).verify(message[100:], signed)
    assert bytes.fromhex(saved["keys_answer"]) == u32(len(roster)) + roster + u32(members) + b"".join(keys)

    # The shares.
    for i in everybody:
        mine = saved["secrets"][i]
        coins = bytes.fromhex(mine["coins"])
        made = b""
        for j in everybody:
            plain = b"".join(
                share(context, coins, label, bytes.fromhex(mine[which]), threshold, j + 1)
                for label, which in ((b"b-share", "seed"), (b"m-share", "mask"))
            )
            if i == j:
                assert plain.hex() == "".join(saved["own_shares"][i])
                continue
            pair = u32(min(i, j), max(i, j))
            key = derived(agreed(mine["channel"], keys[j][4:36]), context + b"ch" + pair)
            made += AESGCM(key).encrypt(u32(i, j, 1), plain, context + u32(i, j))
        assert made.hex() == saved["shares"][i]
    for i in everybody:
        others = [j for j in everybody if j != i]
        place = {j: [k for k in everybody if k != j].index(i) for j in others}
        parts = "".join(saved["shares"][j][164 * place[j] : 164 * place[j] + 164] for j in others)
        assert saved["shares_answers"][i] == u32(members, *everybody).hex() + parts

    # The masked vectors.
    for i in everybody:
        mine = saved["secrets"][i]
        masks = [(derived(bytes.fromhex(mine["seed"]), context + b"self"), 1)]
        for j in everybody:
            if i != j:
                pair = u32(min(i, j), max(i, j))
                masks.append(
                    (derived(agreed(mine["mask"], keys[j][36:68]), context + b"pw" + pair), 1 if i < j else -1)
                )
        assert [(key.hex(), sign) for key, sign in masks] == [(m["key"], m["sign"]) for m in saved["masks"][i]]
        assert [words(key, 8) for key, _ in masks] == [m["first_words"] for m in saved["masks"][i]]
        vector = saved["vectors"][i]
        added = [sign * word for key, sign in masks for word in words(key, len(vector))]
        total = [(x + sum(added[q :: len(vector)])) % 2**32 for q, x in enumerate(vector)]
        assert b"".join(word.to_bytes(4, "little") for word in total).hex() == saved["masked"][i]

    # Survivors, and what is revealed.
    listed = u32(len(survivors), *survivors)
    assert bytes.fromhex(saved["update_answer"]) == listed
    signed = b"isthmus/secagg/survivors" + context + hashlib.sha256(u32(*survivors)).digest()
    answer = u32(len(survivors))
    for i in survivors:
        signature = bytes.fromhex(saved["survivors_signatures"][str(i)])
        Ed25519PublicKey.from_public_bytes(identities[i]).verify(signature, signed)
        answer += u32(i) + signature
    assert bytes.fromhex(saved["survivors_answer"]) == answer
    for i in survivors:
        revealed = b""
        for j in everybody:
            label, which, kind = (b"b-share", "seed", 0) if j in survivors else (b"m-share", "mask", 1)
            theirs = saved["secrets"][j]
            secret, coins = bytes.fromhex(theirs[which]), bytes.fromhex(theirs["coins"])
            revealed += u32(j) + bytes([kind]) + share(context, coins, label, secret, threshold, i + 1)
        assert saved["unmask"][str(i)] == revealed.hex()

    # The sum.
    rows = [bytes.fromhex(saved["masked"][i]) for i in survivors]
    width = len(saved["sum"])
    sums = [sum(int.from_bytes(row[4 * q : 4 * q + 4], "little") for row in rows) for q in range(width)]
    for mask in saved["added_to_the_sum"]:
        for q, word in enumerate(words(bytes.fromhex(mask["key"]), width)):
            sums[q] += mask["sign"] * word
    assert [total % 2**32 for total in sums] == saved["sum"]
    assert saved["sum"] == [sum(saved["vectors"][i][q] for i in survivors) % 2**32 for q in range(width)]
