"""The organization's own rules, asked for every task, whatever the service says that its stewards have agreed to."""

from collections.abc import Sequence

from isthmus.wire.models import ModelKind
from isthmus.wire.rounds import TaskKind, TaskOffer
from isthmus_worker.settings import ANY, Policy, Resources


def objections(policy: Policy, offer: TaskOffer) -> list[str]:  # noqa: PLR0912 - one line a clause
    """The clauses of `policy` that refuse `offer`, each a sentence that says what would pass; empty if none does."""
    spec, privacy = offer.spec, offer.spec.privacy
    found = []
    if not _listed(offer.requested_by, policy.principals):
        found.append(f"principals: {offer.requested_by!r} is not listed{_allowed(policy.principals)}.")
    for purpose in dict.fromkeys((offer.purpose, spec.purpose)):
        if not _listed(purpose, policy.purposes):
            found.append(f"purposes: {purpose!r} is not listed{_allowed(policy.purposes)}.")
    if spec.model.kind not in policy.model_kinds:
        kinds = [kind.value for kind in policy.model_kinds]
        found.append(f"model_kinds: {spec.model.kind.value!r} models are not listed{_allowed(kinds)}.")
    if spec.model.kind is ModelKind.ENTRY_POINT and spec.model.entry_point not in policy.entry_points:
        found.append(f"entry_points: {spec.model.entry_point!r} is not listed{_allowed(policy.entry_points)}.")
    if policy.require_clipping and privacy.clip_norm is None:
        found.append("require_clipping: the job does not clip; privacy.clip_norm would pass.")
    if policy.max_clip_norm != "unbounded" and (privacy.clip_norm is None or privacy.clip_norm > policy.max_clip_norm):
        has = "unbounded" if privacy.clip_norm is None else f"{privacy.clip_norm:g}"
        found.append(f"max_clip_norm: the job's clip norm is {has}; at most {policy.max_clip_norm:g} passes.")
    if privacy.noise_multiplier < policy.min_noise_multiplier:
        found.append(
            f"min_noise_multiplier: the job's is {privacy.noise_multiplier:g}; "
            f"at least {policy.min_noise_multiplier:g} passes."
        )
    if spec.releases_exact_metrics and not policy.allow_exact_metrics:
        found.append("allow_exact_metrics: the job's evaluation.release is 'exact'; 'local' would pass.")
    if (
        spec.data.standardize == "federated" or offer.kind is TaskKind.STATISTICS
    ) and not policy.allow_exact_statistics:
        found.append("allow_exact_statistics: the job's data.standardize is 'federated'; 'none' would pass.")
    if spec.cohort.min_updates < policy.min_cohort:
        found.append(
            f"min_cohort: the job closes rounds with {spec.cohort.min_updates} updates; "
            f"at least {policy.min_cohort} pass."
        )
    if spec.rounds > policy.max_rounds:
        found.append(f"max_rounds: the job has {spec.rounds} rounds; at most {policy.max_rounds} pass.")
    if (size := max(offer.model.size_bytes, offer.model_manifest.size_bytes)) > policy.max_model_bytes:
        found.append(f"max_model_bytes: the model has {size} bytes; at most {policy.max_model_bytes} pass.")
    return found


def resource_objections(resources: Resources, offer: TaskOffer) -> list[str]:
    """What the job asks of this machine beyond what the organization gives; empty if nothing."""
    if offer.spec.training.threads > resources.max_threads:
        return [f"max_threads: the job asks for {offer.spec.training.threads}; at most {resources.max_threads} pass."]
    return []


def _listed(value: str, allowed: Sequence[str]) -> bool:
    return ANY in allowed or value in allowed


def _allowed(allowed: Sequence[str]) -> str:
    return f" (allowed: {', '.join(allowed) or 'none'})"
