"""The rounds of a simulated job: the service's decisions and sums here, the worker's training in the pool's processes.

A job without noise gives the same final checkpoint, byte for byte, as a federation of a service and workers that hold
the same datasets under the same names, with the same job seed and hold-out keys. What a federation has and this has
not: time. Nobody is late, so that nothing is asked of more clients than a round needs (`over_selection`), and of those
that were asked none is left behind: where `target_updates` is smaller than the cohort, those that were drawn first
take part.
"""

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from isthmus.codec.arrays import encode, manifest_of, types_of
from isthmus.codec.errors import CodecError
from isthmus.codec.header import Header, check_manifest
from isthmus.federation.aggregation import MemorySink, MemorySource, NonFiniteAggregate, aggregate
from isthmus.federation.central import aggregate_noised
from isthmus.federation.cohort import (
    ParticipationKey,
    TooFewParticipations,
    canonical_order,
    draw_cohort,
    round_seed,
)
from isthmus.federation.rounds import cohort_seed, draw_round, number_after, pool_metrics, weight_of
from isthmus.federation.secured import aggregate_sum
from isthmus.federation.strategies import state_manifest, strategy_of
from isthmus.privacy.keystream import KEY_BYTES
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import Manifest
from isthmus.wire.privacy import NoisePlace
from isthmus.wire.rounds import TaskKind, kind_of_round
from isthmus_worker.data import Table
from isthmus_worker.simulation.clients import Client, ClientsRefused, require_disjoint
from isthmus_worker.simulation.messages import Begin, Draw, Evaluate, Order, Test, Train
from isthmus_worker.simulation.pool import Pool, ProcessEnded, TaskFailed
from isthmus_worker.simulation.privacy import Plans, plans_of, spent
from isthmus_worker.simulation.records import RecordsRefused, prepare
from isthmus_worker.simulation.regions import Layout, arrays_at
from isthmus_worker.simulation.secured import require_hideable, shares_of, slot_manifest, sum_of

Arrays = dict[str, NDArray[Any]]


class SimulationFailed(Exception):
    """The simulation cannot go on. The message names the round and the client, and says why."""


@dataclass(frozen=True)
class Round:
    """One pass, as it ended.

    Attributes:
        number: 0 gathers statistics; 1 to `spec.rounds` train; one more evaluates the final model.
        cohort: who took part, in canonical order.
        metrics: over the cohort, as the service pools them: `holdout/...` is of the model that the round started
            from, `train/...` of the local training.
        sites: each client's own, in the same order.
        test: `examples`, `loss`, `accuracy` (and `auc`) on the test set of the model that the round ended with; None
            where it was not measured.
        model_digest: SHA-256 of the safetensors file of that model.
        seconds: how long the round took.
    """

    number: int
    kind: TaskKind
    cohort: tuple[ParticipationKey, ...]
    metrics: dict[str, float]
    sites: dict[ParticipationKey, dict[str, float]]
    test: dict[str, float] | None
    model_digest: str
    seconds: float


@dataclass(frozen=True)
class Simulation:
    """What a simulation came to.

    Attributes:
        spec: the job, with its seed.
        rounds: all that were done.
        model: the newest checkpoint; the arrays are the caller's.
        digest: SHA-256 of its safetensors file.
        manifest: the model's.
        statistics: what `standardize: federated` found.
        plans: what the job's privacy section became at each client.
    """

    spec: JobSpec
    rounds: list[Round]
    model: Arrays
    digest: str
    manifest: Manifest
    statistics: FeatureStatistics | None
    plans: Plans

    def epsilon_spent(self) -> dict[ParticipationKey, float]:
        """What each client's releases add up to, at the job's delta; empty without a privacy unit."""
        rounds = [(one.number, one.cohort) for one in self.rounds]
        return spent(self.spec, self.plans, rounds, self.manifest)


