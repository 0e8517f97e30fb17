"""What an often-copied toy version of federated averaging gets wrong, and ours does not."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from isthmus.codec.arrays import read
from isthmus.codec.errors import CodecError
from isthmus.federation.cohort import round_seed
from isthmus.torch import build, load_arrays, to_arrays
from isthmus_worker.data import Table
from isthmus_worker.determinism import batch_generator, settle
from isthmus_worker.features import encode_inputs
from isthmus_worker.parts import mark_holdout
from isthmus_worker.simulation.clients import (
    Client,
    ClientsRefused,
    cut,
    holdout_key_of,
    require_disjoint,
    without_shared,
)
from isthmus_worker.simulation.partitions import Partition
from tests.worker.simulation.cases import SEED, job_spec, points, searched, simulated, some_clients, table_of

# --- A "non-IID" split that shares samples, or is IID after all ------------------------------------------------------


@pytest.mark.parametrize("text", ["iid", "classes:2", "dirichlet:0.3"])
def test_clients_share_no_record_and_leave_none_out(text: str) -> None:
    whole = points(400)
    clients = cut(whole, job_spec(), Partition.parse(text), 6, seed=1, min_rows=10)

    held = [fingerprint for client in clients for fingerprint in client.table.fingerprints]
    assert len(held) == len(set(held)) == 400
    assert set(held) == set(whole.fingerprints)


def test_clients_with_two_classes_have_two_in_what_they_train_on() -> None:
    """Not only in the list of places: in the records that reach the training."""
    spec = job_spec(rounds=1, cohort={"min_updates": 6})
    clients = cut(points(400), spec, Partition.parse("classes:2"), 6, seed=1, min_rows=10)

    simulation = simulated(spec, clients)

    for client in clients:
        table = client.table
        marked = mark_holdout(table, spec, holdout_key_of(client, SEED))
        assert len(np.unique(marked.targets[~marked.holdout])) == 2
        assert simulation.rounds[1].sites[client.key]["train/examples"] == (~marked.holdout).sum()
    iid = cut(points(400), spec, Partition.parse("iid"), 6, seed=1, min_rows=10)
    assert {len(np.unique(np.asarray(client.table.columns["kind"]))) for client in iid} == {3}


# --- Averaging integer buffers ---------------------------------------------------------------------------------------


def test_integer_buffers_are_not_averaged_and_floating_ones_are() -> None:
    layers = [{"linear": {"in": 4, "out": 6}}, {"batch_norm": {"features": 6}}, "relu", {"linear": {"in": 6, "out": 3}}]
    spec = job_spec(model={"layers": layers}, rounds=1)
    start = simulated(spec, some_clients(), on_round=lambda one: one.number == 0).model
    counter = next(name for name in start if name.endswith("num_batches_tracked"))
    mean = counter.replace("num_batches_tracked", "running_mean")
    start[counter] = np.array(2**53 + 1, np.int64)  # no float64 holds it

    after = simulated(spec, some_clients(), initial=start).model

    assert after[counter].dtype == np.int64
    assert after[counter] == 2**53 + 1
    assert not np.array_equal(after[mean], start[mean])


# --- Pickled models --------------------------------------------------------------------------------------------------

TRAP = """
import io, os, pickle, sys

def told(what):
    with open(os.environ["PICKLED"], "a") as file:
        file.write(f"{what} in {sys.argv[0]}\\n")

def trapped(name, real):
    def call(*arguments, **options):
        told(name)
        return real(*arguments, **options)
    return call

for name in ("dump", "dumps", "load", "loads"):
    setattr(pickle, name, trapped(name, getattr(pickle, name)))

