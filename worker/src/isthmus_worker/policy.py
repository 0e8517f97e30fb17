"""The organization's own rules, asked for every task, whatever the service says that its stewards have agreed to."""

from isthmus.wire.datasets import UsePolicy, allows, policy_objections
from isthmus.wire.models import ModelKind
from isthmus.wire.privacy import PrivacyUnit
from isthmus.wire.rounds import TaskKind, TaskOffer
from isthmus_worker.settings import Policy, Resources


def objections(announced: UsePolicy, policy: Policy, offer: TaskOffer) -> list[str]:
    """The clauses of our own policy that refuse `offer`, each a sentence that says what would pass; empty if none does.

    Args:
        announced: our policy for the dataset, as the service knows it (`announced_policy`): asked here once more.
        policy: the whole of it, with what only the worker knows.
        offer: what the service wants done.
    """
    spec, found = offer.spec, list[str]()
    if offer.plan is None and spec.privacy.unit is not PrivacyUnit.NONE:
        return ["modes: the job has a privacy unit, but the task does not say how it is met here."]
    found += policy_objections(announced, spec, principal=offer.requested_by, plan=offer.plan)
    if offer.purpose != spec.purpose and not allows(policy.purposes, offer.purpose):
        found.append(f"purposes: {offer.purpose!r} is not allowed (allowed: {', '.join(policy.purposes) or 'none'}).")
    if spec.model.kind is ModelKind.ENTRY_POINT and spec.model.entry_point not in policy.entry_points:
        allowed = ", ".join(policy.entry_points) or "none"
        found.append(f"entry_points: {spec.model.entry_point!r} is not listed (allowed: {allowed}).")
    unit_none = spec.privacy.unit is PrivacyUnit.NONE
    if offer.kind is TaskKind.STATISTICS and unit_none and not policy.allow_exact_statistics:
        sentence = "allow_exact_statistics: the job's data.standardize is 'federated'; 'none' would pass."
        found += [] if sentence in found else [sentence]
    if (size := max(offer.model.size_bytes, offer.model_manifest.size_bytes)) > policy.max_model_bytes:
        found.append(f"max_model_bytes: the model has {size} bytes; at most {policy.max_model_bytes} pass.")
    return found


def resource_objections(resources: Resources, offer: TaskOffer) -> list[str]:
    """What the job asks of this machine beyond what the organization gives; empty if nothing."""
    if offer.spec.training.threads > resources.max_threads:
        return [f"max_threads: the job asks for {offer.spec.training.threads}; at most {resources.max_threads} pass."]
    return []
