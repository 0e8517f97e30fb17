"""The words of a privacy report: each says what holds in its mode, and everything that leaves a worker is listed."""

from typing import Any

import pytest

from isthmus.privacy.explaining import NO_CLAIM, Explanation, explanation_of
from isthmus.privacy.planning import plan_of, round_event
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import Manifest
from isthmus.wire.privacy import PrivacyMode
from isthmus.wire.rounds import METRICS_PREFIX, STATISTICS_PREFIX, TaskKind, kind_of_round, task_manifest

RECORD = {"unit": "record", "clip_norm": 1.5, "epsilon": 3.0}
CENTRAL = {"unit": "organization", "where": "central", "clip_norm": 1.5, "noise_multiplier": 2.0}
LOCAL = {**CENTRAL, "where": "local"}
DISTRIBUTED = {**CENTRAL, "where": "distributed"}
SECURED: dict[str, Any] = {"secure_aggregation": True, "cohort": {"min_updates": 4}}
UNIFORM = {"fedavg": {"weights": "uniform"}}
DATA: dict[str, Any] = {"task": "classification", "features": ["a", "b"], "target": "y", "classes": 2}
MEASURED = {
    **DATA,
    "features": [{"name": name, "range": [0, 100]} for name in ("a", "b")],
    "standardize": "federated",
}


def job(**changes: Any) -> JobSpec:
    """A small job of four rounds."""
    parts: dict[str, Any] = {
        "name": "small",
        "model": {"layers": [{"linear": {"in": 2, "out": 2}}]},
        "data": DATA,
        "training": {"optimizer": {"sgd": {"lr": 0.1}}},
        "privacy": "none",
        "rounds": 4,
    }
    return JobSpec.model_validate({**parts, **changes})


JOBS = {
    "none": job(),
    "none-clipped": job(privacy={"unit": "none", "clip_norm": 1.5}, evaluation={"holdout": 0}),
    "none-local": job(evaluation={"release": "local"}),
    "none-measured": job(data=MEASURED, evaluation={"every": 0}),
    "record": job(privacy=RECORD),
    "record-measured": job(privacy=RECORD, data=MEASURED, evaluation={"release": "noised", "every": 2}),
    "record-in-two": job(privacy={**RECORD, "max_orgs_per_person": 2}),
    "central": job(privacy=CENTRAL, strategy=UNIFORM),
    "central-in-two": job(privacy={**CENTRAL, "max_orgs_per_person": 2}, strategy=UNIFORM),
    "local": job(privacy=LOCAL, strategy=UNIFORM),
    "secured-none": job(privacy={"unit": "none", "clip_norm": 1.5}, **SECURED),
    "secured-record": job(privacy=RECORD, **{**SECURED, "secure_aggregation": {"clip_norm": 7.5}}),
    "secured-local": job(privacy=LOCAL, strategy=UNIFORM, **SECURED),
    "distributed": job(privacy=DISTRIBUTED, strategy=UNIFORM, **SECURED),
    "distributed-against-two": job(
        privacy={**DISTRIBUTED, "max_orgs_per_person": 2},
        strategy=UNIFORM,
        secure_aggregation={"max_colluding": 2},
        cohort={"min_updates": 10},
    ),
}
HIDDEN = {name: spec for name, spec in JOBS.items() if spec.secure_aggregation is not None}
CLAIMED = {name: spec for name, spec in JOBS.items() if spec.privacy.mode is not PrivacyMode.NONE}


def everything(words: Explanation) -> str:
    """All the words, in one line."""
    return " ".join(
        [*words[:4], *words.assumptions, *words.not_protected, *words.released],
    )


@pytest.mark.parametrize("spec", JOBS.values(), ids=JOBS)
def test_every_part_is_whole_sentences(spec: JobSpec) -> None:
    words = explanation_of(spec)

    for text in (*words[:4], *words.assumptions, *words.not_protected, *words.released):
        assert text.endswith("."), text
        assert "  " not in text
        assert " ." not in text
    assert words.assumptions
    assert words.not_protected
    assert len(set(words.not_protected)) == len(words.not_protected)


