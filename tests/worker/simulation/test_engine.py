"""The rounds of a simulated job: who takes part, how updates count, what is measured, and how it ends."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.codec.arrays import encode
from isthmus.federation.cohort import draw_cohort
from isthmus.federation.rounds import cohort_seed
from isthmus.torch import draw_initial
from isthmus.wire.rounds import TaskKind
from isthmus_worker.simulation.clients import Client, ClientsRefused
from isthmus_worker.simulation.engine import Round, SimulationFailed, simulate
from isthmus_worker.simulation.pool import Pool
from tests.page_faults import glibc, page_faults
from tests.worker.simulation.cases import SEED, job_spec, points, searched, simulated, some_clients

PATIENCE_S = 60


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "strategy": "fedadam",
            "privacy": {"unit": "none", "clip_norm": 0.1},
            "cohort": {"min_updates": 2, "fraction": 0.5},
        },
        {"strategy": "fedavgm", "training": {"optimizer": "adam", "batch_size": "all", "epochs": 3}},
    ],
    ids=["fedavg", "fedadam", "fedavgm"],
)
def test_the_same_job_gives_the_same_bytes_with_any_number_of_processes(changes: dict[str, Any]) -> None:
    spec = job_spec(**changes)
    test = points(300, seed=99)
    runs = [simulated(spec, some_clients(), test=test, processes=processes) for processes in (1, 2, 3)]

    for other in runs[1:]:
        assert other.digest == runs[0].digest
        for one, two in zip(runs[0].rounds, other.rounds, strict=True):
            assert (one.model_digest, one.metrics, one.sites, one.test) == (
                two.model_digest, two.metrics, two.sites, two.test,
            )  # fmt: skip
    assert simulated(spec.model_copy(update={"seed": "00" * 32}), some_clients()).digest != runs[0].digest


def test_the_order_in_which_clients_are_listed_does_not_matter() -> None:
    clients = some_clients()
    assert simulated(job_spec(), clients[::-1]).digest == simulated(job_spec(), clients).digest


def test_the_digest_is_that_of_the_model_s_file() -> None:
    simulation = simulated(job_spec(), some_clients())

    assert simulation.digest == hashlib.sha256(encode(simulation.model)).hexdigest()
    assert simulation.rounds[-1].model_digest == simulation.digest


def test_rounds_are_those_of_the_job() -> None:
    kinds = [(one.number, one.kind) for one in simulated(job_spec(), some_clients()).rounds]
    assert kinds == [
        (0, TaskKind.STATISTICS), (1, TaskKind.TRAIN), (2, TaskKind.TRAIN), (3, TaskKind.TRAIN), (4, TaskKind.EVALUATE),
    ]  # fmt: skip
    plain = job_spec(data={**job_spec().data.model_dump(), "standardize": "none"}, evaluation={"holdout": 0}, rounds=2)
    assert [one.number for one in simulated(plain, some_clients()).rounds] == [1, 2]


def test_a_cohort_is_drawn_for_every_round_and_all_evaluate_the_final_model() -> None:
    clients = some_clients(8)
    spec = job_spec(cohort={"min_updates": 2, "fraction": 0.5}, rounds=5)
    rounds = {one.number: one for one in simulated(spec, clients).rounds}

    keys = sorted(client.key for client in clients)
    for number in range(1, 6):
        seed = bytes.fromhex(cohort_seed(SEED, number))
        assert rounds[number].cohort == draw_cohort(keys, seed=seed, fraction=0.5, min_updates=2).chosen
        assert list(rounds[number].sites) == list(rounds[number].cohort)
    assert len({rounds[number].cohort for number in range(1, 6)}) > 1
    assert list(rounds[0].cohort) == list(rounds[6].cohort) == keys


def test_over_selection_asks_nobody_and_a_smaller_target_takes_those_drawn_first() -> None:
    clients = some_clients(8)
    plain = simulated(job_spec(cohort={"min_updates": 2, "fraction": 0.5}), clients)
    more = simulated(job_spec(cohort={"min_updates": 2, "fraction": 0.5, "over_selection": 3}), clients)
    fewer = simulated(job_spec(cohort={"min_updates": 2, "fraction": 0.5, "target_updates": 3}), clients)

    assert more.digest == plain.digest
    for one, two in zip(plain.rounds[1:-1], fewer.rounds[1:-1], strict=True):
        assert len(one.cohort) == 4
        assert len(two.cohort) == 3
        assert set(two.cohort) < set(one.cohort)


def test_updates_count_by_all_records_of_their_client_or_alike() -> None:
    """With `batch_size: all` and one epoch, FedSGD: a step of the mean is the mean of the steps."""
    clients = some_clients(2, rows=(40, 120))
    training = {"optimizer": {"sgd": {"lr": 0.5}}, "batch_size": "all"}
    moved = {}
    for weights in ("declared", "uniform"):
        spec = job_spec(training=training, strategy={"fedavg": {"weights": weights}}, rounds=1)
        both = simulated(spec, clients)
        alone = [_only(spec, clients, number) for number in range(2)]
        shares = (0.25, 0.75) if weights == "declared" else (0.5, 0.5)
        for name, array in both.model.items():
            expected = shares[0] * alone[0][name] + shares[1] * alone[1][name]
            assert array == pytest.approx(expected, rel=1e-6, abs=1e-7)
        moved[weights] = both.digest
    assert moved["declared"] != moved["uniform"]


def _only(spec: Any, clients: list[Client], number: int) -> dict[str, Any]:
    """The model after a round in which the other client's update was of no weight: by a mean of twice the same one."""
    from isthmus.torch import build, load_arrays, to_arrays
    from isthmus_worker.features import Examples, encode_inputs
    from isthmus_worker.parts import mark_holdout
    from isthmus_worker.simulation.clients import holdout_key_of
    from isthmus_worker.training import train

    whole = simulated(spec, clients, on_round=lambda one: one.number == 0)
    client = clients[number]
    marked = mark_holdout(client.table, spec, holdout_key_of(client, SEED))
    examples = Examples(encode_inputs(client.table, spec.data, whole.statistics), marked.targets).only(~marked.holdout)
    module = build(spec.model)
    load_arrays(module, whole.model)
    train(module, examples, spec.training, record_shape=(4,), seed=SEED, tell=lambda _share: None)
    return to_arrays(module)


