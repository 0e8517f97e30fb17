"""Fashion-MNIST by federated averaging: how good the model is after so many rounds, by how the images are cut.

Ten clients share the 60,000 images to train on; half of them take part in a round, with one local epoch. The 10,000
official test images are held by nobody. The data comes from the Debian package dataset-fashion-mnist.
"""

import sys
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.learning import federation, job
from benchmarks.tables import Report, Spread, arguments
from examples.images.fashion_mnist import ROOT, fashion_mnist
from examples.images.labelled import DataMissing, Parts

SHAPE: Final = (1, 28, 28)
MODEL: Final = (
    {"conv2d": {"in": 1, "out": 8, "kernel": 5, "stride": 2}},
    "relu",
    {"conv2d": {"in": 8, "out": 16, "kernel": 5, "stride": 2}},
    "relu",
    "flatten",
    {"linear": {"in": 256, "out": 64}},
    "relu",
    {"linear": {"in": 64, "out": 10}},
)
"""20,522 parameters."""

SPLITS: Final = ("iid", "dirichlet:1", "dirichlet:0.5", "dirichlet:0.1", "classes:2")


def main() -> None:
    """Make the table that the command line asks for."""
    parser = arguments("fashion", __doc__)
    parser.add_argument("--from", dest="root", type=Path, default=ROOT, help="where the four .gz files are")
    parser.add_argument("--splits", default=",".join(SPLITS), help="how the images are cut (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of training (default: %(default)s)")
    parser.add_argument("--images", type=int, default=60_000, help="of them are shared (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="how many cuts and models (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="how many train at once (default: %(default)s)")
    options = parser.parse_args()
    try:
        parts = fashion_mnist(options.root)
    except DataMissing as missing:
        sys.exit(str(missing))
    fewer = np.random.default_rng(0).permutation(len(parts.train))[: options.images]
    parts = Parts(train=parts.train.only(np.sort(fewer)), test=parts.test)
    halfway = max(1, options.rounds // 2)
    training = {"optimizer": {"sgd": {"lr": options.rate}}, "batch_size": 32, "epochs": 1}
    spec = job(MODEL, SHAPE, training=training, rounds=options.rounds)
    report = Report(
        "fashion",
        f"Accuracy on 10,000 test images; 10 clients share {len(parts.train)}, half of them take part in a round",
        ("cut", f"after {halfway} rounds", f"after {options.rounds} rounds", "best of them"),
    )
    report.note(f"{options.seeds} seeds: median [least..most]. One local epoch, batches of 32, SGD {options.rate:g}.")
    with federation(parts, options.processes) as running:
        for split in options.splits.split(","):
            curves = [running.run(spec, split, seed) for seed in range(1, options.seeds + 1)]
            if any(len(curve) < options.rounds for curve in curves):
                report.row(split, None, None, "diverged")
                continue
            columns = [[curve[halfway - 1], curve[-1], max(curve)] for curve in curves]
            report.row(split, *(Spread.of(column) for column in zip(*columns, strict=True)))
    report.finish(options.json)


if __name__ == "__main__":
    main()