@pytest.mark.parametrize("spec", JOBS.values(), ids=JOBS)
def test_without_a_claim_none_is_made_and_with_one_it_is_stated(spec: JobSpec) -> None:
    words = explanation_of(spec)

    if spec.privacy.mode is PrivacyMode.NONE:
        assert words.guarantee.startswith(NO_CLAIM)
        assert "epsilon" not in everything(words)
        assert not any("Charged" in item or "charged, before" in item for item in words.released)
    else:
        assert NO_CLAIM not in everything(words)
        assert f"delta is {spec.privacy.claimed_delta:g}" in words.guarantee
        assert "factor of at most e to the power of epsilon" in words.guarantee
        assert "1.5" in words.mechanism
        assert "discrete Gaussian" in words.mechanism
        assert not any("accounts for" in item or "Not accounted" in item for item in words.released)


def test_the_target_is_in_the_promise_where_there_is_one() -> None:
    assert "epsilon is at most 3 for the whole job" in explanation_of(JOBS["record"]).guarantee
    assert "stated for every dataset" in explanation_of(JOBS["local"]).guarantee


def test_only_under_central_noise_is_the_operator_trusted_and_it_is_said_three_times() -> None:
    for name, spec in CLAIMED.items():
        words = explanation_of(spec)
        central = spec.privacy.mode is PrivacyMode.CENTRAL
        assert ("it is trusted with every single update" in words.guarantee) == central, name
        distributed = spec.privacy.mode is PrivacyMode.DISTRIBUTED
        assert ("even if the operator of this service" in words.guarantee) == (not central and not distributed), name
        assert ("against the operator of this service" in words.guarantee) == distributed, name
        assert any("The operator of this service is honest" in item for item in words.assumptions) == central, name
        assert any("against the operator" in item for item in words.not_protected) == central, name
        assert any("to this service alone" in item for item in words.released) == central, name


@pytest.mark.parametrize("spec", HIDDEN.values(), ids=HIDDEN)
def test_under_masks_the_service_is_said_to_see_only_sums_and_what_that_does_not_do(spec: JobSpec) -> None:
    words = explanation_of(spec)

    assert "Secure aggregation" in words.mechanism
    assert f"L2 norm of {spec.update_bound:g}, leaves the worker as masked whole numbers" in words.mechanism
    (updates,) = [item for item in words.released if item.startswith("Updates of the model")]
    least = spec.cohort.min_updates
    assert f"this service sees only the sum of each round's, of {least} or more" in updates
    assert any("fewer than a third" in item for item in words.assumptions)
    assert any("pins the fingerprint" in item for item in words.assumptions)
    assert any("The organizations of a round but one" in item for item in words.not_protected)
    assert any("moves the model unseen" in item for item in words.not_protected)
    assert "every single update" not in everything(words)


def test_hiding_updates_is_not_sold_as_differential_privacy() -> None:
    words = explanation_of(JOBS["secured-none"])

    assert words.guarantee.startswith(NO_CLAIM)
    assert any("no differential privacy" in item for item in words.not_protected)
    for name, spec in JOBS.items():
        masked = "masked" in everything(explanation_of(spec))
        assert masked == (spec.secure_aggregation is not None), name


@pytest.mark.parametrize(
    ("name", "honest", "least", "others"),
    [
        ("distributed", 4, 4, "as long as no other organization of a round works together with it, or for itself"),
        ("distributed-against-two", 8, 10, "even together with 2 of the other organizations of a round"),
    ],
)
def test_the_claim_of_noise_in_shares_says_how_many_honest_organizations_it_needs(
    name: str, honest: int, least: int, others: str
) -> None:
    words = explanation_of(JOBS[name])

    assert f"the claim needs {honest} honest organizations in every round's sum, this one included" in words.guarantee
    assert f"A round is summed with {least} updates or more." in words.guarantee
    assert others in words.guarantee
    assert words.assumptions.index(
        next(item for item in words.assumptions if item.startswith(f"At least {honest} organizations in every round"))
    )
    assert f"those of {honest} organizations together are all the noise" in words.mechanism
    assert "with its share of the noise either way (zero out one)" in words.adjacency
    assert any("the share of the noise that it added itself" in item for item in words.not_protected)
    assert "count each round with twice the sensitivity" in words.accountant


