"""Who holds which records: one dataset cut into clients that share no record, as the field's experiments do it.

Pure NumPy: labels and a seed come in, places of records come out. Every cut is disjoint and complete, and checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
"""Places of records in the whole dataset, from 0, in rising order."""
Labels = NDArray[np.int64]

FEWEST_ROWS: Final = 10
"""A client with fewer records is refused unless asked for: it is what a worker's own policy asks for by default."""
_ATTEMPTS: Final = 1000


class PartitionRefused(ValueError):
    """The dataset cannot be cut like that. The message says why, and what would help."""


@dataclass(frozen=True)
class Partition:
    """How a dataset is cut.

    Attributes:
        kind: `iid`, `classes` (each client has so many classes) or `dirichlet` (shares of each class are drawn).
        amount: classes a client, or the concentration alpha of the Dirichlet distribution; 0 for `iid`.
    """

    kind: Literal["iid", "classes", "dirichlet"]
    amount: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Partition":
        """`iid`, `classes:2` or `dirichlet:0.5`.

        Raises:
            PartitionRefused: it is none of these.
        """
        kind, _, amount = text.partition(":")
        try:
            if kind == "iid" and not amount:
                return cls("iid")
            if kind == "classes" and int(amount) >= 1:
                return cls("classes", int(amount))
            if kind == "dirichlet" and 0 < float(amount) < np.inf:
                return cls("dirichlet", float(amount))
        except ValueError:
            pass
        raise PartitionRefused(
            f"{text!r} is no partition: write iid, classes:2 or dirichlet:0.5, with your own number."
        )

    def __str__(self) -> str:
        """As `parse` reads it."""
        return self.kind if self.kind == "iid" else f"{self.kind}:{self.amount:g}"

    def cut(self, labels: Labels, clients: int, *, seed: int, min_rows: int = FEWEST_ROWS) -> list[Rows]:
        """The clients' records.

        Args:
            labels: each record's class, a whole number; for regression all alike, which only `iid` can cut.
            clients: how many; at least 1.
            seed: the same one gives the same cut.
            min_rows: fewest records of a client.

        Raises:
            PartitionRefused: the records do not allow it.

        Guarantees:
            Every record belongs to exactly one client.
        """
        if clients < 1:
            raise PartitionRefused("There must be at least one client.")
        if self.kind == "iid":
            parts = iid(len(labels), clients, seed=seed)
        elif self.kind == "classes":
            parts = classes_per_client(labels, clients, int(self.amount), seed=seed)
        else:
            parts = dirichlet(labels, clients, self.amount, seed=seed, min_rows=min_rows)
        check_partition(parts, len(labels), min_rows=min_rows)
        return parts


def iid(rows: int, clients: int, *, seed: int) -> list[Rows]:
    """Cut `rows` records at random into parts whose sizes differ by at most one."""
    return [np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(rows), clients)]


def classes_per_client(labels: Labels, clients: int, classes: int, *, seed: int) -> list[Rows]:
    """Give every client records of exactly so many classes.

    Each class is cut into as many shards as it has holders, and a client gets one shard of each of its classes. (To
    sort all records by class and cut that row into shards gives clients between 1 and 2 * classes of them.)

    Raises:
        PartitionRefused: there are fewer classes than that, or some class would be nobody's.
    """
    present = np.unique(labels)
    if classes > len(present):
        raise PartitionRefused(
            f"classes:{classes} asks for more classes than the {len(present)} that the records have."
        )
    if clients * classes < len(present):
        raise PartitionRefused(
            f"{clients} clients with {classes} classes each cannot hold all {len(present)} classes: "
            "more clients or more classes a client would."
        )
    chance = np.random.default_rng(seed)
    holders = _holders(len(present), clients, classes, chance)
    parts: list[list[Rows]] = [[] for _ in range(clients)]
    for label, having in zip(present, holders, strict=True):
        rows = chance.permutation(np.flatnonzero(labels == label))
        if len(rows) < len(having):
            raise PartitionRefused(
                f"Class {label} has {len(rows)} records for {len(having)} clients: fewer clients would help."
            )
        for client, shard in zip(having, np.array_split(rows, len(having)), strict=True):
            parts[client].append(shard)
    return [np.sort(np.concatenate(shards)) for shards in parts]


