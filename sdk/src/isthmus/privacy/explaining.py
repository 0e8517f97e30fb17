"""What a job's privacy section promises, in words that a data protection officer can read, and what it does not.

Words follow from the job's spec alone. Figures for a dataset are in its plan, and what was spent is in its ledger.
"""

from typing import NamedTuple

from isthmus.privacy.explaining_secured import (
    assumptions_of_masks,
    honest_enough,
    mechanism_of_masks,
    mechanism_of_shares,
    not_hidden_by_masks,
    released_under_masks,
)
from isthmus.wire.jobs import EvaluationRelease, JobSpec
from isthmus.wire.privacy import PrivacyMode, PrivacyUnit
from isthmus.wire.rounds import evaluates_in_round
from isthmus.wire.strategies import Weighting

NO_CLAIM = "No privacy is claimed."


class Explanation(NamedTuple):
    """The words of a privacy report."""

    mechanism: str
    adjacency: str
    guarantee: str
    accountant: str
    assumptions: tuple[str, ...]
    not_protected: tuple[str, ...]
    released: tuple[str, ...]


def explanation_of(spec: JobSpec) -> Explanation:
    """The words of a job's privacy report."""
    mode = spec.privacy.mode
    return Explanation(
        mechanism=_mechanism(spec) + (f" {mechanism_of_masks(spec)}" if spec.secure_aggregation else ""),
        adjacency=_ADJACENCY[mode],
        guarantee=_guarantee(spec),
        accountant=_ACCOUNTANT_OF_NOTHING if mode is PrivacyMode.NONE else _accountant(mode),
        assumptions=tuple(_assumptions(spec)),
        not_protected=tuple(_not_protected(spec)),
        released=tuple(_released(spec)),
    )


# --- How, and between what --------------------------------------------------------------------------------------------


def _mechanism(spec: JobSpec) -> str:
    privacy = spec.privacy
    if privacy.mode is PrivacyMode.NONE:
        return "None: nothing is noised."
    clip = f"{privacy.clip_norm:g}"
    if privacy.mode is PrivacyMode.RECORD:
        return (
            "DP-SGD inside each organization. Every step takes each training record by a coin that only the worker "
            f"sees, bounds the gradient of each record taken to an L2 norm of {clip} on a lattice of whole numbers, "
            "adds exact discrete Gaussian noise to the sum, and divides by a number that everybody knows."
        )
    bounded = f"an organization's whole update of a round is bounded to an L2 norm of {clip}"
    if privacy.mode is PrivacyMode.LOCAL:
        return (
            f"At each worker, {bounded} on a lattice of whole numbers, and exact discrete Gaussian noise is added to "
            "it before it leaves."
        )
    if privacy.mode is PrivacyMode.CENTRAL:
        return (
            f"By each worker and again by the service, {bounded}; the service adds exact discrete Gaussian noise once "
            "a round, on a lattice of whole numbers, to the sum of all updates."
        )
    return (
        f"At each worker, {bounded} on a lattice of whole numbers, and a share of the noise, an exact discrete "
        f"Gaussian of its own, is added before the update is masked. {mechanism_of_shares(spec)}"
    )


_ADJACENCY = {
    PrivacyMode.NONE: "None: nothing is hidden.",
    PrivacyMode.RECORD: "Two datasets of which one holds a single record more than the other (add or remove one).",
    PrivacyMode.CENTRAL: (
        "Two rounds of the same organizations in which one organization's contribution is its own, or nothing at all "
        "(zero out one); how many take part is public."
    ),
    PrivacyMode.LOCAL: "Two datasets of one organization that may differ in every record (replace all).",
    PrivacyMode.DISTRIBUTED: (
        "Two rounds of the same organizations in which one organization's update is its own, or zero, with its share "
        "of the noise either way (zero out one); how many take part is public."
    ),
}


# --- The promise ------------------------------------------------------------------------------------------------------

_ALMOST = (
    "the chance of any outcome differs by a factor of at most e to the power of epsilon, but for a probability of delta"
)


def _guarantee(spec: JobSpec) -> str:
    privacy = spec.privacy
    if privacy.mode is PrivacyMode.NONE:
        clipped = (
            "" if privacy.clip_norm is None else f" Updates are clipped to {privacy.clip_norm:g}; without noise that "
            "bounds what one update changes, and hides nothing."
        )  # fmt: skip
        what = "sums of updates" if spec.secure_aggregation else "updates"
        return (
            f"{NO_CLAIM} What this job releases may tell anything about single records: {what} and models can be "
            f"inverted, and records be recognised in them.{clipped}"
        )
    figures = (
        f"epsilon is at most {privacy.epsilon:g} for the whole job at every dataset"
        if privacy.epsilon is not None
        else "epsilon for the whole job is stated for every dataset"
    )
    figures = f"Here delta is {privacy.claimed_delta:g}, and {figures}."
    if privacy.mode is PrivacyMode.RECORD:
        return (
            "For every record of every dataset, and against everybody outside its organization, even if the operator "
            "of this service, the researcher and all other organizations work together: everything that this job "
            f"releases would have come out almost the same without that record; {_ALMOST}. {figures}"
        )
    if privacy.mode is PrivacyMode.LOCAL:
        return (
            "For every organization, and against everybody outside it, even if the operator of this service, the "
            "researcher and all other organizations work together: everything that it releases for this job would "
            f"have come out almost the same with any other records in their place; {_ALMOST}. {figures}"
        )
    whom = "the researcher, the other organizations together, and whoever receives the models"
    trust = "The operator of this service is not among them: it is trusted with every single update."
    if privacy.mode is PrivacyMode.DISTRIBUTED:
        whom = "the operator of this service, the researcher, and whoever receives the models"
        trust = honest_enough(spec)
    return (
        f"For every organization, and against {whom}: the models that this job publishes would have come out almost "
        f"the same if the organization had contributed nothing; {_ALMOST}. {figures} {trust}"
    )


