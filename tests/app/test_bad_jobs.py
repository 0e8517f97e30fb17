"""Bad jobs: what cannot be run is refused when it is asked for, by the name of what is wrong with it."""

import copy
import hashlib
import json
import pickle
from typing import Any

import httpx
import numpy as np
import pytest

from isthmus.client import Client
from isthmus.codec import arrays
from isthmus.wire.base import format_repr_digest
from isthmus.wire.datasets import UsePolicy
from isthmus.wire.jobs import JobSpec, JobState, JobView, ParticipationState
from isthmus.wire.manifest import DType
from isthmus.wire.problems import ProblemCode
from isthmus.wire.version import DIGEST_HEADER, TENSORS_MEDIA_TYPE
from tests.federation import CENTRAL, LOCAL, OPEN, RECORD, UNIFORM, Arrays, Federation, filled, initial, job_spec
from tests.running import Platform, missing_id, refused
from tests.standing import Wire, _standing, assert_problem, leftovers, standing

__all__ = ["_standing", "standing"]

INVALID = ProblemCode.INVALID_REQUEST
MISSING = object()


def plain(**changes: Any) -> dict[str, Any]:
    """A good spec as a person writes it, with changes by path: `training__batch_size=0`."""
    spec: dict[str, Any] = {
        "name": "small",
        "model": {"layers": [{"linear": {"in": 2, "out": 2}}]},
        "data": {"task": "classification", "features": ["age", "chol"], "target": "disease", "classes": 2},
        "training": {"optimizer": {"sgd": {"lr": 0.1}}, "batch_size": 32},
        "privacy": "none",
        "cohort": {"min_updates": 2},
        "evaluation": {"holdout": 0},
        "rounds": 1,
    }
    spec = copy.deepcopy(spec)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = spec
        for parent in parents:
            place = place[parent]
        if value is MISSING:
            del place[last]
        else:
            place[last] = value
    return spec


def layers(*found: Any) -> dict[str, Any]:
    """A spec with these layers."""
    return plain(model={"layers": list(found)})


def sgd(**options: Any) -> dict[str, Any]:
    """A spec with this optimizer."""
    return plain(training__optimizer={"sgd": {"lr": 0.1, **options}})