def test_every_model_is_measured_on_the_test_set_once_it_is_made() -> None:
    test = points(5000, seed=50)
    rounds = simulated(job_spec(), some_clients(), test=test).rounds

    assert [one.test is not None for one in rounds] == [False, True, True, True, False]
    for one in rounds[1:-1]:
        assert one.test is not None
        assert set(one.test) == {"examples", "loss", "accuracy"}
        assert one.test["examples"] == 5000
    assert rounds[1].test is not None
    assert rounds[3].test is not None
    assert rounds[1].test["accuracy"] < rounds[3].test["accuracy"]
    assert rounds[3].test["accuracy"] > 0.8
    every_second = simulated(job_spec(), some_clients(), test=test, test_every=2).rounds
    assert [one.number for one in every_second if one.test is not None] == [2, 3]
    assert every_second[3].test == rounds[3].test


def test_the_area_under_the_curve_is_one_over_the_whole_test_set() -> None:
    data = {**job_spec().data.model_dump(), "classes": 2}
    model = {"layers": [{"linear": {"in": 4, "out": 2}}]}
    clients = [Client(f"c{number}", "points", points(40, number, classes=2)) for number in range(2)]
    spec = job_spec(data=data, model=model)

    last = simulated(spec, clients, test=points(5001, 9, classes=2)).rounds[3]

    assert last.test is not None
    assert set(last.test) == {"examples", "loss", "accuracy", "auc"}
    assert last.test["examples"] == 5001
    assert last.test["auc"] > 0.9


def test_regression_is_simulated_too() -> None:
    data = {"task": "regression", "features": ["a", "b", "c"], "target": "d", "standardize": "federated"}
    spec = job_spec(
        data=data,
        model={"layers": [{"linear": {"in": 3, "out": 1}}]},
        training={"optimizer": {"sgd": {"lr": 0.05}}, "loss": "mse"},
    )
    rounds = simulated(spec, some_clients(), test=points(100, 77)).rounds

    assert rounds[3].test is not None
    assert set(rounds[3].test) == {"examples", "loss"}
    assert rounds[4].metrics["holdout/loss"] < rounds[1].metrics["holdout/loss"]


POINTS = {
    "task": "classification", "features": ["a", "b", "c", "d"], "target": "kind", "classes": 3, "standardize": "none",
}  # fmt: skip
ORGANIZATION = {
    "data": POINTS, "rounds": 1, "evaluation": {"holdout": 0}, "strategy": {"fedavg": {"weights": "uniform"}},
}  # fmt: skip


@pytest.mark.parametrize(("where", "wanted"), [("local", 2.0 / 2**0.5), ("central", 0.5)])
def test_noise_is_fresh_and_of_the_size_that_the_job_says(where: str, wanted: float) -> None:
    """Of the mean of two: each site's own is twice the bound; the service's is the bound, once on the sum."""
    privacy = {"unit": "organization", "where": where, "clip_norm": 1e-3, "noise_multiplier": 50.0}
    spec = job_spec(**ORGANIZATION, privacy=privacy)
    start = simulated(job_spec(**ORGANIZATION), some_clients(2), on_round=lambda _one: True)
    before = draw_initial(spec.model, SEED)
    runs = [simulated(spec, some_clients(2)) for _ in range(6)]

    assert len({run.digest for run in runs}) == 6
    assert start.epsilon_spent() == {}
    moved = np.concatenate([(run.model[name] - before[name]).ravel() for run in runs for name in before])
    assert np.std(moved) == pytest.approx(0.05 * wanted, rel=0.25)
    for run in runs:
        for key, epsilon in run.epsilon_spent().items():
            plan = run.plans[key]
            assert plan is not None
            assert epsilon == pytest.approx(plan.epsilon)