_ACCOUNTANT_OF_NOTHING = (
    "None: nothing bounds what is released, and no budget counts it. The datasets' ledgers list the releases as "
    "unaccounted."
)


def _accountant(mode: PrivacyMode) -> str:
    sampled = (
        " Each step is counted as a Poisson sample of the records, which holds because the coins are independent and "
        "never leave the worker."
        if mode is PrivacyMode.RECORD
        else " Nothing is gained from drawing cohorts: it is known who takes part."
    )
    ledgers = (
        " The datasets' ledgers are of records. One record more or less may turn an update into any other within the "
        "bound, which is twice as far as from an update to nothing; so they count each round with twice the "
        "sensitivity, and show more for this job than is claimed here."
        if mode in (PrivacyMode.CENTRAL, PrivacyMode.DISTRIBUTED)
        else ""
    )
    shares = (
        " A sum of discrete Gaussian shares is not quite a discrete Gaussian; what it is more is counted (Kairouz, Liu "
        "and Steinke 2021), for every parameter of the model."
        if mode is PrivacyMode.DISTRIBUTED
        else ""
    )
    return (
        "Rényi differential privacy at fixed orders, in whole billionths that are rounded up. Every release of the "
        "job is added up, whatever the later ones depend on (adaptive composition), and the sum is converted to "
        "epsilon at delta; a hundredth of delta is kept for the sampler of the noise. The figure by privacy loss "
        f"distributions (dp-accounting) is shown beside it and enforces nothing.{sampled}{shares}{ledgers}"
    )


# --- What has to be true ----------------------------------------------------------------------------------------------


def _assumptions(spec: JobSpec) -> list[str]:
    mode = spec.privacy.mode
    if mode is PrivacyMode.NONE:
        operator = "the sum of each round's updates" if spec.secure_aggregation else "every single update"
        trusted = (
            "Everybody who receives something is trusted with the records behind it: the operator of this service "
            f"with {operator}, the researcher and the other organizations with the models and what is measured."
        )
        return [trusted, *(assumptions_of_masks(spec) if spec.secure_aggregation else ())]
    where = "this service" if mode is PrivacyMode.CENTRAL else "each organization's worker"
    found = [
        f"The noise is drawn by {where}, which runs this platform's program unchanged: from the operating system's "
        "source of randomness, afresh for every release, and never told to anybody.",
        "The job, its model, the bound and the amount of noise are public; none of them was chosen by looking at the "
        "records. The number of records that an organization declares is public as well, and no noise hides it.",
        "Bounding, summing and noising happen in whole numbers, so that no rounding of floating-point numbers shows "
        "through the noise; what is decoded afterwards is a function of noised numbers alone.",
    ]
    if mode is PrivacyMode.RECORD:
        found += [
            "The coins that choose each step's records are drawn at the worker and are never told.",
            "Each record's gradient is a function of the model and of that record alone. Layers that mix records are "
            "refused; that floating-point kernels may round a last digit differently in batches of another size is "
            "taken to change nothing on the lattice.",
            "One person is one record of a dataset.",
        ]
        if spec.measures_statistics:
            found.append(
                "The ranges of the number columns in the job are general knowledge, not taken from the records."
            )
    if mode is PrivacyMode.CENTRAL:
        found.append(
            "The operator of this service is honest: it uses each update for nothing but its round's sum, and nobody "
            "else reads the service's memory, files and backups."
        )
    if spec.secure_aggregation is not None:
        found += assumptions_of_masks(spec)
    return [*found, _persons(spec)]


def _persons(spec: JobSpec) -> str:
    privacy, most = spec.privacy, spec.privacy.max_orgs_per_person
    if most == 1:
        return (
            "Nobody's records lie with more than one of the organizations that take part; where they may, the job "
            "should say so in `max_orgs_per_person`."
        )
    delta = (
        f"delta by {most}"
        if privacy.mode in (PrivacyMode.RECORD, PrivacyMode.LOCAL)
        else f"delta by {most} times e to the power of {most - 1} epsilon"
    )
    return (
        f"Nobody's records lie with more than {most} of the organizations that take part. For a person whose records "
        f"do, epsilon is to be multiplied by {most} and {delta}."
    )


# --- What remains open ------------------------------------------------------------------------------------------------