NAN, INF = float("nan"), float("inf")
IMPOSSIBLE: dict[str, tuple[dict[str, Any], ProblemCode, str]] = {
    "unknown-field": (plain(owner="me"), INVALID, "spec.owner"),
    "unknown-field-within": (plain(training__warmup=3), INVALID, "spec.training.warmup"),
    "unknown-optimizer": (plain(training__optimizer="lbfgs"), INVALID, "spec.training.optimizer"),
    "unknown-strategy": (plain(strategy="fedprox"), INVALID, "spec.strategy"),
    "no-model": (plain(model=MISSING), INVALID, "spec.model"),
    "no-privacy-section": (plain(privacy=MISSING), INVALID, "spec.privacy"),
    "learning-rate-below-zero": (sgd(lr=-0.1), INVALID, "spec.training.optimizer.sgd.lr"),
    "learning-rate-of-zero": (sgd(lr=0), INVALID, "spec.training.optimizer.sgd.lr"),
    "learning-rate-nan": (sgd(lr=NAN), INVALID, "finite"),
    "learning-rate-infinite": (sgd(lr=INF), INVALID, "spec.training.optimizer.sgd.lr"),
    "momentum-of-one": (sgd(momentum=1), INVALID, "spec.training.optimizer.sgd.momentum"),
    "nesterov-without-momentum": (sgd(nesterov=True), INVALID, "needs a momentum"),
    "no-rounds": (plain(rounds=0), INVALID, "spec.rounds"),
    "half-a-round": (plain(rounds=1.5), INVALID, "spec.rounds"),
    "rounds-without-end": (plain(rounds=10**12), INVALID, "spec.rounds"),
    "epochs-of-zero": (plain(training__epochs=0), INVALID, "spec.training.epochs"),
    "empty-batches": (plain(training__batch_size=0), INVALID, "batch_size"),
    "a-cohort-of-one": (plain(cohort__min_updates=1), INVALID, "spec.cohort.min_updates"),
    "target-below-the-minimum": (
        plain(cohort={"min_updates": 3, "target_updates": 2}), INVALID, "target_updates 2 is below min_updates 3",
    ),
    "fraction-of-nothing": (plain(cohort__fraction=0), INVALID, "spec.cohort.fraction"),
    "fraction-nan": (plain(cohort__fraction=NAN), INVALID, "spec.cohort.fraction"),
    "deadline-infinite": (plain(cohort__deadline_s=INF), INVALID, "spec.cohort.deadline_s"),
    "everything-held-out": (plain(evaluation__holdout=1), INVALID, "spec.evaluation.holdout"),
    "seed-too-short": (plain(seed="5e"), INVALID, "spec.seed"),
    "name-with-a-slash": (plain(name="../etc"), INVALID, "spec.name"),
    "feature-twice": (plain(data__features=["age", "age"]), INVALID, "listed twice"),
    "target-among-the-features": (plain(data__target="age"), INVALID, "'age' is also listed as a feature"),
    "classification-into-nothing": (plain(data__classes=MISSING), INVALID, "needs `classes` or `labels`"),
    "cross-entropy-of-a-number": (
        plain(data={"task": "regression", "features": ["age", "chol"], "target": "disease"}), INVALID,
        "loss 'cross_entropy' does not fit a regression task",
    ),
    "mse-of-a-class": (plain(training__loss="mse"), INVALID, "loss 'mse' does not fit a classification task"),
    "no-layers": (layers(), INVALID, "no layer"),
    "unknown-layer": (layers({"transformer": {}}), INVALID, "spec.model.layers.0"),
    "first-layer-does-not-fit-the-data": (
        layers({"linear": {"in": 3, "out": 2}}), INVALID, "layer 0 (linear) takes 3 inputs but gets 2",
    ),
    "second-layer-does-not-fit-the-first": (
        layers({"linear": {"in": 2, "out": 8}}, "relu", {"linear": {"in": 9, "out": 2}}), INVALID,
        "layer 2 (linear) takes 9 inputs but gets 8",
    ),
    "layer-within-a-residual": (
        layers({"linear": {"in": 2, "out": 4}}, {"residual": {"layers": [{"linear": {"in": 5, "out": 4}}]}}), INVALID,
        "layer 1.body.0 (linear) takes 5 inputs but gets 4",
    ),
    "outputs-that-the-data-does-not-want": (layers({"linear": {"in": 2, "out": 3}}), INVALID, "data section wants [2]"),
    "more-elements-than-there-may-be": (
        layers({"linear": {"in": 2, "out": 2**24}}, {"linear": {"in": 2**24, "out": 2**24}}), INVALID, "at most",
    ),
    "layers-and-an-entry-point": (
        plain(model={"layers": ["relu"], "entry_point": "a:b"}), INVALID, "either `layers` or an `entry_point`",
    ),
    "entry-point-that-is-code": (plain(model={"entry_point": "os.system('x')"}), INVALID, "entry_point"),
    "noise-with-batch-norm": (
        {
            **layers({"linear": {"in": 2, "out": 2}}, {"batch_norm": {"features": 2}}),
            "privacy": RECORD,
        },
        INVALID, "use group_norm",
    ),
    "noise-for-organizations-with-batch-norm": (
        {
            **layers({"linear": {"in": 2, "out": 2}}, {"batch_norm": {"features": 2}}),
            "privacy": LOCAL, "strategy": UNIFORM,
        },
        INVALID, "use group_norm",
    ),
}  # fmt: skip


def record(**changes: Any) -> dict[str, Any]:
    """A spec with a privacy section for records, changed."""
    section = {"unit": "record", "epsilon": 3.0, "clip_norm": 1.0, **changes}
    return plain(privacy={name: value for name, value in section.items() if value is not MISSING})


def organization(**changes: Any) -> dict[str, Any]:
    """A spec with a privacy section for organizations, and other changes."""
    return plain(**{"privacy": LOCAL, "strategy": UNIFORM, **changes})


def secured(**changes: Any) -> dict[str, Any]:
    """A spec under secure aggregation that would pass, changed."""
    cohort = {"min_updates": 3, **changes.pop("cohort", {})}
    clipped = {"unit": "none", "clip_norm": 1.0}
    return plain(**{"privacy": clipped, "secure_aggregation": True, "cohort": cohort, **changes})