def _holders(present: int, clients: int, classes: int, chance: np.random.Generator) -> list[list[int]]:
    """For each class, the clients that hold it: each client in `classes` lists, list lengths differing by at most one.

    One client after another takes the classes that want most holders still, ties broken at random. That never runs
    into a dead end: wants never differ by more than one, so as long as some are left, `classes` different ones are.
    """
    wanted = np.full(present, clients * classes // present)
    wanted[chance.permutation(present)[: clients * classes % present]] += 1
    holders: list[list[int]] = [[] for _ in range(present)]
    for client in chance.permutation(clients).tolist():
        ranked = np.lexsort((chance.random(present), -wanted))
        for label in ranked[:classes].tolist():
            wanted[label] -= 1
            holders[label].append(client)
    return holders


def dirichlet(labels: Labels, clients: int, alpha: float, *, seed: int, min_rows: int = FEWEST_ROWS) -> list[Rows]:
    """Cut each class by shares drawn from a symmetric Dirichlet distribution; small `alpha` is far from IID.

    The whole cut is drawn again, from the same generator, until every client has `min_rows` records and two classes: a
    classifier cannot be trained on one.

    Raises:
        PartitionRefused: no such cut was found, or the records have one class.

    Source:
        Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks", section 4.
        https://arxiv.org/abs/1905.12022
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise PartitionRefused("A Dirichlet cut needs records of at least two classes.")
    chance = np.random.default_rng(seed)
    by_label = [np.flatnonzero(labels == label) for label in present]
    for _attempt in range(_ATTEMPTS):
        held = _shares(np.array([len(rows) for rows in by_label]), clients, alpha, chance)
        if (held.sum(axis=0) >= max(1, min_rows)).all() and ((held > 0).sum(axis=0) >= 2).all():
            break
    else:
        raise PartitionRefused(
            f"No cut dirichlet:{alpha:g} of {len(labels)} records gives each of {clients} clients {min_rows} records "
            "and two classes: a larger number, fewer clients or fewer records a client would help."
        )
    parts: list[list[Rows]] = [[] for _ in range(clients)]
    for rows, counts in zip(by_label, held, strict=True):
        shards = np.split(chance.permutation(rows), np.cumsum(counts)[:-1])
        for part, shard in zip(parts, shards, strict=True):
            part.append(shard)
    return [np.sort(np.concatenate(shards)) for shards in parts]


def _shares(sizes: NDArray[Any], clients: int, alpha: float, chance: np.random.Generator) -> NDArray[np.int64]:
    """Records [classes, clients]: every class's are all given out."""
    shares = chance.dirichlet(np.full(clients, alpha), size=len(sizes))
    ends = np.floor(np.cumsum(shares, axis=1) * sizes[:, None] + 0.5).astype(np.int64)
    ends[:, -1] = sizes  # the shares of a row add up to 1 but for their rounding
    counts: NDArray[np.int64] = np.diff(np.minimum(ends, sizes[:, None]), axis=1, prepend=0)
    return counts


def check_partition(parts: Sequence[Rows], rows: int, *, min_rows: int = 1) -> None:
    """Raise PartitionRefused unless every one of `rows` records belongs to exactly one part, and none is too small."""
    counts = np.zeros(rows, dtype=np.int64)
    for number, part in enumerate(parts):
        if len(part) < max(1, min_rows):
            raise PartitionRefused(
                f"Client {number} gets {len(part)} records; every client needs {max(1, min_rows)}. "
                "Fewer clients would help, or a smaller minimum."
            )
        if part.min() < 0 or part.max() >= rows:
            raise PartitionRefused(f"Client {number} gets a record that does not exist.")
        np.add.at(counts, part, 1)
    if twice := int((counts > 1).sum()):
        raise PartitionRefused(f"{twice} records belong to more than one client, or to one twice.")
    if nobody := int((counts == 0).sum()):
        raise PartitionRefused(f"{nobody} records belong to no client.")
