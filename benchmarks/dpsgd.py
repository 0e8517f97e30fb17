"""Training under privacy of records (DP-SGD) beside Opacus' own, with the same batches.

    python -m benchmarks.dpsgd

The small convolutional network of examples/images/cnn.yaml (52,138 parameters) over made-up images of 28 x 28, one
thread, batches drawn by Poisson sampling with the same probability. Ours is what the worker runs: per-record clipping
onto a lattice of whole numbers, checked in whole numbers, exact discrete Gaussian noise from AES-256-CTR, weights put
back before each step. Opacus' is its `DPOptimizer` with float arithmetic and `torch.normal`. Both take the gradients of
single records from its `GradSampleModule`. They take turns, and what is compared is CPU seconds.
"""

import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import nn
from torch.nn import functional

from benchmarks.tables import Report, Spread, arguments
from isthmus.jobfile import load_job
from isthmus.torch import build
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import PrivacyPlan, PrivacyUnit
from isthmus_worker.determinism import settle
from isthmus_worker.features import Examples
from isthmus_worker.private_training import train_privately

JOB = Path("examples/images/cnn.yaml")
RECORDS = 4096
NOISE = 1.0
CLIP = 1.0
RECORDS_TIMED = 4096
"""That each turn trains on, expected."""


def main() -> None:
    """Print the table."""
    options = _options()
    spec = load_job(JOB)
    settle("ab" * 32, threads=1)
    torch.set_deterministic_debug_mode("default")  # Opacus' own training was not written for it
    generator = np.random.default_rng(0)
    examples = Examples(
        inputs=generator.random((RECORDS, spec.data.width), dtype=np.float32),
        targets=generator.integers(0, spec.data.outputs, RECORDS),
    )
    report = Report(
        "dpsgd",
        "DP-SGD: records a CPU second, small CNN of 52,138 parameters, one thread",
        ["expected batch", "isthmus", "opacus", "isthmus / opacus", "plain SGD"],
    )
    for batch in map(int, options.batches.split(",")):
        steps = max(1, RECORDS_TIMED // batch)
        turns: dict[str, Callable[[], None]] = {
            "isthmus": _ours(spec, examples, batch, steps),
            "opacus": _opacus(spec, examples, batch, steps),
            "plain": _plain(spec, examples, batch, steps),
        }
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for turn in range(options.repetitions + 1):
            for name, train in turns.items():
                began = time.process_time()
                train()
                if turn:  # the first warms up
                    rates[name].append(batch * steps / (time.process_time() - began))
        ratios = [ours / theirs for ours, theirs in zip(rates["isthmus"], rates["opacus"], strict=True)]
        report.row(batch, *(Spread.of(found) for found in (rates["isthmus"], rates["opacus"], ratios, rates["plain"])))
    report.note("Plain SGD has no privacy: the same network and batches, whole-batch gradients.")
    report.note(
        f"Opacus {version('opacus')} with torch {torch.__version__}; noise multiplier {NOISE:g}, clip {CLIP:g}."
    )
    report.finish(options.json)


def _ours(spec: JobSpec, examples: Examples, batch: int, steps: int) -> Callable[[], None]:
    model = build(spec.model)
    plan = PrivacyPlan(
        unit=PrivacyUnit.RECORD,
        where=None,
        epsilon=0.0,
        budget_epsilon=0.0,
        delta=1e-5,
        clip_norm=CLIP,
        noise_multiplier=NOISE,
        sampling_probability=batch / RECORDS,
        expected_batch=float(batch),
        steps_per_round=steps,
        statistics_noise_multiplier=None,
        evaluation_noise_multiplier=None,
    )
    names = list(model.state_dict())

    def train() -> None:
        train_privately(
            model,
            examples,
            spec.training,
            plan,
            averaged=names,
            record_shape=spec.data.input_shape,
            tell=lambda _share: None,
        )

    return train


def _opacus(spec: JobSpec, examples: Examples, batch: int, steps: int) -> Callable[[], None]:
    model: Any = GradSampleModule(build(spec.model), loss_reduction="mean")
    optimizer = DPOptimizer(
        _sgd(model, spec), noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=batch, loss_reduction="mean"
    )
    inputs, targets = _tensors(spec, examples)
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)

    def train() -> None:
        sampler = UniformWithReplacementSampler(num_samples=RECORDS, sample_rate=batch / RECORDS, steps=steps)
        model.train()
        for drawn in sampler:
            chosen = torch.tensor(drawn)
            optimizer.zero_grad()
            loss: Any = functional.cross_entropy(model(inputs[chosen]), targets[chosen])
            loss.backward()
            optimizer.step()

    return train


def _plain(spec: JobSpec, examples: Examples, batch: int, steps: int) -> Callable[[], None]:
    model = build(spec.model)
    optimizer = _sgd(model, spec)
    inputs, targets = _tensors(spec, examples)

    def train() -> None:
        for _step in range(steps):
            chosen = torch.randperm(RECORDS)[:batch]
            optimizer.zero_grad()
            loss: Any = functional.cross_entropy(model(inputs[chosen]), targets[chosen])
            loss.backward()
            optimizer.step()

    return train


def _sgd(model: nn.Module, spec: JobSpec) -> Any:
    options = spec.training.optimizer
    return torch.optim.SGD(model.parameters(), lr=options.lr, momentum=getattr(options, "momentum", 0.0))


def _tensors(spec: JobSpec, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.from_numpy(examples.inputs).reshape(len(examples), *spec.data.input_shape)
    return inputs, torch.from_numpy(examples.targets)


def _options() -> Any:
    parser = arguments("dpsgd", __doc__)
    parser.add_argument("--batches", default="32,64,128,256", help="expected batches (default: 32,64,128,256)")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each (default: 5)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