UNHIDDEN: dict[str, tuple[dict[str, Any], ProblemCode, str]] = {
    "secured-with-central-noise": (
        secured(privacy=CENTRAL, strategy=UNIFORM), INVALID, "use where: distributed",
    ),
    "secured-two": (secured(cohort={"min_updates": 2}), INVALID, "min_updates of 3 at least"),
    "secured-with-exact-results": (secured(evaluation={"release": "exact"}), INVALID, "use local (kept at the site)"),
    "secured-with-exact-statistics": (
        secured(data={**plain()["data"], "standardize": "federated"}), INVALID, "use standardize: none",
    ),
    "secured-with-batch-norm": (
        secured(model={"layers": [{"linear": {"in": 2, "out": 2}}, {"batch_norm": {"features": 2}}]}), INVALID,
        "use group_norm",
    ),
    "secured-without-a-bound": (secured(privacy="none"), INVALID, "needs a bound on the whole update"),
    "secured-records-without-a-bound": (secured(privacy=RECORD), INVALID, "write secure_aggregation: {clip_norm: 10}"),
    "secured-organizations-with-two-bounds": (
        secured(privacy=LOCAL, strategy=UNIFORM, secure_aggregation={"clip_norm": 1.0}), INVALID,
        "clip_norm is for unit none and record",
    ),
    "secured-against-a-third": (
        secured(secure_aggregation={"max_colluding": 1}), INVALID, "not below a third of min_updates",
    ),
    "secured-by-another-word": (secured(secure_aggregation="yes"), INVALID, "spec.secure_aggregation"),
    "secured-with-steps-of-no-time": (secured(secure_aggregation={"step_s": 0}), INVALID, "step_s"),
    "secured-with-an-unknown-field": (secured(secure_aggregation={"trust": "all"}), INVALID, "trust"),
}  # fmt: skip