def test_neighbours_are_those_that_the_noise_is_scaled_for() -> None:
    assert "add or remove one" in explanation_of(JOBS["record"]).adjacency
    assert "zero out one" in explanation_of(JOBS["central"]).adjacency
    assert "differ in every record (replace all)" in explanation_of(JOBS["local"]).adjacency


@pytest.mark.parametrize(
    ("name", "delta"),
    [("record-in-two", "delta by 2."), ("central-in-two", "delta by 2 times e to the power of 1 epsilon.")],
)
def test_a_person_in_two_organizations_pays_twice(name: str, delta: str) -> None:
    words = explanation_of(JOBS[name])

    assert f"epsilon is to be multiplied by 2 and {delta}" in words.assumptions[-1]
    assert "A person whose records lie with more than 2 organizations, as far as they do." in words.not_protected
    alone = explanation_of(JOBS["record"])
    assert "max_orgs_per_person" in alone.assumptions[-1]
    assert "A person whose records lie with more than one organization." in alone.not_protected


@pytest.mark.parametrize("spec", CLAIMED.values(), ids=CLAIMED)
def test_what_no_noise_hides_is_named(spec: JobSpec) -> None:
    text = " ".join(explanation_of(spec).not_protected)

    for word in ("in general", "Properties", "declared number of records", "how long it takes", "side channels",
                 "other jobs"):  # fmt: skip
        assert word in text


@pytest.mark.parametrize("spec", JOBS.values(), ids=JOBS)
def test_everything_that_leaves_a_worker_is_listed_with_its_charge(spec: JobSpec) -> None:
    """The tensors of every upload, against the sentences; and the events that ledgers are charged for."""
    words = explanation_of(spec)
    plan = plan_of(spec, 1000, 6)
    for number in range(spec.rounds + 2):
        kind = kind_of_round(number, spec.rounds)
        if kind is TaskKind.STATISTICS and not spec.measures_statistics:
            continue
        if kind is TaskKind.EVALUATE and spec.evaluation.holdout == 0:
            continue
        sent = set(task_manifest(kind, spec, number, _model()).tensors)
        charged = plan is not None and round_event(spec, plan, number, 6) is not None
        assert charged == (bool(sent) and spec.privacy.mode is not PrivacyMode.NONE)
        for name in sent:
            sentence = next(item for item in words.released if item.startswith(_titles(name)))
            assert ("harged" in sentence) == charged, sentence
    for title in ("Statistics", "How good the models are: ", "Loss, accuracy", "The loss of training"):
        listed = any(item.startswith(title) for item in words.released)
        assert listed == _leaves(spec, title), title


def _model() -> Manifest:
    found = job().model.plan((2,)).manifest
    assert found is not None
    return found


def _titles(name: str) -> tuple[str, ...]:
    """How the sentence about a tensor may begin."""
    if name.startswith(STATISTICS_PREFIX):
        return ("Statistics",)
    if name.startswith(f"{METRICS_PREFIX}train/"):
        return ("The loss of training",)
    if name.startswith(METRICS_PREFIX):
        return ("How good the models are: ", "Loss, accuracy")
    return ("Updates of the model",)


def _leaves(spec: JobSpec, title: str) -> bool:
    """Whether anything of that kind is in some upload."""
    sent = {
        name
        for number in range(spec.rounds + 2)
        if not (number == 0 and not spec.measures_statistics)
        for name in task_manifest(kind_of_round(number, spec.rounds), spec, number, _model()).tensors
        if not (number == spec.rounds + 1 and spec.evaluation.holdout == 0)
    }
    noised = spec.privacy.mode is not PrivacyMode.NONE
    return {
        "Statistics": any(name.startswith(STATISTICS_PREFIX) for name in sent),
        "How good the models are: ": noised and any(name.startswith(METRICS_PREFIX) for name in sent),
        "Loss, accuracy": not noised and any(name.startswith(f"{METRICS_PREFIX}holdout/") for name in sent),
        "The loss of training": any(name.startswith(f"{METRICS_PREFIX}train/") for name in sent),
    }[title]
