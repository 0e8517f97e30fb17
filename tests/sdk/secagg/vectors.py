"""Makes `vectors.json`: whole attempts from fixed secrets, as hex, for whoever writes another implementation.

`python tests/sdk/secagg/vectors.py` writes it again; a change of it is a change of the protocol.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.secagg import client, server
from isthmus.secagg.context import context_of
from isthmus.secagg.masks import add_masks
from isthmus.secagg.roster import Member, Roster
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.manifest import Manifest
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.secured import terms_digest

FILE: Final = Path(__file__).parent / "vectors.json"
NAMES: Final = ("basel", "charite", "oslo", "st.gallen_2")
ELEMENTS: Final = 6
TERMS: Final[dict[str, Any]] = {
    "model_manifest": {
        "tensors": {
            "küche.weight": {"dtype": "F32", "shape": [2, 3], "rule": "mean", "optional": False},
            "küche.steps": {"dtype": "I64", "shape": [], "rule": "keep", "optional": False},
        }
    },
    "statistics": {
        "names": ["age", "pressure"],
        "count": [300.0, 257.0],
        "mean": [54.25, -1.5e-05],
        "variance": [81.0, 0.0],
        "rows": 300.0,
        "sites": 4,
    },
    "noise": {"where": "distributed", "noise_multiplier": 1.0, "clip_norm": 0.5},
}
"""What all were told alike, as JSON: names beyond ASCII, whole floats, small ones and scalars are in it."""
OF_ONE_DATASET: Final[dict[str, Any]] = {
    "unit": "organization", "epsilon": 3.0, "budget_epsilon": 3.0, "delta": 1e-6, "sampling_probability": 1.0,
    "expected_batch": 0.0, "steps_per_round": 1, "statistics_noise_multiplier": None,
    "evaluation_noise_multiplier": None,
}  # fmt: skip
"""The rest of a plan, which does not count."""


def fixed(first: int, which: int) -> bytes:
    """32 bytes that count up from some number; whoever reads the file sees how they came about."""
    return bytes((first + 16 * which + place) % 256 for place in range(32))


def attempt(members: int, left: tuple[int, ...]) -> dict[str, Any]:
    """One attempt: everybody shares, those that left upload nothing, all others stay until the end.

    Args:
        members: in the roster.
        left: who is gone after its shares.
    """
    everybody = tuple(range(members))
    survivors = tuple(i for i in everybody if i not in left)
    identities = [Ed25519PrivateKey.from_private_bytes(fixed(1, i)) for i in everybody]
    public = [identity.public_key().public_bytes_raw() for identity in identities]
    roster = Roster(Member(NAMES[i], "patients", public[i], 100 + i) for i in everybody)
    asked = {
        "round_id": UUID("0190a5f0-1c2d-7e3f-8a4b-5c6d7e8f9a0b"),
        "spec_digest": fixed(0x11, 0).hex(),
        "model_digest": fixed(0x22, 0).hex(),
        "terms_digest": terms_digest(
            Manifest.model_validate(TERMS["model_manifest"]),
            FeatureStatistics.model_validate(TERMS["statistics"]),
            PrivacyPlan.model_validate({**OF_ONE_DATASET, **TERMS["noise"]}),
        ),
        "roster_digest": roster.digest(),
        "round_number": 3,
        "attempt": 2,
    }
    context = context_of(**asked)
    secrets = [client.Secrets(*(fixed(7 * which + 3, i) for which in range(4))) for i in everybody]
    signs = [identity.sign for identity in identities]
    keys = {i: client.advertise(context, i, secrets[i], signs[i]) for i in everybody}
    keyed_answer = server.keys_answer(roster, keys)
    keyed = [client.open_keys(context, roster.digest(), members, i, secrets[i], keyed_answer) for i in everybody]
    shares = {i: client.share_out(context, i, secrets[i], keyed[i]) for i in everybody}
    shares_answers = {
        i: server.shares_answer(
            i, everybody, {j: server.ciphertext_for(shares[j], j, i, everybody) for j in everybody if j != i}
        )
        for i in everybody
    }
    shared = [client.open_shares(context, i, secrets[i], keyed[i], shares_answers[i]) for i in everybody]
    masks = [client.masks_of(context, i, secrets[i], keyed[i], shared[i]) for i in everybody]
    vectors = np.array([[(1 << 28) * i + 1000 * q + i - 2 for q in range(ELEMENTS)] for i in everybody]).astype("<u4")
    masked = vectors.astype(np.uint32)
    for i in everybody:
        add_masks(masked[i], 0, masks[i])
    confirmations = {i: client.confirm(context, survivors, signs[i]) for i in survivors}
    reveals = {i: client.reveal(shared[i], survivors) for i in survivors}
    rebuilt = server.reconstruct(context, roster, keys, everybody, survivors, reveals)
    total = masked[list(survivors)].sum(axis=0, dtype=np.uint32)
    add_masks(total, 0, rebuilt)
    return {
        "identity_secrets": [fixed(1, i).hex() for i in everybody],
        "roster": roster.to_bytes().hex(),
        "roster_digest": roster.digest(),
        "terms": TERMS,
        "context_of": {name: str(value) if isinstance(value, UUID) else value for name, value in asked.items()},
        "context": context.hex(),
        "threshold": keyed[0].threshold,
        "secrets": [{name: getattr(secrets[i], name).hex() for name in vars(secrets[i])} for i in everybody],
        "keys": [keys[i].hex() for i in everybody],
        "keys_answer": keyed_answer.hex(),
        "own_shares": [[share.hex() for share in shared[i].held[i]] for i in everybody],
        "shares": [shares[i].hex() for i in everybody],
        "shares_answers": [shares_answers[i].hex() for i in everybody],
        "masks": [
            [{"key": mask.key.hex(), "sign": mask.sign, "first_words": _words(mask)} for mask in masks[i]]
            for i in everybody
        ],
        "vectors": vectors.tolist(),
        "masked": [masked[i].astype("<u4").tobytes().hex() for i in everybody],
        "survivors": list(survivors),
        "update_answer": server.survivors_answer(survivors).hex(),
        "survivors_signatures": {str(i): confirmations[i].hex() for i in survivors},
        "survivors_answer": server.confirmations_answer(confirmations).hex(),
        "unmask": {str(i): reveals[i].hex() for i in survivors},
        "added_to_the_sum": [{"key": mask.key.hex(), "sign": mask.sign} for mask in rebuilt],
        "sum": total.tolist(),
    }


def made() -> dict[str, Any]:
    """All of the file."""
    return {
        "what": "Whole attempts of isthmus/secagg/v1. Bytes are hex; lists go by the members' indices.",
        "three_members": attempt(3, ()),
        "four_members_of_whom_the_third_leaves_after_its_shares": attempt(4, (2,)),
    }


def _words(mask: client.Mask) -> list[int]:
    words = np.zeros(8, np.uint32)
    add_masks(words, 0, [client.Mask(mask.key, 1)])
    return words.tolist()


if __name__ == "__main__":
    FILE.write_text(json.dumps(made(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{FILE}\n")