UNTRUE: dict[str, tuple[dict[str, Any], ProblemCode, str]] = {
    "privacy-null": (plain(privacy=None), INVALID, "write `none` out"),
    "privacy-empty": (plain(privacy={}), INVALID, "privacy.unit is missing"),
    "privacy-in-another-word": (plain(privacy="off"), INVALID, "spec.privacy"),
    "privacy-of-former-times": (
        plain(privacy={"clip_norm": 1.0, "noise_multiplier": 1.0}), INVALID, "privacy.unit is missing",
    ),
    "unknown-unit": (record(unit="patient"), INVALID, "'none', 'record' or 'organization'"),
    "unknown-place": (record(unit="organization", where="cloud"), INVALID, "'central', 'local' or 'distributed'"),
    "unknown-field": (record(sigma=1.0), INVALID, "spec.privacy.sigma"),
    "epsilon-of-zero": (record(epsilon=0), INVALID, "spec.privacy.epsilon"),
    "epsilon-below-zero": (record(epsilon=-1), INVALID, "spec.privacy.epsilon"),
    "epsilon-nan": (record(epsilon=NAN), INVALID, "finite"),
    "epsilon-infinite": (record(epsilon=INF), INVALID, "spec.privacy.epsilon"),
    "epsilon-of-a-billion": (record(epsilon=1e9), INVALID, "spec.privacy.epsilon"),
    "epsilon-true": (record(epsilon="much"), INVALID, "spec.privacy.epsilon"),
    "delta-of-zero": (record(delta=0), INVALID, "spec.privacy.delta"),
    "delta-of-one": (record(delta=1), INVALID, "spec.privacy.delta"),
    "delta-below-zero": (record(delta=-1e-5), INVALID, "spec.privacy.delta"),
    "delta-nan": (record(delta=NAN), INVALID, "finite"),
    "clip-of-zero": (record(clip_norm=0), INVALID, "spec.privacy.clip_norm"),
    "clip-infinite": (record(clip_norm=INF), INVALID, "spec.privacy.clip_norm"),
    "clip-nan": (record(clip_norm=NAN), INVALID, "finite"),
    "clip-below-zero": (record(clip_norm=-1), INVALID, "spec.privacy.clip_norm"),
    "clip-of-zero-without-a-claim": (
        plain(privacy={"unit": "none", "clip_norm": 0}), INVALID, "spec.privacy.clip_norm",
    ),
    "no-clip": (record(clip_norm=MISSING), INVALID, "needs a clip_norm"),
    "noise-of-zero": (record(epsilon=MISSING, noise_multiplier=0), INVALID, "spec.privacy.noise_multiplier"),
    "noise-below-zero": (record(epsilon=MISSING, noise_multiplier=-1), INVALID, "spec.privacy.noise_multiplier"),
    "noise-infinite": (record(epsilon=MISSING, noise_multiplier=INF), INVALID, "spec.privacy.noise_multiplier"),
    "neither-epsilon-nor-noise": (record(epsilon=MISSING), INVALID, "give either epsilon"),
    "both-epsilon-and-noise": (record(noise_multiplier=1.0), INVALID, "give either epsilon"),
    "none-with-epsilon": (plain(privacy={"unit": "none", "epsilon": 3.0}), INVALID, "unit none makes none"),
    "none-with-noise": (plain(privacy={"unit": "none", "noise_multiplier": 1.0}), INVALID, "unit none makes none"),
    "none-with-a-place": (plain(privacy={"unit": "none", "where": "local"}), INVALID, "unit none makes none"),
    "records-with-a-place": (record(where="central"), INVALID, "where is for unit organization"),
    "organization-without-a-place": (record(unit="organization"), INVALID, "needs where"),
    "a-person-in-no-organization": (record(max_orgs_per_person=0), INVALID, "spec.privacy.max_orgs_per_person"),
    "distributed-noise": (
        organization(privacy={**LOCAL, "where": "distributed"}), INVALID, "secure_aggregation: true beside privacy",
    ),
    "organization-weighted-by-rows": (organization(strategy="fedavg"), INVALID, "needs uniform weights"),
    "exact-results-of-records": ({**record(), "evaluation": {"release": "exact"}}, INVALID, "use local"),
    "exact-results-of-organizations": (organization(evaluation={"release": "exact"}), INVALID, "use local"),
    "noised-results-of-organizations": (organization(evaluation={"release": "noised"}), INVALID, "use local"),
    "noised-results-without-a-claim": (plain(evaluation={"release": "noised"}), INVALID, "use exact or local"),
    "noised-results-without-a-target": (
        {**plain(privacy=RECORD), "evaluation": {"release": "noised"}}, INVALID, "noise_multiplier is needed",
    ),
    "noise-for-results-that-stay": (
        {**record(), "evaluation": {"release": "local", "noise_multiplier": 1.0}}, INVALID, "goes with release: noised",
    ),
    "statistics-of-unbounded-numbers": (
        {**record(), "data": {**plain()["data"], "standardize": "federated"}}, INVALID,
        "{name: age, range: [lowest, highest]}",
    ),
    "statistics-without-a-target": (
        {
            **plain(privacy=RECORD),
            "data": {
                **plain()["data"], "standardize": "federated",
                "features": [{"name": name, "range": [0, 100]} for name in ("age", "chol")],
            },
        },
        INVALID, "statistics_noise_multiplier is needed",
    ),
    "statistics-of-an-organization": (
        organization(data={**plain()["data"], "standardize": "federated"}), INVALID, "or unit: record",
    ),
    "noise-for-the-statistics-of-an-organization": (
        organization(privacy={**LOCAL, "statistics_noise_multiplier": 1.0}), INVALID, "is for unit record",
    ),
    "a-range-upside-down": (
        {**record(), "data": {**plain()["data"], "features": [{"name": "age", "range": [9, 1]}, "chol"]}}, INVALID,
        "lowest below highest",
    ),
}  # fmt: skip


