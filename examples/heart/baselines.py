"""What the federation is compared with: each hospital alone, and all records in one place. By the worker's own code.

Only a demo can do this: it reads the rows of all four hospitals. Hold-outs are the workers' own (their secret keys lie
in their folders here), and so are features, training and measuring; what is left out is privacy, so these models are
neither clipped nor noised. All start from the same weights, see numbers on the federation's scale, and train for as
many epochs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from examples.heart.hospitals import DATASET, Site
from isthmus.federation.cohort import round_seed
from isthmus.torch import draw_initial, load_arrays
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.jobs import JobSpec
from isthmus_worker.data import open_source
from isthmus_worker.determinism import settle
from isthmus_worker.evaluation import evaluate
from isthmus_worker.features import Examples
from isthmus_worker.modules import module_of
from isthmus_worker.parts import Split, mark_holdout, split_examples
from isthmus_worker.settings import read_settings
from isthmus_worker.state import StateDir
from isthmus_worker.training import train

EVERYBODY = "everybody"
"""The column of all held-out rows together."""


@dataclass(frozen=True)
class Score:
    """How a model does on some held-out rows."""

    rows: int
    accuracy: float
    auc: float | None
    """None where one class is missing."""


Scores = Mapping[str, Score]
"""Hospital, or `everybody` -> how a model does there."""


@dataclass(frozen=True)
class Bench:
    """All hospitals' records, split as their workers split them."""

    spec: JobSpec
    splits: Mapping[str, Split]

    def alone(self, hospital: str) -> nn.Module:
        """The model that a hospital gets from its own rows."""
        return self._trained(self.splits[hospital].training, hospital)

    def pooled(self) -> nn.Module:
        """The model from all training rows in one place: what the hospitals cannot do."""
        return self._trained(_together([split.training for split in self.splits.values()]), EVERYBODY)

    def model_of(self, arrays: Mapping[str, NDArray[Any]]) -> nn.Module:
        """A model from its tensors."""
        model = module_of(self.spec.model, ())
        load_arrays(model, dict(arrays))
        return model

    def scores(self, model: nn.Module) -> Scores:
        """How a model does on each hospital's held-out rows, and on all of them together."""
        parts = {name: split.holdout for name, split in self.splits.items()}
        parts[EVERYBODY] = _together(list(parts.values()))
        return {name: self._score(model, rows) for name, rows in parts.items()}

    def _trained(self, rows: Examples, name: str) -> nn.Module:
        assert self.spec.seed is not None, "the job as the service tells of it has a seed"
        seed = round_seed(self.spec.seed, 1, name, DATASET)
        settle(seed, self.spec.training.threads)
        model = self.model_of(draw_initial(self.spec.model, self.spec.seed))
        training = self.spec.training.model_copy(update={"epochs": self.spec.training.epochs * self.spec.rounds})
        train(model, rows, training, record_shape=self.spec.data.input_shape, seed=seed, tell=lambda _share: None)
        return model

    def _score(self, model: nn.Module, rows: Examples) -> Score:
        found = evaluate(model, rows, self.spec.data, self.spec.training.loss, lambda: None)
        return Score(rows=len(rows), accuracy=found["accuracy"], auc=found.get("auc"))


def read_bench(sites: Sequence[Site], spec: JobSpec, statistics: FeatureStatistics | None) -> Bench:
    """Read every hospital's records, each with its own worker's configuration and secret."""
    return Bench(spec, {site.hospital.name: _split(site, spec, statistics) for site in sites})


def _split(site: Site, spec: JobSpec, statistics: FeatureStatistics | None) -> Split:
    settings = read_settings(site.config)
    dataset = settings.dataset(DATASET)
    assert dataset is not None, "the demo wrote this configuration"
    table = open_source(dataset.source).load(spec.data.columns())
    marked = mark_holdout(table, spec, StateDir(settings.state_dir).holdout_key())
    return split_examples(marked, spec, statistics)


def _together(parts: Sequence[Examples]) -> Examples:
    return Examples(
        inputs=np.concatenate([part.inputs for part in parts]), targets=np.concatenate([part.targets for part in parts])
    )