def _not_protected(spec: JobSpec) -> list[str]:
    mode = spec.privacy.mode
    public = (
        "That an organization takes part in this job, and since when; the name, the columns and the declared number "
        "of records of its dataset."
    )
    timing = "When a worker answers, how long it takes, and that it refuses or fails a task, with its reason."
    population = (
        "What is true of people in general: a model that has learnt it tells something about people whose records "
        "were never there, and no noise is meant to prevent that."
    )
    sites = (
        "What happens at the organization itself: who reads its records, its worker's files and memory, the results "
        "that stay there, and side channels of its computer."
    )
    masks = not_hidden_by_masks(spec) if spec.secure_aggregation else []
    if mode is PrivacyMode.NONE:
        told = "sums of updates" if spec.secure_aggregation else "updates"
        return [
            f"Single records, and everything else that {told}, models and measurements tell.",
            *masks,
            public,
            timing,
        ]
    found = [population]
    if mode is PrivacyMode.RECORD:
        found += [
            "Properties of groups: what many records of one dataset have in common, such as how many of its patients "
            "are ill, shows in that organization's updates.",
            "A person with several records in one dataset: for k of them epsilon is k times as large, and delta more "
            "than that.",
        ]
    else:
        found.append(
            "Properties that most of the organizations have in common: the models are made to learn them."
            if mode is not PrivacyMode.LOCAL
            else "Properties that many organizations have in common: the mean of their noised updates shows them."
        )
    if mode is PrivacyMode.CENTRAL:
        found.append(
            "Anything against the operator of this service, or whoever breaks into it: it receives each "
            "organization's update as it was trained, merely bounded."
        )
    most = spec.privacy.max_orgs_per_person
    found += masks
    found += [
        "A person whose records lie with more than "
        + ("one organization." if most == 1 else f"{most} organizations, as far as they do."),
        public,
        timing,
        sites,
    ]
    found.append(
        "What other jobs release of the same records: this report is of one job. The ledger of each dataset adds up "
        "all of them and keeps them within its budget."
    )
    return found


# --- What leaves ------------------------------------------------------------------------------------------------------


def _released(spec: JobSpec) -> list[str]:
    found = []
    if spec.measures_statistics:
        found.append(_RELEASED_STATISTICS[spec.privacy.unit])
    found.append(_released_updates(spec))
    found += _released_measures(spec)
    if spec.strategy.weights is Weighting.UNIFORM:
        found.append("Weights of updates: every organization counts the same, so they tell nothing.")
    else:
        found.append("Weights of updates: the declared numbers of records, which are public. Nothing is charged.")
    found.append("The models: they are computed from what is listed here, so they cost nothing more.")
    return found


_RELEASED_STATISTICS = {
    PrivacyUnit.NONE: (
        "Statistics of the number columns (round 0): how many values there are, their means and variances, and the "
        "number of training records, as they are. Nothing accounts for them."
    ),
    PrivacyUnit.RECORD: (
        "Statistics of the number columns (round 0): counts, sums and sums of squares of values that are clipped to "
        "the job's ranges, with discrete Gaussian noise. Charged to the dataset's ledger."
    ),
    PrivacyUnit.ORGANIZATION: "Statistics of the number columns: refused for this unit.",
}


def _released_updates(spec: JobSpec) -> str:
    which = f"Updates of the model ({spec.rounds} rounds of training)"
    clip = spec.privacy.clip_norm
    if spec.secure_aggregation is not None:
        return released_under_masks(spec, which)
    return {
        PrivacyMode.NONE: (
            f"{which}: as they were trained"
            + ("" if clip is None else f", clipped to an L2 norm of {clip:g}")
            + ". Nothing accounts for them."
        ),
        PrivacyMode.RECORD: (
            f"{which}: the model after a round's noised steps. Every step is charged, before the update is sent; "
            "batch sizes as they fell are not told."
        ),
        PrivacyMode.LOCAL: f"{which}: noised at the worker. Each is charged, before it is sent.",
        PrivacyMode.CENTRAL: (
            f"{which}: bounded, to this service alone; of each round only the noised mean is published. Each round is "
            "charged, before the noise is drawn."
        ),
        PrivacyMode.DISTRIBUTED: "",  # refused without secure aggregation
    }[spec.privacy.mode]


def _released_measures(spec: JobSpec) -> list[str]:
    if spec.evaluation_release is EvaluationRelease.LOCAL:
        return ["How good the models are at each organization: nothing; the results stay with its worker."]
    if spec.evaluation_release is EvaluationRelease.NOISED:
        return [
            "How good the models are: the number of held-out records and of right answers among them, each with "
            "discrete Gaussian noise. Charged to the dataset's ledger."
        ]
    found = ["The loss of training and the number of training records of each round, as they are. Not accounted for."]
    if spec.evaluation.holdout > 0:
        when = (
            f"in every round of training that is one of every {spec.evaluation.every}, and at the end"
            if evaluates_in_round(spec, 1)
            else "at the end"
        )
        found.append(
            f"Loss, accuracy and the like on held-out records ({when}), and their number, as they are. Not accounted "
            "for."
        )
    return found
