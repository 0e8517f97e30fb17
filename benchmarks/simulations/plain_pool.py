"""FedAvg by hand in PyTorch, in two processes with one thread each, which share images, model and results.

`python -m benchmarks.simulations.plain_pool IMAGES BATCH_SIZE`
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.simulations import task
from benchmarks.simulations.plain import clients_of, network, train

PROCESSES = 2


def work(
    orders: int, answers: int, clients: list[tuple[Tensor, Tensor]], shared: Tensor, results: Tensor, batch_size: int
) -> None:
    """Take (client, place) as two bytes each; train; put the model into its place; say a byte."""
    model = network()
    while order := os.read(orders, 2):
        client, place = order
        vector_to_parameters(shared.clone(), model.parameters())
        train(model, *clients[client], batch_size)
        results[place] = parameters_to_vector(model.parameters()).detach()
        os.write(answers, b".")


def main() -> None:
    """One round a line."""
    path, batch_size = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    clients = clients_of(path)
    spec = task.job(batch_size, rounds=1_000_000)
    shared = parameters_to_vector(network().parameters()).detach().share_memory_()  # type: ignore[no-untyped-call]
    results = torch.zeros(task.COHORT, len(shared)).share_memory_()  # type: ignore[no-untyped-call]
    # One pipe of orders for both: whoever is free takes the next. Two bytes are read as one.
    (taken, given), (heard, said) = os.pipe(), os.pipe()
    children = []
    for _ in range(PROCESSES):
        if (child := os.fork()) == 0:
            os.close(given)
            work(taken, said, clients, shared, results, batch_size)
            os._exit(0)
        children.append(child)
    for number in task.turns():
        for place, client in enumerate(task.cohort(spec, number)):
            os.write(given, bytes([client, place]))
        for _ in range(task.COHORT):
            os.read(heard, 1)
        shared.copy_(results.mean(dim=0))
    os.close(given)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
