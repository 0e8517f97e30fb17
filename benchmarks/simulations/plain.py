"""FedAvg as one writes it by hand in PyTorch, in one process whose operations use both cores.

`python -m benchmarks.simulations.plain IMAGES BATCH_SIZE`
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.simulations import task


def network() -> nn.Module:
    """The small network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def clients_of(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of every client."""
    images, labels = task.images(path)
    parts = np.array_split(np.random.default_rng(1).permutation(len(images)), task.CLIENTS)
    return [
        (torch.from_numpy(images[part]).float().div_(255), torch.from_numpy(labels[part].astype(np.int64)))
        for part in parts
    ]


def train(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> None:
    """One epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=task.LR)
    model.train()
    for batch in torch.split(torch.randperm(len(images)), batch_size):
        optimizer.zero_grad()
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def main() -> None:
    """One round a line."""
    path, batch_size = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(2)
    clients = clients_of(path)
    spec = task.job(batch_size, rounds=1_000_000)
    model, local = network(), network()
    for number in task.turns():
        mean: dict[str, Tensor] = {}
        chosen = task.cohort(spec, number)
        for client in chosen:
            local.load_state_dict(copy.deepcopy(model.state_dict()))
            train(local, *clients[client], batch_size)
            for name, tensor in local.state_dict().items():
                share = tensor / len(chosen)
                mean[name] = mean[name] + share if name in mean else share
        model.load_state_dict(mean)


if __name__ == "__main__":
    main()