def ask(federation: Federation, spec: dict[str, Any], client: Client | None = None) -> httpx.Response:
    """Draft a job from a spec as a person could have written it; NaN and infinities are sent as such."""
    body = json.dumps({"spec": spec}).encode()
    http = federation.platform.http(client or federation.researcher)
    return http.post("/v1/jobs", content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [*IMPOSSIBLE.values(), *UNTRUE.values(), *UNHIDDEN.values()],
    ids=[*IMPOSSIBLE, *UNTRUE, *UNHIDDEN],
)
def test_a_spec_that_cannot_be_run_is_refused_by_name(
    standing: Federation, spec: dict[str, Any], code: ProblemCode, words: str
) -> None:
    before = standing.platform.execute("SELECT count(*) FROM jobs")

    problem = assert_problem(ask(standing, spec), code)

    assert words in " ".join([problem.detail, *(f"{error.field}: {error.message}" for error in problem.errors)])
    assert problem.errors
    assert standing.platform.execute("SELECT count(*) FROM jobs") == before


@pytest.mark.parametrize("spec", [plain(), record(), organization()], ids=["plain", "record", "organization"])
def test_the_specs_that_the_tables_change_are_good_ones(standing: Federation, spec: dict[str, Any]) -> None:
    answer = ask(standing, spec)

    assert answer.status_code == 201, answer.text
    assert JobView.model_validate_json(answer.content).state is JobState.DRAFT


@pytest.mark.parametrize("length", ["declared", "chunked"])
def test_a_body_beyond_the_limit_is_refused_whether_its_length_was_declared_or_not(
    standing: Federation, length: str
) -> None:
    body = json.dumps({"spec": plain(description="x" * (5 << 20))}).encode()
    http = standing.platform.http(standing.researcher)
    content = body if length == "declared" else (body[at : at + 65536] for at in range(0, len(body), 65536))

    answer = http.post("/v1/jobs", content=content, headers={"content-type": "application/json"})

    assert_problem(answer, ProblemCode.BODY_TOO_LARGE)


# --- The initial model ------------------------------------------------------------------------------------------------


def without(name: str) -> dict[str, Any]:
    """The initial model without one tensor."""
    return {other: tensor for other, tensor in initial().items() if other != name}


GOOD = arrays.encode(initial())
MODELS: dict[str, tuple[bytes, ProblemCode, str]] = {
    "missing-tensor": (arrays.encode(without("0.bias")), ProblemCode.TENSORS_MISMATCH, "'0.bias'"),
    "extra-tensor": (
        arrays.encode({**initial(), "1.bias": initial()["0.bias"]}), ProblemCode.TENSORS_MISMATCH, "'1.bias'",
    ),
    "other-shape": (
        arrays.encode({**initial(), "0.weight": np.zeros((4, 1), np.float32)}), ProblemCode.TENSORS_MISMATCH,
        "shape [4, 1], not [2, 2]",
    ),
    "other-dtype": (
        arrays.encode({**initial(), "0.bias": np.zeros(2, np.float16)}), ProblemCode.TENSORS_MISMATCH, "F16, not F32",
    ),
    "nan": (arrays.encode(filled(np.nan)), ProblemCode.NON_FINITE, "NaN"),
    "infinite": (arrays.encode(filled(np.inf)), ProblemCode.NON_FINITE, "infinity"),
    "pickle": (pickle.dumps(initial()), ProblemCode.NOT_SAFETENSORS, "header"),
    "nothing": (b"", ProblemCode.NOT_SAFETENSORS, "0 bytes"),
    "cut-off": (GOOD[:-1], ProblemCode.LENGTH_MISMATCH, "bytes"),
    "header-of-2-gigabytes": ((2 << 30).to_bytes(8, "little") + GOOD[8:], ProblemCode.NOT_SAFETENSORS, "2147483648"),
}  # fmt: skip