def simulate(
    spec: JobSpec,
    clients: Sequence[Client],
    *,
    test: Table | None = None,
    processes: int = 2,
    initial: Mapping[str, NDArray[Any]] | None = None,
    test_every: int = 1,
    on_round: Callable[[Round], bool | None] | None = None,
    on_task: Callable[[int, int], None] | None = None,
    pool: Pool | None = None,
) -> Simulation:
    """Run a job over clients in this machine's processes.

    Args:
        spec: the job. Without a seed it gets one, which the result names.
        clients: who takes part, in any order. Not modified.
        test: records that no client holds, measured with every model that a training round ends with.
        processes: how many train at once. The result does not depend on it.
        initial: the initial model; None: drawn from the job's seed, as `isthmus job submit` does. Not modified.
        test_every: measure on `test` after every so many training rounds, and after the last.
        on_round: called after every round; where it returns True the simulation ends there.
        on_task: called with the tasks of the present round that are done, and how many it has.
        pool: processes that are there already, instead of `processes` new ones; they are left to the caller, and can
            run one simulation after another.

    Raises:
        ClientsRefused: a client is there twice, or holds records of the test set, or no noise reaches the job's
            privacy target there.
        SimulationFailed: too few clients, records or an initial model that do not fit, training that diverged, a
            process that ended.

    Guarantees:
        The same spec, clients and initial model give the same checkpoints, unless the job has a privacy unit: noise
        and coins are secret then, as in a federation, and no two runs are alike.
    """
    with nullcontext(pool) if pool is not None else Pool(processes) as running:
        if spec.seed is None:
            spec = spec.model_copy(update={"seed": secrets.token_hex(32)})
        try:
            conduct = _Conduct(spec, clients, test, initial, running, on_task)
            return conduct.run(on_round, test_every)
        except (RecordsRefused, ProcessEnded) as error:
            raise SimulationFailed(str(error)) from error


