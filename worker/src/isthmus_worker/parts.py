"""A dataset as one job sees it: encoded, and in two parts that share no row. No torch here, and no files."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.wire.data import FeatureStatistics
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import PrivacyUnit
from isthmus_worker.data import Table
from isthmus_worker.features import Examples, encode_inputs, encode_targets, require_rows, strata, usable_targets
from isthmus_worker.splitting import held_out, held_out_apart


@dataclass(frozen=True)
class Split:
    """A dataset as one job sees it, in two parts that share no row."""

    training: Examples
    holdout: Examples


@dataclass(frozen=True)
class Marked:
    """The records of a dataset that have a target, and which of them are held out."""

    table: Table
    targets: NDArray[Any]
    holdout: NDArray[np.bool_]


def mark_holdout(table: Table, spec: JobSpec, key: bytes) -> Marked:
    """Decide which records are held out; the same ones for statistics, training and evaluation.

    Under privacy of records each is looked at by itself: one without a target that the job can use takes no part in any
    of them, and neither such records nor their absence is a reason to refuse.

    Args:
        table: the columns that the job reads.
        spec: the job.
        key: the worker's secret, see `isthmus_worker.splitting`.

    Raises:
        DataRefused: there are no records, or their targets are not what the job wants.
    """
    share = spec.evaluation.holdout
    if spec.privacy.unit is PrivacyUnit.RECORD:
        usable = usable_targets(table, spec.data)
        table = table if usable.all() else table.only(np.flatnonzero(usable))
        targets, marks = encode_targets(table, spec.data), held_out_apart(table.fingerprints, share, key)
    else:
        require_rows(table)
        targets = encode_targets(table, spec.data)
        marks = held_out(strata(spec.data, targets), table.fingerprints, share, key)
    return Marked(table=table, targets=targets, holdout=marks)


def split_examples(marked: Marked, spec: JobSpec, statistics: FeatureStatistics | None) -> Split:
    """Encode the records and part those that are trained on from those that are held out.

    Raises:
        DataRefused: a column does not hold what the job wants.
    """
    apart = spec.privacy.unit is PrivacyUnit.RECORD
    inputs = encode_inputs(marked.table, spec.data, statistics, apart=apart)
    examples = Examples(inputs=inputs, targets=marked.targets)
    return Split(training=examples.only(~marked.holdout), holdout=examples.only(marked.holdout))