def put_model(federation: Federation, job: JobView, body: bytes, **changes: str) -> httpx.Response:
    """Upload any bytes as an initial model, under any headers."""
    headers = {
        "content-type": TENSORS_MEDIA_TYPE,
        DIGEST_HEADER.lower(): format_repr_digest(hashlib.sha256(body).hexdigest()),
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return federation.platform.http(federation.researcher).put(
        f"/v1/jobs/{job.id}/model", content=body, headers=headers
    )


@pytest.mark.parametrize(("body", "code", "words"), MODELS.values(), ids=MODELS)
def test_an_initial_model_that_is_not_the_job_s_is_refused_and_the_right_one_is_taken(
    standing: Federation, body: bytes, code: ProblemCode, words: str
) -> None:
    job = standing.researcher.jobs.create(job_spec())

    problem = assert_problem(put_model(standing, job, body), code)

    assert words in problem.detail
    assert standing.job(job).model_digest is None
    assert not leftovers(standing)
    assert put_model(standing, job, GOOD).json()["model_digest"] == hashlib.sha256(GOOD).hexdigest()


def test_a_model_under_another_digest_is_refused_and_does_not_stand_under_that_name(standing: Federation) -> None:
    job = standing.researcher.jobs.create(job_spec())
    other = hashlib.sha256(b"another model").hexdigest()

    answer = put_model(standing, job, GOOD, repr_digest=format_repr_digest(other))

    assert_problem(answer, ProblemCode.DIGEST_MISMATCH)
    assert standing.job(job).model_digest is None
    assert not [path for path in standing.blobs() if path.name == other]


MODEL_HEADERS = {
    "absurd-length": ({"content-length": str(2**60)}, ProblemCode.BODY_TOO_LARGE),
    "no-length": ({"transfer-encoding": "chunked"}, ProblemCode.LENGTH_REQUIRED),
    "json": ({"content-length": "10", "content-type": "application/json"}, ProblemCode.UNSUPPORTED_MEDIA_TYPE),
    "digest-malformed": ({"content-length": "10", "repr-digest": "sha-256=abc"}, INVALID),
}


@pytest.mark.parametrize(("changes", "code"), MODEL_HEADERS.values(), ids=MODEL_HEADERS)
def test_a_model_is_refused_from_its_headers(standing: Federation, changes: dict[str, str], code: ProblemCode) -> None:
    job = standing.researcher.jobs.create(job_spec())
    headers = {
        "content-type": TENSORS_MEDIA_TYPE,
        "repr-digest": format_repr_digest(hashlib.sha256(GOOD).hexdigest()),
        "expect": "100-continue",
        **changes,
    }

    with Wire(standing, standing.researcher) as wire:
        wire.head("PUT", f"/v1/jobs/{job.id}/model", headers)
        assert "100" not in wire.first_line()
        assert_problem(wire.answer(), code)

    assert not leftovers(standing)


def test_the_model_of_a_draft_may_be_replaced_and_then_not_any_more(standing: Federation) -> None:
    job = standing.draft(job_spec())
    standing.researcher.jobs.upload_model(job.id, arrays.encode(filled(0.5)))
    standing.researcher.jobs.start(job.id)

    answer = put_model(standing, job, GOOD)

    assert "running" in assert_problem(answer, ProblemCode.JOB_NOT_DRAFT).detail
    assert (standing.model(job)["0.bias"] == 0.5).all()


def test_an_entry_point_s_manifest_is_that_of_the_model_uploaded(standing: Federation) -> None:
    spec = JobSpec.model_validate(plain(model={"entry_point": "our_models.heart:build", "options": {"width": 2}}))
    job = standing.researcher.jobs.create(spec)
    model: Arrays = {"net.w": np.zeros((3, 2), np.float16), "net.steps": np.array(0, np.int64)}

    assert job.manifest is None
    with refused(ProblemCode.MODEL_MISSING):
        standing.researcher.jobs.start(job.id)
    job = standing.researcher.jobs.upload_model(job.id, arrays.encode(model))

    assert job.manifest is not None
    assert {name: spec.dtype for name, spec in job.manifest.tensors.items()} == {
        "net.w": DType.F16,
        "net.steps": DType.I64,
    }
    with refused(ProblemCode.NO_MATCHING_DATASET) as refusals:  # no dataset has allowed entry points
        standing.researcher.jobs.start(job.id)
    assert "model_kinds: 'entry_point' models are not allowed" in refusals[0].detail


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (pickle.dumps({"w": 1}) + bytes(50), ProblemCode.NOT_SAFETENSORS),
        (b"\x02\x00", ProblemCode.NOT_SAFETENSORS),
        (arrays.encode({"w": np.array([1.0, np.nan], np.float32)}), ProblemCode.NON_FINITE),
    ],
    ids=["pickle", "two-bytes", "nan"],
)
def test_an_entry_point_s_model_is_judged_as_well(standing: Federation, body: bytes, code: ProblemCode) -> None:
    spec = JobSpec.model_validate(plain(model={"entry_point": "our_models.heart:build"}))
    job = standing.researcher.jobs.create(spec)

    assert_problem(put_model(standing, job, body), code)

    assert standing.job(job).manifest is None
    assert not leftovers(standing)


