"""`isthmus simulate`'s engine, from the file of images on. `python -m benchmarks.simulations.ours IMAGES BATCH_SIZE`"""

import sys
from pathlib import Path

from benchmarks.simulations import task
from isthmus_worker.simulation.clients import cut, source_of
from isthmus_worker.simulation.engine import simulate
from isthmus_worker.simulation.partitions import Partition
from isthmus_worker.simulation.pool import Pool


def main() -> None:
    """One round a line."""
    path, batch_size = Path(sys.argv[1]), int(sys.argv[2])
    spec = task.job(batch_size, rounds=1_000_000)
    with Pool(2) as pool:
        table = source_of(path).load(spec.data.columns())
        clients = cut(table, spec, Partition("iid"), task.CLIENTS, seed=1, min_rows=10)
        if sys.stdin.readline():
            ended = simulate(spec, clients, pool=pool, on_round=lambda _one: said_enough())
            assert ended.rounds, "it did some"


def said_enough() -> bool:
    """Say that the round is done; whether there is no next one."""
    print("done", flush=True)
    return not sys.stdin.readline()


if __name__ == "__main__":
    main()
