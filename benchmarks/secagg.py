"""What secure aggregation costs, in process: masking, unmasking, and the messages between.

Real members, keys, shares and messages; only vectors' contents are made up. In the first table uploads lie in files, as
they do at a service, and the sum is compared with that of the plain vectors. Beside each time stands what the model
says: bytes of masks over the bandwidth at which one core makes and adds them, measured in the same run.
"""

import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.tables import Report, Spread, arguments, numbers
from isthmus.codec.blocks import TensorFile, TensorFileWriter
from isthmus.federation.aggregation import BlockSource, MemorySink, MemorySource
from isthmus.federation.secured import SUM, sum_tensors, unmask
from isthmus.secagg import client, server
from isthmus.secagg.context import context_of
from isthmus.secagg.derivation import Mask
from isthmus.secagg.masks import add_masks
from isthmus.secagg.parameters import threshold_of
from isthmus.secagg.roster import Member, Roster
from isthmus.wire.manifest import AggregationRule, DType, TensorSpec
from isthmus.wire.secured import MASKED, Step

HEADERS_BYTES: Final = 800
"""Of one request and its response together: an estimate, not measured."""
EXCHANGES: Final = 2 * len(Step)
"""Requests of a worker in a round: one a step, and one more that waited in vain: an estimate."""
T = TypeVar("T")