# --- Starting ---------------------------------------------------------------------------------------------------------


def test_a_job_does_not_start_without_a_model(standing: Federation) -> None:
    job = standing.researcher.jobs.create(job_spec())

    with refused(ProblemCode.MODEL_MISSING) as refusals:
        standing.researcher.jobs.start(job.id)

    assert "PUT /v1/jobs/{id}/model" in refusals[0].detail
    assert standing.job(job).state is JobState.DRAFT


def test_a_job_starts_once(standing: Federation) -> None:
    job = standing.start()

    with refused(ProblemCode.STATE_CONFLICT) as refusals:
        standing.researcher.jobs.start(job.id)

    assert "The job is running" in refusals[0].detail
    assert len(list(standing.researcher.jobs.rounds(job.id))) == 1
    for site in standing.sites:
        site.hand_in(site.claim(), filled(1.0))
    assert standing.finish(job).state is JobState.COMPLETED


@pytest.mark.parametrize("step", ["pause", "resume", "cancel", "start"])
def test_what_has_ended_stays_ended(standing: Federation, step: str) -> None:
    job = standing.start()
    standing.researcher.jobs.cancel(job.id)

    with refused(ProblemCode.STATE_CONFLICT) as refusals:
        getattr(standing.researcher.jobs, step)(job.id)

    assert "cancelled" in refusals[0].detail
    assert standing.job(job).state is JobState.CANCELLED


def test_too_few_fitting_datasets_are_named_with_the_column_that_is_missing(standing: Federation) -> None:
    data = {**job_spec().data.model_dump(mode="json"), "features": ["age", "glucose"]}
    job = standing.draft(job_spec(data=data))

    with refused(ProblemCode.NO_MATCHING_DATASET) as refusals:
        standing.researcher.jobs.start(job.id)

    detail = refusals[0].detail
    assert "0 datasets fit the job and allow it; it needs 2." in detail
    for site in standing.sites:
        assert f"{site.organization.name}/heart: It has no column 'glucose'." in detail
    assert standing.job(job).state is JobState.DRAFT
    assert not list(standing.researcher.jobs.participations(job.id))


def test_a_dataset_asked_for_by_name_that_is_not_there_is_named(standing: Federation) -> None:
    data = {**job_spec().data.model_dump(mode="json"), "datasets": ["clinic-00/heart", "clinic-01/hart"]}
    job = standing.draft(job_spec(data=data))

    with refused(ProblemCode.NO_MATCHING_DATASET) as refusals:
        standing.researcher.jobs.start(job.id)

    assert "clinic-01/hart: there is no confirmed dataset of that name." in refusals[0].detail


def test_a_dataset_whose_policy_says_no_is_left_out_and_too_many_of_them_stop_the_start(standing: Federation) -> None:
    def close(*numbers: int) -> None:
        for number, site in enumerate(standing.sites):
            site.steward.datasets.set_policy(site.dataset.id, UsePolicy() if number in numbers else OPEN)

    try:
        close(0, 1)
        job = standing.draft(job_spec())
        with refused(ProblemCode.NO_MATCHING_DATASET) as refusals:
            standing.researcher.jobs.start(job.id)
        assert "1 datasets fit the job and allow it; it needs 2." in refusals[0].detail
        assert "clinic-00/heart: policy: purposes: 'research' is not allowed" in refusals[0].detail

        close(0)
        standing.researcher.jobs.start(job.id)
        asked = {item.organization: item for item in standing.researcher.jobs.participations(job.id)}
        assert asked["clinic-00"].state is ParticipationState.REJECTED
        assert "purposes: 'research' is not allowed" in (asked["clinic-00"].detail or "")
        for site in standing.sites[1:]:
            site.hand_in(site.claim(), filled(1.0))
        assert standing.finish(job).state is JobState.COMPLETED
        assert standing.sites[0].try_claim() is None
    finally:
        close()


