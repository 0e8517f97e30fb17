"""What secure aggregation adds to the words of a privacy report: what it hides, from whom, and what it does not.

It hides single updates behind their sum. That is no differential privacy: only noise is, and the report says so.
"""

from isthmus.privacy.planning import noise_shares
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import PrivacyMode


def mechanism_of_masks(spec: JobSpec) -> str:
    """How an update travels; a sentence to stand after the mechanism of the noise."""
    return (
        f"Secure aggregation: the whole update, bounded to an L2 norm of {spec.update_bound:g}, leaves the worker as "
        "masked whole numbers, each of which alone looks like chance; the masks fall away in the sum, and the sum of "
        f"{spec.cohort.min_updates} or more updates is all that this service opens."
    )


def mechanism_of_shares(spec: JobSpec) -> str:
    """How noise comes about that nobody adds as a whole; a sentence."""
    return (
        f"Shares are sized so that those of {noise_shares(spec)} organizations together are all the noise that the "
        "claim needs."
    )


def honest_enough(spec: JobSpec) -> str:
    """Against whom the claim of noise in shares holds, and how many honest organizations it needs; a sentence."""
    needed, colluding = noise_shares(spec), _colluding(spec)
    others = (
        f"even together with {colluding} of the other organizations of a round"
        if colluding
        else "as long as no other organization of a round works together with it, or for itself"
    )
    return (
        f"The operator of this service is among them, {others}: the claim needs {needed} honest organizations in every "
        f"round's sum, this one included. A round is summed with {spec.cohort.min_updates} updates or more."
    )


def assumptions_of_masks(spec: JobSpec) -> list[str]:
    """What has to be true so that single updates stay hidden, and, with noise in shares, the claim holds."""
    found = [
        "Of the organizations that are asked in a round, fewer than a third work together with this service. The rest "
        "run this platform's program unchanged.",
        "The workers know each other's identities: each pins the fingerprint of every other organization's key, and "
        "somebody compared them by another way than this service. Otherwise the service could invent organizations and "
        "subtract what it made up.",
        "Nobody can compute discrete logarithms on Curve25519 or tell AES-256 from chance. Masked updates are deleted "
        "when their round ends, so that nothing is left to be opened by later machines, unless somebody recorded them.",
    ]
    if spec.privacy.mode is PrivacyMode.DISTRIBUTED:
        found.insert(
            0,
            f"At least {noise_shares(spec)} organizations in every round's sum are honest: each adds its share of the "
            "noise, and tells nobody what it was. With fewer the noise is smaller than claimed, and nobody would see "
            "it.",
        )
    return found


def not_hidden_by_masks(spec: JobSpec) -> list[str]:
    """What secure aggregation leaves open."""
    found = [
        "The organizations of a round but one, if all of them work together with this service: they subtract their own "
        "updates from the sum, and what is left is the last one's" + _last_ones_noise(spec.privacy.mode),
        "The sum from whoever adds to it: a member that sends numbers other than its bounded update moves the model "
        "unseen. This service refuses a sum that is longer than all honest updates together could be, and no more.",
    ]
    if spec.privacy.mode is PrivacyMode.DISTRIBUTED:
        many = _colluding(spec)
        found.insert(
            0,
            (
                f"More than {many} other organizations together, each of which knows"
                if many
                else "Another organization of a round, which knows"
            )
            + " the share of the noise that it added itself: against those who know it, it "
            "hides nothing. The job counts against how many the claim holds, in `max_colluding`.",
        )
    if spec.privacy.mode is PrivacyMode.NONE:
        found.insert(
            0,
            "What the sums and the models tell: hiding single updates is no differential privacy, and from the "
            "differences of sums over rounds something may be learned about one organization.",
        )
    return found


def _last_ones_noise(mode: PrivacyMode) -> str:
    return {
        PrivacyMode.NONE: ", as it was trained.",
        PrivacyMode.RECORD: ", for whose records the claim above still holds.",
        PrivacyMode.LOCAL: ", for which the claim above still holds: its noise is its own.",
        PrivacyMode.DISTRIBUTED: ", with no more than its own share of the noise.",
        PrivacyMode.CENTRAL: ".",  # refused under secure aggregation
    }[mode]


def released_under_masks(spec: JobSpec, which: str) -> str:
    """What of the updates is seen, and how it is charged; `which` says which they are."""
    seen = f"this service sees only the sum of each round's, of {spec.cohort.min_updates} or more"
    return {
        PrivacyMode.NONE: f"{which}: masked; {seen}, as they were trained, bounded to {spec.update_bound:g}. Nothing "
        "accounts for them.",
        PrivacyMode.RECORD: f"{which}: the model after a round's noised steps, masked; {seen}. Every step is charged, "
        "before the update is sent; batch sizes as they fell are not told.",
        PrivacyMode.LOCAL: f"{which}: noised at the worker, and masked; {seen}. Each is charged, before it is sent.",
        PrivacyMode.DISTRIBUTED: f"{which}: noised in shares, and masked; {seen}. Each round is charged, before the "
        "masks are taken off.",
        PrivacyMode.CENTRAL: "",  # refused under secure aggregation
    }[spec.privacy.mode]


def _colluding(spec: JobSpec) -> int:
    assert spec.secure_aggregation is not None, "asked of secured jobs only"
    return spec.secure_aggregation.max_colluding