sys.addaudithook(lambda event, arguments: told(f"{event} {arguments}") if event == "pickle.find_class" else None)
"""


def test_nothing_is_pickled_in_any_process(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TRAP)
    (tmp_path / "pickled").write_text("")
    script = (
        "from tests.worker.simulation.cases import *; "
        "print(simulate(job_spec(), some_clients(), processes=2).digest); "
        "import pickle; pickle.loads(pickle.dumps(Client))"  # the trap works
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": searched(tmp_path), "PICKLED": str(tmp_path / "pickled")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == simulated(job_spec(), some_clients()).digest
    told = (tmp_path / "pickled").read_text().splitlines()
    assert told[:2] == ["dumps in -c", "loads in -c"]
    assert len(told) == 3
    assert "find_class" in told[2]


def test_a_pickled_model_is_not_taken_for_an_initial_one(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(CodecError):
        read(tmp_path / "model.pt")


# --- Mutating what the caller gave -----------------------------------------------------------------------------------


def digest_of(arrays: Mapping[str, Any]) -> str:
    whole = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        whole.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def test_what_the_caller_gave_is_not_changed_and_what_it_gets_is_its_own() -> None:
    clients, test = some_clients(), points(200, 99)
    start = simulated(job_spec(), clients, on_round=lambda one: one.number == 0).model
    given = {name: array.copy() for name, array in start.items()}
    for array in given.values():
        array.setflags(write=False)
    before = [digest_of(client.table.columns) for client in clients] + [digest_of(test.columns)]

    models: list[Mapping[str, NDArray[Any]]] = []
    one = simulated(job_spec(), clients, test=test, initial=given)
    models.append({name: array.copy() for name, array in one.model.items()})
    simulated(job_spec(rounds=5), clients, test=test, initial=given)

    assert [digest_of(client.table.columns) for client in clients] + [digest_of(test.columns)] == before
    assert digest_of(given) == digest_of(start)
    assert digest_of(one.model) == digest_of(models[0]), "the second simulation wrote into the first one's model"
    for array in one.model.values():
        array[...] = 0  # may be written to, and concerns nobody
    assert simulated(job_spec(), clients, test=test, initial=given).digest == one.digest


# --- State that leaks from client to client --------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [{"sgd": {"lr": 0.1, "momentum": 0.9}}, {"adam": {"lr": 0.05}}], ids=str)
def test_every_client_starts_from_the_round_s_model_with_an_optimizer_of_its_own(optimizer: dict[str, Any]) -> None:
    """Two rounds over four clients, again in plain torch with torch's own optimizers, one client after another."""
    layers = [{"linear": {"in": 4, "out": 8}}, {"dropout": {"p": 0.2}}, "relu", {"linear": {"in": 8, "out": 3}}]
    spec = job_spec(model={"layers": layers}, training={"optimizer": optimizer, "batch_size": 8, "epochs": 2}, rounds=2)
    clients = some_clients()
    for processes in (1, 2):
        simulation = simulated(spec, clients, processes=processes)
        assert simulation.statistics is not None
        start = simulated(spec, clients, on_round=lambda one: one.number == 0).model
        for number in (1, 2):
            start = _round_in_plain_torch(spec, clients, start, number, simulation.statistics)
        assert digest_of(start) == digest_of(simulation.model)