class Cohort:
    """A whole attempt but for the vectors: everybody sends keys and shares, then those with the last indices leave."""

    def __init__(self, members: int, left: int) -> None:
        """Play all steps, with the CPU seconds of each member's part of each."""
        self.members = members
        identities = [Ed25519PrivateKey.generate() for _ in range(members)]
        self.roster = Roster(
            Member(f"organization-{i:03}", "patients", identity.public_key().public_bytes_raw(), 1000 + i)
            for i, identity in enumerate(identities)
        )
        digest = self.roster.digest()
        context = context_of(
            round_id=UUID(int=1),
            spec_digest=digest,
            model_digest=digest,
            terms_digest=digest,
            roster_digest=digest,
            round_number=1,
            attempt=1,
        )
        everybody = tuple(range(members))
        survivors = self.survivors = everybody[: members - left]
        self.sent: dict[Step, int] = {}
        self.got: dict[Step, int] = {}
        self.cpu_s = dict.fromkeys(everybody, 0.0)
        """By member: of all its steps but masking."""
        secrets = [client.Secrets.draw() for _ in everybody]
        keys = self._each(everybody, lambda i: client.advertise(context, i, secrets[i], identities[i].sign))
        answer = server.keys_answer(self.roster, keys)
        self._count(Step.KEYS, keys[0], answer)
        keyed = self._each(everybody, lambda i: client.open_keys(context, digest, members, i, secrets[i], answer))
        shares = self._each(everybody, lambda i: client.share_out(context, i, secrets[i], keyed[i]))
        answers = {
            i: server.shares_answer(
                i, everybody, {j: server.ciphertext_for(shares[j], j, i, everybody) for j in everybody if j != i}
            )
            for i in everybody
        }
        self._count(Step.SHARES, shares[0], answers[0])
        shared = self._each(everybody, lambda i: client.open_shares(context, i, secrets[i], keyed[i], answers[i]))
        self.masks = self._each(survivors, lambda i: client.masks_of(context, i, secrets[i], keyed[i], shared[i]))
        self._count(Step.UPDATE, b"", server.survivors_answer(survivors))
        signed = self._each(survivors, lambda i: client.confirm(context, survivors, identities[i].sign))
        confirmed = server.confirmations_answer(signed)
        self._count(Step.SURVIVORS, signed[0], confirmed)
        self._each(survivors, lambda i: client.open_confirmations(context, self.roster, survivors, confirmed))
        reveals = self._each(survivors, lambda i: client.reveal(shared[i], survivors))
        self._count(Step.UNMASK, reveals[0], b"")
        answering = {i: reveals[i] for i in survivors[: threshold_of(members)]}
        began = time.thread_time()
        self.unmasking = server.reconstruct(context, self.roster, keys, everybody, survivors, answering)
        self.rebuild_s = time.thread_time() - began

    def _each(self, members: Sequence[int], act: Callable[[int], T]) -> dict[int, T]:
        found = {}
        for member in members:
            began = time.thread_time()
            found[member] = act(member)
            self.cpu_s[member] += time.thread_time() - began
        return found

    def _count(self, step: Step, message: bytes, answer: bytes) -> None:
        self.sent[step], self.got[step] = len(message), len(answer)


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("secagg", __doc__)
    parser.add_argument("--members", default="3,10,50,100,200", help="of the table of costs (default: %(default)s)")
    parser.add_argument("--elements", default="1e4,1e5,1e6,1e7", help="of the table of costs (default: %(default)s)")
    parser.add_argument(
        "--most-gb",
        type=float,
        default=40.0,
        help="of masks that one measurement may make; beyond it only the model is asked (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="that unmask")
    options = parser.parse_args()
    report = Report(
        "secagg",
        "Whole rounds, with the sum checked bit for bit",
        [
            "members",
            "parameters",
            "left after their shares",
            "masking s",
            "asked below s",
            "rebuilding s",
            "unmasking s",
            "of CPU",
            "asked below s ",
            "memory MiB",
            "uploads MiB",
        ],
    )
    for members, elements, left, masking_s, unmasking_s in (
        (100, 1_000_000, 17, 0.15, 2.0),
        (10, 10_000_000, 0, 0.6, None),
    ):
        _whole_round(report, members, elements, left, masking_s, unmasking_s, options.threads)
    _costs(report, numbers(options.members), numbers(options.elements), options.most_gb, options.threads)
    report.note("Masking: thread CPU seconds of one member's vector, over all members; the vector is in memory.")
    report.note(
        f"Unmasking: wall seconds with {options.threads} threads, from the files to the sum; rebuilding is CPU."
    )
    report.note(
        "Memory: what unmasking added to the process's largest size; uploads: the size of their files together."
    )
    report.note("CPU of the steps: one member's keys, shares, checks and signatures, all but the masks; the mean.")
    report.note(
        f"Bytes are of the very messages with organizations of 16 letters; the headers are an estimate: {EXCHANGES} "
        f"requests, of which half wait in vain, of {HEADERS_BYTES} bytes with their responses."
    )
    report.finish(options.json)


def _whole_round(
    report: Report,
    members: int,
    elements: int,
    left: int,
    asked_masking_s: float,
    asked_unmasking_s: float | None,
    threads: int,
) -> None:
    cohort = Cohort(members, left)
    generator = np.random.default_rng(0)
    words = {MASKED: TensorSpec(dtype=DType.U32, shape=(elements,), rule=AggregationRule.KEEP)}
    expected = np.zeros(elements, np.uint32)
    masking = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sources: list[BlockSource] = []
        for member in cohort.survivors:
            vector = generator.integers(0, 1 << 32, elements, np.uint32)
            np.add(expected, vector, out=expected)
            masking.append(_cpu_seconds(partial(add_masks, vector, 0, cohort.masks[member])))
            path = Path(folder) / f"{member}.safetensors"
            with TensorFileWriter(path, words, durable=False) as writer:
                writer.write_block(MASKED, 0, vector)
            sources.append(stack.enter_context(TensorFile(path)))
        sink = MemorySink(sum_tensors(elements))
        before = _largest_mib()
        wall_s, cpu_s = _unmasking_seconds(sources, cohort.unmasking, elements, sink, threads)
        added = _largest_mib() - before
        if not np.array_equal(sink.arrays[SUM].view(np.uint32), expected):
            raise RuntimeError("the unmasked sum is not that of the vectors")
    report.row(
        members,
        elements,
        left,
        Spread.of(masking),
        asked_masking_s,
        cohort.rebuild_s,
        wall_s,
        cpu_s,
        asked_unmasking_s,
        added,
        len(sources) * elements * 4 / 2**20,
    )


def _costs(report: Report, cohorts: Sequence[float], sizes: Sequence[float], most_gb: float, threads: int) -> None:
    bandwidth = _bandwidth()
    made = [Cohort(int(members), min(int(members) // 10, _spare(int(members)))) for members in cohorts]
    report.section(
        f"CPU milliseconds beside the model's, for {bandwidth / 1e9:.1f} GB/s of masks on one core",
        ["members", "left", "parameters", "masking ms", "model", "x", "unmasking ms", "model ", "x ", "wall ms"],
    )
    for cohort in made:
        for size in sizes:
            elements = int(size)
            left = cohort.members - len(cohort.survivors)
            client_model = cohort.members * 4 * elements / bandwidth  # its own mask and one with each other
            server_model = len(cohort.survivors) * (1 + left) * 4 * elements / bandwidth
            vector = np.zeros(elements, np.uint32)
            masking = unmasking = None
            if client_model * bandwidth < most_gb * 1e9:
                masking = min(_cpu_seconds(partial(add_masks, vector, 0, cohort.masks[0])) for _ in range(3))
            wall_s = None
            if server_model * bandwidth < most_gb * 1e9:
                same = MemorySource({MASKED: vector})
                sink = MemorySink(sum_tensors(elements))
                wall_s, unmasking = _unmasking_seconds(
                    [same] * len(cohort.survivors), cohort.unmasking, elements, sink, threads
                )
            report.row(
                cohort.members,
                left,
                elements,
                masking and 1e3 * masking,
                1e3 * client_model,
                masking and masking / client_model,
                unmasking and 1e3 * unmasking,
                1e3 * server_model,
                unmasking and unmasking / server_model,
                wall_s and 1e3 * wall_s,
            )
    report.section(
        "Control traffic and CPU of one worker in a round",
        [
            "members",
            *(f"{step} up/down B" for step in Step),
            "messages KB",
            "with headers KB",
            "asked below KB",
            "CPU of the steps ms",
            "service rebuilds ms",
        ],
    )
    for cohort in made:
        messages = sum(cohort.sent.values()) + sum(cohort.got.values())
        report.row(
            cohort.members,
            *(f"{cohort.sent[step]}/{cohort.got[step]}" for step in Step),
            messages / 1e3,
            (messages + EXCHANGES * HEADERS_BYTES) / 1e3,
            110.0 if cohort.members == 200 else None,
            1e3 * sum(cohort.cpu_s[i] for i in cohort.survivors) / len(cohort.survivors),
            1e3 * cohort.rebuild_s,
        )


def _bandwidth() -> float:
    """Bytes of masks a second that one core makes and adds."""
    vector = np.zeros(1 << 22, np.uint32)
    masks = [Mask(bytes([which]) * 32, 1) for which in range(8)]
    return len(masks) * vector.nbytes / min(_cpu_seconds(partial(add_masks, vector, 0, masks)) for _ in range(7))


def _spare(members: int) -> int:
    return members - threshold_of(members)


def _unmasking_seconds(
    sources: Sequence[BlockSource], masks: Sequence[Mask], elements: int, sink: MemorySink, threads: int
) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    unmask(sources, masks, elements, sink=sink, threads=threads)
    return time.perf_counter() - wall, time.process_time() - cpu


def _cpu_seconds(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def _largest_mib() -> float:
    """What the process took at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
