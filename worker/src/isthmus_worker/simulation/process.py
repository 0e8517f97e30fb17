"""A process of a simulation: takes an order, trains or measures, writes the update into its place, answers.

The first process is started by `isthmus_worker.simulation.pool`; when it has imported torch it makes the others, as
copies of itself: torch is imported once, and its pages are shared. A process ends when nobody holds the other end of
its socket any more, whatever it is doing.
"""

import gc
import os
import queue
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from numpy.typing import NDArray
from torch import nn

from isthmus.allocator import LARGEST_BYTES, keep_freed
from isthmus.federation.secured import quantise
from isthmus.torch import build, draw_initial, load_arrays
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.secured import MASKED
from isthmus_worker.determinism import settle
from isthmus_worker.features import Examples
from isthmus_worker.modules import module_of
from isthmus_worker.parts import Split
from isthmus_worker.refusals import DataRefused, ModelRefused, WorkBroken
from isthmus_worker.simulation.messages import (
    ORDERS,
    Answer,
    Begin,
    Draw,
    Evaluate,
    ExamplesAt,
    Failed,
    Finished,
    Order,
    Test,
    Train,
)
from isthmus_worker.simulation.regions import Region, array_at, arrays_at
from isthmus_worker.work import Arrays, Leaving, holdout_measures, local_update

_KEPT_BYTES: Final = 256 << 20
"""What a batch needs stays for the next one, up to so much in each process."""


class Bench:
    """Where one process does its work. What it keeps between tasks is the records and an empty shell of the model."""

    def __init__(self, begin: Begin, records: Region, model: Region, slots: Region) -> None:
        self._spec, self._manifest = begin.spec, begin.manifest
        memory = records.map(writable=False)

        def examples(at: ExamplesAt) -> Examples:
            return Examples(inputs=array_at(memory, at.inputs), targets=array_at(memory, at.targets))

        self._clients = [Split(examples(client.training), examples(client.holdout)) for client in begin.clients]
        self._plans = begin.plans
        self._test = [examples(piece) for piece in begin.test]
        self._model = arrays_at(model.map(writable=False), begin.model)
        self._model_region, self._model_places = model, begin.model
        written = slots.map(writable=True)
        self._slots = [arrays_at(written, places) for places in begin.slots]
        self._shell: nn.Module | None = None

    def perform(self, order: Order) -> Finished:
        """Do what is asked.

        Raises:
            DataRefused, ModelRefused, WorkBroken: it cannot be done.
        """
        match order:
            case Draw():
                assert self._spec.seed is not None, "a simulation's job has a seed"
                written = arrays_at(self._model_region.map(writable=True), self._model_places)
                for name, array in draw_initial(self._spec.model, self._spec.seed).items():
                    written[name][...] = array
                return Finished()
            case Train():
                settle(order.seed, self._spec.training.threads)
                update, measures = local_update(
                    self._loaded(),
                    self._model,
                    self._clients[order.client],
                    self._spec,
                    plan=self._plans[order.client],
                    manifest=self._manifest,
                    round_number=order.round_number,
                    seed=order.seed,
                    tell=_to_nobody,
                    leaving=_numbers_by(order.weight_share) if self._spec.secure_aggregation is not None else None,
                )
                for name, array in self._slots[order.slot].items():
                    array[...] = update[name]
                return Finished(metrics=measures.local)  # the records are the user's own
            case Evaluate():
                settle(order.seed, self._spec.training.threads)
                held, plan = self._clients[order.client].holdout, self._plans[order.client]
                return Finished(metrics=holdout_measures(self._loaded(), held, self._spec, plan, _to_nobody).local)
            case Test():
                settle(order.seed, self._spec.training.threads)
                piece = self._test[order.piece]
                return Finished(metrics=holdout_measures(self._loaded(), piece, self._spec, None, _to_nobody).local)
            case _:
                raise AssertionError("to begin is no task")

    def _loaded(self) -> nn.Module:
        """A module that holds the round's model and nothing of an earlier task.

        All state of a declared model is in its tensors, and all of them are written here: its shell is used again. An
        entry point's module may keep anything, so that it is made anew for every task, as a worker does.
        """
        if self._spec.model.entry_point is not None:
            module = module_of(self._spec.model, (self._spec.model.entry_point,))
        else:
            module = self._shell = self._shell or build(self._spec.model)
            module.zero_grad(set_to_none=True)
        load_arrays(module, self._model)
        return module


def _numbers_by(weight_share: float) -> Leaving:
    """What is left of an update in a secured job: the whole numbers that a worker would mask."""

    def numbers(update: Mapping[str, NDArray[Any]], spec: JobSpec, plan: PrivacyPlan | None) -> Arrays:
        return {MASKED: quantise(update, spec, plan, weight_share)}

    return numbers


def _to_nobody(_progress: float) -> None:
    """Progress within a task is not shown."""


def answer_to(order: Order, bench: Bench) -> Answer:
    """Do what is asked; whatever goes wrong becomes an answer."""
    try:
        return bench.perform(order)
    except (DataRefused, ModelRefused, WorkBroken) as refusal:
        return Failed(reason=refusal.told(counts=True))
    except Exception as error:  # a bug, ours or an entry point's; the records are the user's own, so it may be quoted
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Failed(reason=f"an unexpected {type(error).__name__} at {where.filename}:{where.lineno}: {error}")


def serve(line: socket.socket, regions: tuple[Region, Region, Region], on_end: Callable[[], None]) -> None:
    """Take orders from `line` until its other end is closed; then call `on_end` and end the process."""
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()

    def listen() -> None:
        with suppress(OSError), line.makefile("rb") as incoming:
            for text in incoming:
                orders.put(ORDERS.validate_json(text))
        on_end()
        os._exit(0)

    threading.Thread(target=listen, daemon=True, name="orders").start()
    bench: Bench | None = None
    while True:
        order = orders.get()
        answer: Answer
        if isinstance(order, Begin):
            bench, answer = Bench(order, *regions), Finished()
        else:
            assert bench is not None, "begin comes first"
            answer = answer_to(order, bench)
        line.sendall(answer.model_dump_json().encode() + b"\n")


def main() -> None:
    """`python -m isthmus_worker.simulation.process RECORDS MODEL SLOTS LINE...`: descriptors, one LINE a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of whoever started us
    os.dup2(2, 1)  # what a model prints belongs to neither a table nor JSON
    # The records are mapped so that nothing can write to them; torch would like to be able to.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
    settle("00" * 32, threads=1)
    keep_freed(blocks_bytes=LARGEST_BYTES, at_most_bytes=_KEPT_BYTES)
    descriptors = [int(argument) for argument in sys.argv[1:]]
    records, model, slots = (Region(descriptor) for descriptor in descriptors[:3])
    lines = [socket.socket(fileno=descriptor) for descriptor in descriptors[3:]]
    gc.collect()
    gc.freeze()  # pages that a collection would write to stay shared
    copies = []
    for line in lines[1:]:
        if (copy := os.fork()) == 0:
            for other in lines:
                if other is not line:
                    other.close()
            serve(line, (records, model, slots), lambda: None)
        copies.append(copy)
        line.close()

    def see_them_end() -> None:
        for copy in copies:
            with suppress(ChildProcessError):
                os.waitpid(copy, 0)

    serve(lines[0], (records, model, slots), see_them_end)


if __name__ == "__main__":
    main()
