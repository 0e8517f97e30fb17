"""Who holds what: disjoint, complete, seeded, and as far from IID as was asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus_worker.simulation.partitions import (
    Labels,
    Partition,
    PartitionRefused,
    Rows,
    check_partition,
    classes_per_client,
    dirichlet,
    iid,
)


def labels_of(rows: int, classes: int, seed: int = 0) -> Labels:
    """Classes of different sizes, in no order."""
    chance = np.random.default_rng(seed)
    shares = np.arange(1, classes + 1) + classes
    return chance.choice(classes, size=rows, p=shares / shares.sum())


def distance_from_iid(labels: Labels, parts: list[Rows]) -> float:
    """The mean distance (total variation, 0 to 1) of the clients' shares of classes from those of all records."""
    classes = int(labels.max()) + 1
    whole = np.bincount(labels, minlength=classes) / len(labels)
    return float(
        np.mean([np.abs(np.bincount(labels[part], minlength=classes) / len(part) - whole).sum() / 2 for part in parts])
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(200, 900),
    classes=st.integers(2, 10),
    clients=st.integers(1, 20),
    text=st.sampled_from(
        ["iid", "classes:1", "classes:2", "classes:5", "dirichlet:0.3", "dirichlet:1", "dirichlet:50"]
    ),
    seed=st.integers(0, 2**32),
)
def test_every_record_belongs_to_exactly_one_client_or_the_cut_is_refused(
    rows: int, classes: int, clients: int, text: str, seed: int
) -> None:
    labels = labels_of(rows, classes, seed % 1000)
    partition = Partition.parse(text)
    try:
        parts = partition.cut(labels, clients, seed=seed, min_rows=2)
    except PartitionRefused:
        assert partition.kind != "iid"
        return

    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows))
    assert min(len(part) for part in parts) >= 2
    if partition.kind == "classes":
        assert {len(np.unique(labels[part])) for part in parts} == {int(partition.amount)}
    if partition.kind == "dirichlet":
        assert min(len(np.unique(labels[part])) for part in parts) >= 2
    again = partition.cut(labels, clients, seed=seed, min_rows=2)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("text", ["iid", "classes:2", "dirichlet:0.5"])
def test_another_seed_is_another_cut(text: str) -> None:
    labels = labels_of(1000, 10)
    one, other = (Partition.parse(text).cut(labels, 10, seed=seed) for seed in (1, 2))

    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_sizes_of_an_iid_cut_differ_by_at_most_one() -> None:
    sizes = {len(part) for part in iid(1003, 10, seed=4)}
    assert sizes == {100, 101}


@pytest.mark.parametrize(("classes", "clients"), [(1, 10), (2, 10), (2, 100), (3, 7), (9, 30), (10, 10)])
def test_each_class_is_shared_by_as_many_clients_as_any_other(classes: int, clients: int) -> None:
    labels = labels_of(5000, 10)
    parts = classes_per_client(labels, clients, classes, seed=9)

    holders = [sum(bool((labels[part] == label).any()) for part in parts) for label in range(10)]
    assert sum(holders) == clients * classes
    assert max(holders) - min(holders) <= 1


def test_clients_with_two_classes_do_not_all_come_in_twins() -> None:
    labels = labels_of(5000, 10)
    pairs = {tuple(np.unique(labels[part])) for part in classes_per_client(labels, 100, 2, seed=3)}
    assert len(pairs) > 25, "of the 45 pairs there are"


def test_a_cut_is_as_far_from_iid_as_its_name_says() -> None:
    labels = labels_of(20_000, 10)

    def far(text: str) -> float:
        return distance_from_iid(labels, Partition.parse(text).cut(labels, 10, seed=5))

    assert far("iid") < 0.05
    assert 0.15 < far("dirichlet:1") < far("dirichlet:0.5") < far("dirichlet:0.1")
    assert far("dirichlet:1000") < 0.05
    assert far("classes:2") > 0.7


def test_shares_of_a_dirichlet_cut_have_the_spread_that_alpha_says() -> None:
    """A share of a symmetric Dirichlet over k has the variance (1/k)(1 - 1/k) / (k alpha + 1)."""
    clients, alpha = 5, 0.7
    labels = np.repeat(np.arange(20), 1000)
    shares = []
    for seed in range(40):
        parts = dirichlet(labels, clients, alpha, seed=seed, min_rows=1)
        shares += [np.bincount(labels[part], minlength=20) / 1000 for part in parts]

    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.var(np.concatenate(shares)) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("text", "clients", "rows", "said"),
    [
        ("classes:11", 10, 1000, "more classes than the 10"),
        ("classes:1", 5, 1000, "cannot hold all 10 classes"),
        ("classes:2", 1000, 1100, "fewer clients would help"),
        ("dirichlet:0.001", 50, 1000, "No cut dirichlet:0.001"),
        ("iid", 200, 1000, "gets 5 records; every client needs 10"),
        ("iid", 0, 1000, "at least one client"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_sentence(text: str, clients: int, rows: int, said: str) -> None:
    with pytest.raises(PartitionRefused, match=said):
        Partition.parse(text).cut(labels_of(rows, 10), clients, seed=1)


@pytest.mark.parametrize(
    "text", ["", "iid:3", "classes", "classes:", "classes:0", "classes:-1", "classes:1.5", "dirichlet", "dirichlet:0",
             "dirichlet:-1", "dirichlet:nan", "dirichlet:inf", "shards:2"]
)  # fmt: skip
def test_a_partition_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(PartitionRefused, match="is no partition"):
        Partition.parse(text)


@pytest.mark.parametrize("text", ["iid", "classes:2", "dirichlet:0.5"])
def test_a_partition_is_written_as_it_is_read(text: str) -> None:
    assert str(Partition.parse(text)) == text


def test_the_check_finds_what_is_shared_missing_empty_small_or_made_up() -> None:
    def part(*rows: int) -> Rows:
        return np.array(rows, dtype=np.int64)

    check_partition([part(0, 2), part(1, 3)], 4)
    for parts, said in (
        ([part(0, 2), part(1, 2, 3)], "1 records belong to more than one client"),
        ([part(0, 0, 2), part(1, 3)], "or to one twice"),
        ([part(0, 2), part(1)], "1 records belong to no client"),
        ([part(0, 2, 1, 3), part()], "Client 1 gets 0 records"),
        ([part(0, 2), part(1, 3, 4)], "does not exist"),
        ([part(-1, 2), part(0, 1, 3)], "does not exist"),
    ):
        with pytest.raises(PartitionRefused, match=said):
            check_partition(parts, 4)
    with pytest.raises(PartitionRefused, match="every client needs 3"):
        check_partition([part(0, 2), part(1, 3, 4)], 5, min_rows=3)


def test_one_class_cannot_be_cut_by_class() -> None:
    with pytest.raises(PartitionRefused, match="two classes"):
        Partition.parse("dirichlet:1").cut(np.zeros(100, np.int64), 4, seed=0)
