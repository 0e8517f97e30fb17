"""The sum of a round: its bandwidth beside NumPy's `a += b`, and its memory.

The fold is the service's own: fixed order, float64 sums, declared weights, updates read from files in the page cache.
Its bandwidth counts the bytes of the updates. The next model's file (write, SHA-256, fsync) is timed apart: once with
a sink that drops what it is given, once as the service does it. Each row is a process of its own, bound to so many
cores, in which `a += b` (float32 arrays larger than the cache) is measured in turn with the fold.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.federation import ending_on_signals
from benchmarks.processes import forget_peak, peak_mb, resident_mb
from benchmarks.tables import Report, Spread, arguments, numbers

DISTINCT: Final = 10
"""Files that differ; more updates than that are the same files again, opened once for each update."""
ARRAY_ELEMENTS: Final = 25_000_000
SETTLING_S: Final = 0.2


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("aggregation", __doc__)
    parser.add_argument("--size", type=float, default=100.0, help="MB of 10^6 bytes of a model (default: %(default)s)")
    parser.add_argument("--large", type=float, default=1000.0, help="MB of a model whose memory alone is of interest")
    parser.add_argument("--updates", default="10,100", help="numbers of updates (default: %(default)s)")
    parser.add_argument("--cores", default="1,2", help="numbers of cores (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="samples of each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the files are kept meanwhile (default: the system's own)")
    options = parser.parse_args()
    report = Report(
        "aggregation",
        "Fold of the updates, without its output",
        ["model MB", "updates", "cores", "threads", "fold GB/s", "a += b GB/s", "x a += b"],
    )
    with ending_on_signals():
        folder = Path(tempfile.mkdtemp(prefix="isthmus-benchmark-", dir=options.folder))
        try:
            rows = _measured(folder, options)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    for size, updates, cores, found in rows:
        if found["fold"]:
            fold, add = Spread.of(found["fold"]), Spread.of(found["add"])
            report.row(size, updates, cores, found["threads"], fold, add, fold.median / add.median)
    report.section(
        "The whole: fold, write, SHA-256, fsync",
        ["model MB", "updates", "cores", "s", "of it output s", "idle MB", "peak MB above idle"],
    )
    for size, updates, cores, found in rows:
        whole = Spread.of(found["whole"])
        folded_s = size * updates / 1000 / Spread.of(found["fold"]).median if found["fold"] else None
        output_s = None if folded_s is None else whole.median - folded_s
        report.row(size, updates, cores, whole, output_s, found["idle_mb"], found["peak_mb"] - found["idle_mb"])
    report.note(f"Up to {DISTINCT} updates differ; beyond that the same files are opened again.")
    report.note(f"The updates of {options.large:g} MB hold zeros, in a file without blocks: for memory only.")
    report.finish(options.json)


def _measured(folder: Path, options: Any) -> list[tuple[float, int, int, dict[str, Any]]]:
    elements = int(options.size * 250_000)
    files = [folder / f"{options.size:g}-{number}" for number in range(DISTINCT + 1)]
    _in_a_process(_make, files, elements)
    rows = []
    for updates in map(int, numbers(options.updates)):
        for cores in map(int, numbers(options.cores)):
            job = (files, updates, options.repetitions, folder / "next")
            rows.append((options.size, updates, cores, _in_a_process(_work, *job, cores=cores)))
            print(f"{updates} updates on {cores} cores: done", file=sys.stderr, flush=True)
    if options.large:
        sparse = folder / "large"
        _in_a_process(_make_sparse, sparse, int(options.large * 250_000))
        cores = max(map(int, numbers(options.cores)))
        rows.append((options.large, 10, cores, _in_a_process(_work, [sparse], 10, 0, folder / "next", cores=cores)))
    return rows


def _in_a_process(call: Callable[..., Any], *given: Any, cores: int | None = None) -> Any:
    """What `call` answers in a new process: its memory is its own, and it is bound to so many cores from its start."""
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_cores)[:cores])
    try:
        return _from_a_process(call, given)
    finally:
        os.sched_setaffinity(0, all_cores)


def _from_a_process(call: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    start = multiprocessing.get_context("spawn")
    here, there = start.Pipe()
    process = start.Process(target=_answer, args=(there, call, given), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join(5)
        process.kill()


def _answer(pipe: Connection, call: Callable[..., Any], given: tuple[Any, ...]) -> None:
    pipe.send(call(*given))


def _make(files: list[Path], elements: int) -> None:
    """The model and the updates: two tensors each, so that blocks end within and at the end of a tensor."""
    from isthmus.codec import arrays  # noqa: PLC0415

    for number, path in enumerate(files):
        values = np.random.default_rng(number).standard_normal(elements, dtype=np.float32)
        arrays.write(path, {"a": values[: elements // 3], "b": values[elements // 3 :]})


def _make_sparse(path: Path, elements: int) -> None:
    from isthmus.codec.header import TensorPlace, encode_header, layout  # noqa: PLC0415
    from isthmus.wire.manifest import DType  # noqa: PLC0415

    head = encode_header(layout({"a": TensorPlace(DType.F32, (elements,), 0, 0)}), None)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 4 * elements)


def _work(files: list[Path], updates: int, repetitions: int, target: Path) -> dict[str, Any]:
    """Sum `updates` of the files but the first, which is the model (or all of one file, if there is but one)."""
    from app.allocator import keep_buffers  # noqa: PLC0415
    from app.rounds.aggregation import BLOCK_ELEMENTS, FOLD_THREADS, write_aggregate  # noqa: PLC0415
    from isthmus.codec.blocks import TensorFile  # noqa: PLC0415
    from isthmus.codec.header import manifest_of  # noqa: PLC0415
    from isthmus.federation.aggregation import aggregate  # noqa: PLC0415
    from isthmus.federation.strategies import FedAvg  # noqa: PLC0415

    keep_buffers()
    with TensorFile(files[0]) as model:
        manifest = manifest_of(model.header)
    inputs = [(files[1:] or files)[number % max(1, len(files) - 1)] for number in range(updates)]
    weights = [100.0 + number for number in range(updates)]
    source_bytes = sum(path.stat().st_size for path in inputs)

    def whole() -> float:
        drafts = (target, target.with_suffix(".state"))
        target.unlink(missing_ok=True)
        return _seconds(lambda: write_aggregate(manifest, FedAvg(), files[0], None, inputs, weights, drafts))

    def fold() -> float:
        opened = [TensorFile(path) for path in inputs]
        with TensorFile(files[0]) as model:
            seconds = _seconds(
                lambda: aggregate(
                    manifest, model, opened, weights, FedAvg(), sink=_Dropped(),
                    block_elements=BLOCK_ELEMENTS, threads=FOLD_THREADS,
                )
            )  # fmt: skip
        for file in opened:
            file.close()
        return source_bytes / seconds / 1e9

    time.sleep(SETTLING_S)
    idle_mb = resident_mb(os.getpid())
    forget_peak(os.getpid())
    first = whole()
    found: dict[str, Any] = {"idle_mb": idle_mb, "peak_mb": peak_mb(os.getpid()), "threads": FOLD_THREADS}
    if not repetitions:
        return {**found, "whole": [first], "fold": [], "add": []}
    a, b = (np.random.default_rng(number).standard_normal(ARRAY_ELEMENTS, dtype=np.float32) for number in (0, 1))
    found |= {"whole": [], "fold": [], "add": []}
    for _ in range(repetitions):
        found["add"].append(b.nbytes * updates / _seconds(lambda: [a.__iadd__(b) for _ in range(updates)]) / 1e9)
        found["fold"].append(fold())
        found["whole"].append(whole())
    return found


class _Dropped:
    """A sink that keeps nothing."""

    def write_block(self, name: str, start: int, block: NDArray[Any]) -> None:
        """Nothing."""


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