class _Conduct:
    """One run, from the records to the last round."""

    def __init__(
        self,
        spec: JobSpec,
        clients: Sequence[Client],
        test: Table | None,
        initial: Mapping[str, NDArray[Any]] | None,
        pool: Pool,
        on_task: Callable[[int, int], None] | None,
    ) -> None:
        began = time.perf_counter()
        self._spec, self._pool, self._on_task = spec, pool, on_task
        by_key = {client.key: client for client in clients}
        if len(by_key) < len(clients):
            raise ClientsRefused("Two clients have the same organization and the same dataset.")
        self._keys = canonical_order(by_key)
        self._places = {key: place for place, key in enumerate(self._keys)}
        self._rows = {key: by_key[key].table.rows for key in self._keys}
        if test is not None:
            require_disjoint(clients, test)
        slots = len(self._cohort(1))
        if spec.secure_aggregation is not None:
            require_hideable(self._keys, slots)
        manifest = self._manifest = _manifest_of_job(spec, initial)
        self._plans = plans_of(spec, self._rows, manifest)
        prepared = prepare(spec, [by_key[key] for key in self._keys], self._plans, test, pool.records)
        self._statistics = prepared.statistics
        self._pieces = len(prepared.test)
        self._busiest = sorted(self._keys, key=lambda key: (-self._rows[key], key))

        layout = Layout()
        model_places = layout.add_all(manifest)
        pool.model.make_room(layout.size)
        layout = Layout()
        slot_places = [layout.add_all(slot_manifest(spec, manifest)) for _ in range(slots)]
        pool.slots.make_room(layout.size)
        self._model = arrays_at(pool.model.map(writable=True), model_places)
        updates = pool.slots.map(writable=False)
        self._updates = [MemorySource(arrays_at(updates, places)) for places in slot_places]
        self._next = MemorySink(manifest.tensors)
        self._state: MemorySource | None = None
        pool.begin(
            Begin(
                spec=spec,
                manifest=manifest,
                clients=prepared.clients,
                plans=[self._plans[key] for key in self._keys],
                test=prepared.test,
                model=model_places,
                slots=slot_places,
            )
        )
        if initial is None:
            pool.perform([Draw()])
        else:
            for name, array in self._model.items():
                array[...] = initial[name]
        self._digest = _digest_of(self._model)
        self._prepared_s = time.perf_counter() - began

    def run(self, on_round: Callable[[Round], bool | None] | None, test_every: int) -> Simulation:
        """All rounds, until the last or until `on_round` has enough."""
        rounds: list[Round] = []
        number = number_after(self._spec, None)
        while number is not None:
            rounds.append(self._round(number, test_every))
            if on_round is not None and on_round(rounds[-1]):
                break
            number = number_after(self._spec, number)
        model = {name: array.copy() for name, array in self._model.items()}
        return Simulation(self._spec, rounds, model, self._digest, self._manifest, self._statistics, self._plans)

    def _round(self, number: int, test_every: int) -> Round:
        kind = kind_of_round(number, self._spec.rounds)
        if kind is TaskKind.STATISTICS:  # they were found while the records were read
            return Round(number, kind, tuple(self._cohort(0)), {}, {}, None, self._digest, self._prepared_s)
        began = time.perf_counter()
        cohort = self._cohort(number)
        test = None
        if kind is TaskKind.TRAIN:
            sites = self._train(number, cohort)
            self._step(number, cohort)
            if self._pieces and (number % test_every == 0 or number == self._spec.rounds):
                test = self._measure_test(number)
        else:
            orders = {key: Evaluate(client=self._places[key], seed=self._seed(number, key)) for key in cohort}
            sites = self._perform(number, orders)
        metrics = self._pooled(number, [sites[key] for key in cohort])
        return Round(number, kind, tuple(cohort), metrics, sites, test, self._digest, time.perf_counter() - began)

    def _cohort(self, number: int) -> list[ParticipationKey]:
        """Who takes part, in canonical order: as many as the round needs, and of those that were drawn the first."""
        assert self._spec.seed is not None, "it was given one"
        kind = kind_of_round(number, self._spec.rounds)
        seed = cohort_seed(self._spec.seed, number)
        try:
            drawn = draw_round(self._spec.cohort, kind, self._keys, seed)
        except TooFewParticipations:
            raise SimulationFailed(
                f"The job's rounds need {self._spec.cohort.min_updates} clients (cohort.min_updates); "
                f"there are {len(self._keys)}."
            ) from None
        if len(drawn.chosen) > drawn.target_updates:
            least = 1 / len(self._keys)
            drawn = draw_cohort(self._keys, seed=bytes.fromhex(seed), fraction=least, min_updates=drawn.target_updates)
        return list(drawn.chosen)

    def _seed(self, number: int, key: ParticipationKey) -> str:
        assert self._spec.seed is not None, "it was given one"
        return round_seed(self._spec.seed, number, *key)

    def _train(self, number: int, cohort: Sequence[ParticipationKey]) -> dict[ParticipationKey, dict[str, float]]:
        """Every client's update into the slot that is its place in the cohort; what they measured."""
        slots = {key: slot for slot, key in enumerate(cohort)}
        shares = dict(zip(cohort, shares_of(self._weights(cohort)), strict=True))
        orders = {
            key: Train(
                client=self._places[key],
                round_number=number,
                seed=self._seed(number, key),
                slot=slots[key],
                weight_share=shares[key],
            )
            for key in self._busiest
            if key in slots
        }
        return self._perform(number, orders)

    def _perform(
        self, number: int, orders: Mapping[ParticipationKey, Order]
    ) -> dict[ParticipationKey, dict[str, float]]:
        names = list(orders)

        def told(done: int) -> None:
            if self._on_task is not None:
                self._on_task(done, len(names))

        try:
            answers = self._pool.perform(list(orders.values()), told)
        except TaskFailed as failed:
            key = names[failed.task]
            raise SimulationFailed(f"Round {number}, {key.organization}/{key.dataset}: {failed}") from None
        found = {key: dict(answer.metrics) for key, answer in zip(names, answers, strict=True)}
        return {key: found[key] for key in canonical_order(found)}

    def _step(self, number: int, cohort: Sequence[ParticipationKey]) -> None:
        """The next model, as the service computes it."""
        strategy = strategy_of(self._spec.strategy)
        states = state_manifest(strategy, self._manifest)
        state_sink = MemorySink(states.tensors) if states is not None else None
        updates = self._updates[: len(cohort)]
        weights = self._weights(cohort)
        privacy, model = self._spec.privacy, MemorySource(self._model)
        plan = self._plans[cohort[0]]
        try:
            if self._spec.secure_aggregation is not None:
                shares, elements = shares_of(weights), self._manifest.averaged_elements
                aggregate_sum(
                    self._manifest,
                    model,
                    sum_of(updates, self._spec, plan, elements, shares),
                    self._spec,
                    plan,
                    math.fsum(shares),
                    strategy,
                    sink=self._next,
                    state=self._state,
                    state_sink=state_sink,
                )
            elif privacy.where is NoisePlace.CENTRAL and plan is not None:  # the same for all: rows have no part in it
                aggregate_noised(
                    self._manifest,
                    model,
                    updates,
                    strategy,
                    clip_norm=plan.clip_norm,
                    noise_multiplier=plan.noise_multiplier,
                    key=secrets.token_bytes(KEY_BYTES),
                    sink=self._next,
                    state=self._state,
                    state_sink=state_sink,
                )
            else:
                aggregate(
                    self._manifest,
                    model,
                    updates,
                    weights,
                    strategy,
                    sink=self._next,
                    state=self._state,
                    state_sink=state_sink,
                )
        except (NonFiniteAggregate, ValueError) as error:
            raise SimulationFailed(f"The updates of round {number} cannot be aggregated: {error}") from None
        for name, array in self._next.arrays.items():
            self._model[name][...] = array
        self._state = MemorySource(state_sink.arrays) if state_sink is not None else None
        self._digest = _digest_of(self._model)

    def _weights(self, cohort: Sequence[ParticipationKey]) -> list[float]:
        return [weight_of(self._spec.strategy, self._rows[key]) for key in cohort]

    def _measure_test(self, number: int) -> dict[str, float]:
        assert self._spec.seed is not None, "it was given one"
        seed = round_seed(self._spec.seed, number, "", "test set")
        try:
            found = self._pool.perform([Test(piece=piece, seed=seed) for piece in range(self._pieces)])
        except TaskFailed as failed:
            raise SimulationFailed(f"Round {number}, on the test set: {failed}") from None
        pooled = self._pooled(number, [dict(piece.metrics) for piece in found])
        return {name.removeprefix("holdout/"): value for name, value in pooled.items()}

    def _pooled(self, number: int, sites: Sequence[Mapping[str, float]]) -> dict[str, float]:
        try:
            return pool_metrics(sites)
        except ValueError as error:
            raise SimulationFailed(f"The measures of round {number} cannot be pooled: {error}.") from None


def _manifest_of_job(spec: JobSpec, initial: Mapping[str, NDArray[Any]] | None) -> Manifest:
    """The model's, as the service has it: of the declared layers, or else of the initial model that was given."""
    if spec.model.layers is None:
        if initial is None:
            raise SimulationFailed(
                f"The model is the entry point {spec.model.entry_point!r}: its initial weights must be given, "
                "as a safetensors file (--model FILE)."
            )
        return manifest_of(initial)
    manifest = spec.model.plan(spec.data.input_shape).manifest
    if initial is not None:
        try:
            check_manifest(Header(types_of(initial)), manifest)
        except CodecError as error:
            raise SimulationFailed(f"The initial model does not fit the job's: {error}") from None
    return manifest


def _digest_of(model: Mapping[str, NDArray[Any]]) -> str:
    return hashlib.sha256(encode(model)).hexdigest()