# --- Whose job it is --------------------------------------------------------------------------------------------------

ROUTES = [
    ("GET", ""),
    ("GET", "/model"),
    ("PUT", "/model"),
    ("POST", "/start"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/cancel"),
    ("GET", "/participations"),
    ("GET", "/rounds"),
    ("GET", "/rounds/1"),
    ("GET", "/metrics"),
    ("GET", "/privacy"),
    ("GET", "/checkpoints"),
    ("GET", "/events"),
]


def call(http: httpx.Client, method: str, path: str, *, accept: str = "application/json") -> httpx.Response:
    """One request that its operation would take."""
    if method == "PUT":
        headers = {
            "content-type": TENSORS_MEDIA_TYPE,
            DIGEST_HEADER: format_repr_digest(hashlib.sha256(GOOD).hexdigest()),
        }
        return http.put(path, content=GOOD, headers=headers)
    return http.request(method, path, json={} if path.endswith("/cancel") else None, headers={"accept": accept})


def test_the_routes_of_this_table_are_all_there_are(platform: Platform) -> None:
    document = platform.http().get("/openapi.json").json()
    found = {
        (method.upper(), path.removeprefix("/v1/jobs/{job_id}").replace("{number}", "1"))
        for path, item in document["paths"].items()
        if path.startswith("/v1/jobs/{job_id}")
        for method in item
    }
    assert found == set(ROUTES)


def test_another_s_job_answers_like_a_missing_one_on_every_route(standing: Federation) -> None:
    job = standing.start()
    missing = missing_id()
    for http in (standing.platform.http(standing.platform.researcher()),):
        for method, path in [*ROUTES, ("GET", "/events?after=1")]:
            theirs = call(http, method, f"/v1/jobs/{job.id}{path}")
            nobodys = call(http, method, f"/v1/jobs/{missing}{path}")
            assert_problem(theirs, ProblemCode.NOT_FOUND)
            assert theirs.text.replace(str(job.id), "it") == nobodys.text.replace(str(missing), "it"), path
        streamed = call(http, "GET", f"/v1/jobs/{job.id}/events", accept="text/event-stream")
        assert_problem(streamed, ProblemCode.NOT_FOUND)
        assert http.get("/v1/jobs").json()["items"] == []
        checkpoint = http.get(f"/v1/checkpoints/{job.model_digest}")
        assert_problem(checkpoint, ProblemCode.NOT_FOUND)
    for site in standing.sites:
        site.hand_in(site.claim(), filled(1.0))
    assert standing.finish(job).state is JobState.COMPLETED


@pytest.mark.parametrize("path", ["/rounds/-1", "/rounds/1.5", f"/rounds/{2**70}", f"/events?after={2**70}"])
def test_a_number_that_nothing_has_is_refused(standing: Federation, path: str) -> None:
    job = standing.draft(job_spec())

    assert_problem(standing.platform.http(standing.researcher).get(f"/v1/jobs/{job.id}{path}"), INVALID)


def test_a_steward_sees_the_jobs_that_ask_for_its_data_and_steers_none(standing: Federation) -> None:
    job = standing.start()
    http = standing.platform.http(standing.sites[0].steward)

    for method, path in ROUTES:
        answer = call(http, method, f"/v1/jobs/{job.id}{path}")
        if method == "GET":
            assert answer.status_code == 200, (path, answer.text)
        else:
            assert "jobs:write" in assert_problem(answer, ProblemCode.FORBIDDEN).detail
    assert standing.job(job).state is JobState.RUNNING


def test_a_steward_of_nobody_who_was_asked_sees_nothing(standing: Federation) -> None:
    job = standing.start()
    stranger = standing.platform.steward(standing.platform.organization())

    with refused(ProblemCode.NOT_FOUND):
        stranger.jobs.get(job.id)
    assert list(stranger.jobs.list()) == []


def test_an_admin_sees_a_job_and_does_not_steer_it(standing: Federation) -> None:
    job = standing.start()

    assert standing.platform.admin.jobs.get(job.id).id == job.id
    with refused(ProblemCode.FORBIDDEN):
        standing.platform.admin.jobs.cancel(job.id)