def test_privacy_of_records_is_simulated_with_secret_coins_and_charged_for_each_client() -> None:
    ranged = [{"name": name, "range": [-10, 10]} for name in "abcd"]
    spec = job_spec(
        data={**POINTS, "features": ranged, "standardize": "federated"},
        privacy={"unit": "record", "clip_norm": 1.0, "epsilon": 8.0},
        evaluation={"holdout": 0.25, "release": "noised"},
    )
    clients = some_clients(rows=(400, 640, 520, 480))
    one, two = (simulated(spec, clients, test=points(300, seed=99)) for _ in range(2))

    assert one.digest != two.digest
    assert one.statistics != two.statistics
    epsilons = one.epsilon_spent()
    assert set(epsilons) == {client.key for client in clients}
    for key, epsilon in epsilons.items():
        plan = one.plans[key]
        assert plan is not None
        assert epsilon == pytest.approx(plan.epsilon)
        assert 7.0 < epsilon <= 8.0
    assert one.rounds[-2].test is not None
    assert one.rounds[-2].test["accuracy"] > 0.5
    stopped = simulated(spec, clients, on_round=lambda done: done.number == 1)
    assert max(stopped.epsilon_spent().values()) < min(epsilons.values())


def test_a_target_that_no_noise_reaches_is_refused_with_the_clients_name() -> None:
    privacy = {"unit": "record", "clip_norm": 1.0, "epsilon": 0.01, "delta": 1e-17}
    with pytest.raises(ClientsRefused, match="clinic-0/points: no noise reaches"):
        simulated(job_spec(data=POINTS, privacy=privacy), some_clients())


def test_it_ends_where_the_caller_has_enough() -> None:
    seen: list[int] = []

    def enough(one: Round) -> bool:
        seen.append(one.number)
        return one.number == 2

    simulation = simulated(job_spec(rounds=50), some_clients(), on_round=enough)
    assert seen == [0, 1, 2]
    assert [one.number for one in simulation.rounds] == seen
    assert simulation.digest == simulated(job_spec(rounds=2), some_clients()).digest


def test_tasks_are_counted_as_they_are_done() -> None:
    heard: list[tuple[int, int]] = []
    spec = job_spec(rounds=1, evaluation={"holdout": 0})
    simulated(spec, some_clients(3), on_task=lambda done, of: heard.append((done, of)))
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_a_job_without_a_seed_gets_one_with_which_it_can_be_repeated() -> None:
    one = simulated(job_spec(seed=None), some_clients())

    assert one.spec.seed is not None
    assert simulated(one.spec, some_clients()).digest == one.digest
    assert simulated(job_spec(seed=None), some_clients()).digest != one.digest


def test_an_initial_model_may_be_given() -> None:
    start = simulated(job_spec(), some_clients(), on_round=lambda one: one.number == 0).model
    given = {name: array + 1 for name, array in start.items()}

    assert simulated(job_spec(), some_clients(), initial=start).digest == simulated(job_spec(), some_clients()).digest
    assert simulated(job_spec(), some_clients(), initial=given).digest != simulated(job_spec(), some_clients()).digest
    with pytest.raises(SimulationFailed, match="initial model does not fit"):
        simulated(job_spec(), some_clients(), initial={"0.weight": start["0.weight"]})


