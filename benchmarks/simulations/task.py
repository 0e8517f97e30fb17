"""What all variants train: the network, the images, the clients, the cohorts; and how they are told to go on."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from isthmus.federation.rounds import cohort_seed, draw_round
from isthmus.wire.jobs import JobSpec
from isthmus.wire.rounds import TaskKind

CLIENTS: Final = 100
COHORT: Final = 10
SAMPLES: Final = 500
LR: Final = 0.05
SEED: Final = "51" * 32

LAYERS: Final[list[Any]] = [
    {"conv2d": {"in": 1, "out": 16, "kernel": 5, "padding": 2}}, "relu", {"max_pool": {"kernel": 2}},
    {"conv2d": {"in": 16, "out": 32, "kernel": 5, "padding": 2}}, "relu", {"max_pool": {"kernel": 2}},
    "flatten", {"linear": {"in": 1568, "out": 128}}, "relu", {"linear": {"in": 128, "out": 10}},
]  # fmt: skip
"""The small network: 215,370 parameters."""


def job(batch_size: int, rounds: int) -> JobSpec:
    """FedAvg, a tenth of the clients a round, one local epoch, nothing held out."""
    return JobSpec.model_validate(
        {
            "name": "speed",
            "model": {"layers": LAYERS},
            "data": {
                "task": "classification",
                "features": [{"name": "image", "shape": [1, 28, 28], "divide_by": 255}],
                "target": "label",
                "classes": 10,
            },
            "training": {"optimizer": {"sgd": {"lr": LR}}, "batch_size": batch_size, "epochs": 1},
            "cohort": {"fraction": COHORT / CLIENTS, "min_updates": 2},
            "privacy": "none",
            "rounds": rounds,
            "evaluation": {"holdout": 0},
            "seed": SEED,
        }
    )


def cohort(spec: JobSpec, number: int) -> list[int]:
    """The clients of a round: the same ones in every variant."""
    keys = [(f"client-{client:03}", "rows") for client in range(CLIENTS)]
    drawn = draw_round(spec.cohort, TaskKind.TRAIN, keys, cohort_seed(SEED, number)).chosen
    return [int(key.organization.removeprefix("client-")) for key in drawn]


def images(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images [50000, 1, 28, 28] and labels, for the variants that read them by hand."""
    with np.load(path, allow_pickle=False) as archive:
        return archive["image"], archive["label"]


def turns() -> Iterator[int]:
    """1, 2, ...: one whenever a line arrives; says `done` when the next one is asked for."""
    for number, _line in enumerate(sys.stdin, start=1):
        yield number
        print("done", flush=True)