def _round_in_plain_torch(
    spec: Any, clients: list[Client], start: Mapping[str, NDArray[Any]], number: int, statistics: Any
) -> dict[str, NDArray[Any]]:
    total = {name: np.zeros(array.shape) for name, array in start.items()}
    rows = sum(client.table.rows for client in clients)
    for client in clients:
        marked = mark_holdout(client.table, spec, holdout_key_of(client, SEED))
        inputs = torch.from_numpy(encode_inputs(client.table, spec.data, statistics)[~marked.holdout])
        targets = torch.from_numpy(marked.targets[~marked.holdout])
        module = build(spec.model)
        load_arrays(module, start)
        optimizer = _optimizer(module, spec.training.optimizer)
        seed = round_seed(SEED, number, client.organization, client.dataset)
        settle(seed, 1)
        generator = batch_generator(seed)
        module.train()
        for _epoch in range(spec.training.epochs):
            for batch in torch.randperm(len(inputs), generator=generator).split(spec.training.batch_size):
                optimizer.zero_grad()
                functional.cross_entropy(module(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        for name, array in to_arrays(module).items():
            total[name] += (client.table.rows / rows) * (array - start[name]).astype(np.float64)
    return {name: (start[name] + total[name]).astype(np.float32) for name in start}


def _optimizer(module: nn.Module, spec: Any) -> torch.optim.Optimizer:
    if spec.kind == "adam":
        return torch.optim.Adam(module.parameters(), lr=spec.lr)
    return torch.optim.SGD(module.parameters(), lr=spec.lr, momentum=spec.momentum)


# --- Evaluating on training rows -------------------------------------------------------------------------------------


def test_a_model_that_knows_its_training_records_by_heart_does_no_better_than_chance_where_it_is_measured() -> None:
    """Labels are drawn by lot, so that whatever is known of them was seen in training."""
    chance = np.random.default_rng(8)

    def random_labels(seed: int, rows: int) -> Table:
        columns = {name: np.random.default_rng((seed, place)).normal(size=rows) for place, name in enumerate("abcd")}
        return table_of(columns | {"kind": chance.integers(0, 3, rows)})

    clients = [Client(f"clinic-{number}", "points", random_labels(number, 120)) for number in range(2)]
    spec = job_spec(
        model={"layers": [{"linear": {"in": 4, "out": 256}}, "relu", {"linear": {"in": 256, "out": 256}}, "relu",
                          {"linear": {"in": 256, "out": 3}}]},
        training={"optimizer": {"adam": {"lr": 0.003}}, "epochs": 40, "batch_size": 16},
        rounds=5,
    )  # fmt: skip

    simulation = simulated(spec, clients, test=random_labels(99, 3000))

    last, final = simulation.rounds[-2:]
    assert last.metrics["train/loss"] < 0.2
    assert last.test is not None
    assert last.test["accuracy"] == pytest.approx(1 / 3, abs=0.05)
    assert final.metrics["holdout/examples"] + last.metrics["train/examples"] == 240
    assert final.metrics["holdout/accuracy"] < 0.6, "of some sixty records"


def test_statistics_come_from_training_records_only() -> None:
    clients = some_clients(2)
    spec = job_spec()
    simulation = simulated(spec, clients, on_round=lambda one: one.number == 0)

    values = []
    for client in clients:
        marked = mark_holdout(client.table, spec, holdout_key_of(client, SEED))
        values.append(np.asarray(client.table.columns["a"])[~marked.holdout])
    assert simulation.statistics is not None
    assert simulation.statistics.rows == len(np.concatenate(values))
    assert simulation.statistics.mean[0] == pytest.approx(np.concatenate(values).mean(), rel=1e-12)


def test_a_test_set_with_a_training_record_in_it_is_refused() -> None:
    clients = some_clients()
    test = points(50, 77)
    require_disjoint(clients, test)
    known = clients[2].table.only(np.array([3, 5]))
    mixed = table_of(
        {
            name: np.concatenate([np.asarray(test.columns[name]), np.asarray(known.columns[name])])
            for name in test.columns
        }
    )

    with pytest.raises(ClientsRefused, match=r"2 records of the test set are also held by clients \(clinic-2\)"):
        simulated(job_spec(), clients, test=mixed)

    clean, dropped = without_shared(clients, mixed)
    assert dropped == 2
    assert clean.fingerprints == test.fingerprints
    simulated(job_spec(rounds=1), clients, test=clean)


def test_what_passes_between_processes_is_json_and_holds_no_record() -> None:
    """Records, models and updates go through memory; a line says only where they lie."""
    heard: list[bytes] = []
    from isthmus_worker.simulation import pool as pools

    real = pools._Line.hear

    def listening(line: Any) -> Any:
        answer = real(line)
        heard.append(b"" if answer is None else answer.model_dump_json().encode())
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools._Line, "hear", listening)
        simulated(job_spec(), some_clients())

    assert len(heard) > 10
    for line in heard:
        said = json.loads(line)
        assert said["answer"] == "finished"
        assert all(isinstance(value, float) for value in said["metrics"].values())