def test_an_entry_point_s_model_is_made_anew_for_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may keep what it likes; a worker makes it anew as well."""
    (tmp_path / "own_models.py").write_text(
        "import torch\n"
        "class Greedy(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.line = torch.nn.Linear(4, 3)\n"
        "        self.calls = 0\n"
        "    def forward(self, x):\n"
        "        self.calls += 1\n"
        "        x.clamp_(-2, 2)\n"
        "        return self.line(x) * self.calls\n"
        "def make():\n"
        "    return Greedy()\n"
    )
    monkeypatch.setenv("PYTHONPATH", searched(tmp_path))
    spec = job_spec(model={"entry_point": "own_models:make"})
    initial = {"line.weight": np.zeros((3, 4), np.float32), "line.bias": np.zeros(3, np.float32)}

    digests = {simulate(spec, some_clients(), initial=initial, processes=processes).digest for processes in (1, 2, 3)}

    assert len(digests) == 1
    with pytest.raises(SimulationFailed, match="initial weights must be given"):
        simulated(spec, some_clients())


# --- What cannot be done ---------------------------------------------------------------------------------------------


def test_diverging_training_is_told_with_the_round_and_the_client() -> None:
    spec = job_spec(
        data={**job_spec().data.model_dump(), "standardize": "none"},
    )
    clients = [*some_clients(2), Client("wild", "points", _huge())]

    with pytest.raises(SimulationFailed, match=r"Round \d+, wild/points: .*diverged"):
        simulated(spec.model_copy(update={"seed": SEED}), clients)


def _huge() -> Any:
    table = points(40, 5)
    for name in "abcd":
        np.asarray(table.columns[name])[:] *= 1e18
    return table


def test_records_that_do_not_fit_are_told_with_whose_they_are() -> None:
    clients = some_clients()
    wrong = points(40, 3)
    np.asarray(wrong.columns["kind"])[7] = 3

    with pytest.raises(SimulationFailed, match=r"clinic-9/points: The target 'kind' .*\(records: 1\)"):
        simulated(job_spec(), [*clients, Client("clinic-9", "points", wrong)])
    with pytest.raises(SimulationFailed, match=r"The test set: .*kind"):
        simulated(job_spec(), clients, test=wrong)


def test_one_class_alone_is_refused_as_a_worker_refuses_it() -> None:
    with pytest.raises(SimulationFailed, match=r"Round 1, dull/points: .*nothing to tell apart"):
        simulated(job_spec(), [*some_clients(), Client("dull", "points", points(40, 3, classes=1))])


def test_too_few_clients_are_refused() -> None:
    with pytest.raises(SimulationFailed, match=r"need 3 clients \(cohort.min_updates\); there are 2"):
        simulated(job_spec(cohort={"min_updates": 3}), some_clients(2))


def test_two_clients_of_one_name_are_refused() -> None:
    with pytest.raises(ClientsRefused, match="same organization"):
        simulated(job_spec(), [*some_clients(2), *some_clients(1)])


def test_a_process_that_is_killed_ends_the_simulation_with_a_sentence() -> None:
    with Pool(2) as pool:

        def kill(_done: int, _of: int) -> None:
            os.kill(pool.pid, signal.SIGKILL)

        with pytest.raises(SimulationFailed, match="A process of the simulation ended"):
            simulate(job_spec(rounds=100), some_clients(), pool=pool, on_task=kill)


@glibc
def test_what_a_batch_needed_is_used_again_by_the_next() -> None:
    wide = {"layers": [{"linear": {"in": 4, "out": 100_000}}, "relu", {"linear": {"in": 100_000, "out": 3}}]}
    training = {"optimizer": {"sgd": {"lr": 1e-4}}, "batch_size": "all", "epochs": 100}
    found = []
    with Pool(2) as pool:

        def count(_one: Round) -> None:
            found.append(sum(map(page_faults, below(pool.pid) | {pool.pid})))

        simulate(job_spec(model=wide, training=training, rounds=4), some_clients(2), pool=pool, on_round=count)

    pages_a_batch = (30 + 39) * 100_000 * 4 // 4096  # of one of some ten tensors
    assert found[4] - found[1] < 30 * pages_a_batch


# --- Processes -------------------------------------------------------------------------------------------------------

ENDLESS = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore it
from isthmus_worker.simulation.clients import Client
from isthmus_worker.simulation.engine import simulate
from tests.worker.simulation.cases import job_spec, points, some_clients

spec = job_spec(training={"optimizer": {"sgd": {"lr": 1e-9}}, "epochs": 10_000, "batch_size": 1})
clients = [*some_clients(3), Client("long", "points", points(20_000))]
print("begin", flush=True)
simulate(spec, clients, processes=3, on_round=lambda one: print("round", one.number, flush=True))
"""


def until(what: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.02)


def below(pid: int) -> set[int]:
    """The living descendants of a process."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:  # it ended
            continue
        state, parent = text.rpartition(")")[2].split()[:2]
        if state != "Z":
            parents[int(status.parent.name)] = int(parent)
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def gone(pids: set[int]) -> bool:
    alive = set()
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        if text.rpartition(")")[2].split()[0] != "Z":
            alive.add(pid)
    return not alive


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind_however_it_is_ended(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": searched()},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    children = set[int]()
    try:
        until(lambda: process.stdout.readline() == "round 0\n", "the records were prepared")  # type: ignore[union-attr]
        children = below(process.pid)
        assert len(children) == 3
        process.send_signal(how)
        assert process.wait(PATIENCE_S) != 0
        until(lambda: gone(children), "the processes ended")
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
        for pid in children:
            if not gone({pid}):
                os.kill(pid, signal.SIGKILL)
