"""What federated averaging learns from 5,000 digits: the classic experiment, small enough for every day."""

import numpy as np
import pytest

from benchmarks.fedavg import FEDSGD, MODEL, SHAPE, TUNING_SEED, Row, best_rate
from benchmarks.learning import as_table, job, rounds_to
from examples.images.mnist_5k import mnist_5k
from isthmus_worker.simulation.clients import ClientsRefused, cut, without_shared
from isthmus_worker.simulation.engine import simulate
from isthmus_worker.simulation.partitions import Partition

CLIENTS, ROUNDS = 10, 10
TRAINING = {"optimizer": {"sgd": {"lr": 0.1}}, "batch_size": 10, "epochs": 1}


def test_ten_clients_learn_the_digits_and_less_well_with_two_classes_each() -> None:
    parts = mnist_5k()
    train, test = as_table(parts.train), as_table(parts.test)
    spec = job(MODEL, SHAPE, training=TRAINING, rounds=ROUNDS).model_copy(update={"seed": "5e" * 32})
    reached = {}
    for split in ("iid", "classes:2"):
        clients = cut(train, spec, Partition.parse(split), CLIENTS, seed=1, min_rows=20)
        assert without_shared(clients, test)[1] == 0  # no client holds a test image
        rounds = simulate(spec, clients, test=test, test_every=ROUNDS).rounds
        assert {len(one.cohort) for one in rounds[:ROUNDS]} == {CLIENTS // 2}
        measured = rounds[ROUNDS - 1].test
        assert measured is not None
        assert measured["examples"] == test.rows
        reached[split] = measured["accuracy"]

    assert reached["iid"] >= 0.85
    assert reached["iid"] >= reached["classes:2"] + 0.03


def test_a_test_image_among_the_training_images_is_refused() -> None:
    parts = mnist_5k()
    train = as_table(parts.train)
    spec = job(MODEL, SHAPE, training=TRAINING, rounds=1)
    clients = cut(train, spec, Partition.parse("iid"), CLIENTS, seed=1, min_rows=20)
    leaky = as_table(parts.train.only(np.arange(5)))

    with pytest.raises(ClientsRefused, match="5 records of the test set are also held by clients"):
        simulate(spec, clients, test=leaky)


@pytest.mark.parametrize(
    ("accuracies", "rounds"),
    [
        ([0.1, 0.5, 0.9], 2.5),
        ([0.1, 0.6, 0.2, 0.8], 3.5),  # the best so far: a step back does not count
        ([0.7], 1.0),
        ([0.75, 0.1], 1.0),
        ([0.1, 0.69], None),
        ([], None),
    ],
)
def test_rounds_to_a_target_are_read_off_the_best_so_far(accuracies: list[float], rounds: float | None) -> None:
    found = rounds_to(accuracies, 0.7)

    assert found is None if rounds is None else found == pytest.approx(rounds)


class Needed:
    """Runs that need fewest rounds with one learning rate, and more the farther away another one is."""

    def __init__(self, best: float) -> None:
        self._best = best
        self.tried: list[float] = []

    def rounds(self, _split: str, _row: Row, rate: float, seed: int, most: int) -> float:
        assert seed == TUNING_SEED
        self.tried.append(rate)
        needed = 10 + 10 * abs(np.log2(rate / self._best))
        return float(needed) if needed <= most else float("inf")


@pytest.mark.parametrize(("best", "rates"), [(0.1, 3), (0.8, 6), (3.2, 8), (0.025, 5)])
def test_a_learning_rate_beyond_the_end_of_the_grid_is_found(best: float, rates: int) -> None:
    runs = Needed(best)

    assert best_rate(runs, "iid", FEDSGD, [0.05, 0.1, 0.2], 400) == (best, 10.0)  # type: ignore[arg-type]
    assert len(set(runs.tried)) == len(runs.tried) == rates


def test_a_single_learning_rate_is_taken_as_it_is() -> None:
    runs = Needed(0.8)

    assert best_rate(runs, "iid", FEDSGD, [0.2], 400)[0] == 0.2  # type: ignore[arg-type]
    assert runs.tried == [0.2]
