"""NVFlare 2.9 in its simulator: a process for the server and one for each client, which talk over TCP.

What is run, in the environment of `environments`: `python nvflare_app/job.py WORKSPACE ELEMENTS CLIENTS ROUNDS`, its
own recipe of FedAvg for NumPy. A round ends when its log says that the aggregate is kept. The parameters are one
array, as its NumPy recipe wants them.
"""

import math
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from benchmarks.peers.environments import environment_of
from benchmarks.peers.running import Ended, PeerRounds, Shape, rounds_told, site

VERSION: Final = "2.9.0"
JOB: Final = Path(__file__).parent / "nvflare_app" / "job.py"
AGGREGATED: Final = re.compile(r"^(\S+ \S+) - INFO - (?:Aggregated (\d+)/\d+ results|End persist model on server)")


class NVFlare:
    """NVFlare's simulator, with its server and clients as processes."""

    name = f"NVFlare {VERSION}"

    def __init__(self) -> None:
        self.notes = [f"{self.name} ran in its simulator; server memory is its process without those of the clients."]

    def rounds(self, shapes: Sequence[Shape], clients: int, rounds: int) -> PeerRounds:
        """Rounds of a new simulator."""
        programs, relaxed = environment_of("nvflare", VERSION)
        if relaxed:
            self.notes.append(f"{self.name} was installed with other versions of: {', '.join(relaxed)}")
        with site(environment={"NVFLARE_DISABLE_TELEMETRY": "1"}) as here:
            here.environment |= {"TMPDIR": str(here.folder), "HOME": str(here.folder)}
            elements = sum(math.prod(shape) for shape in shapes)
            job = here.start("job", programs / "python", JOB, here.folder, elements, clients, rounds)
            return rounds_told(
                here,
                lambda: told(here.folder / "job.log"),
                server=job,
                clients=clients,
                rounds=rounds,
                not_server="simulator_worker",
            )


def told(log: Path) -> list[Ended]:
    """The rounds that a log says have ended: when, and how many updates were in."""
    found: list[Ended] = []
    updates = 0
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        said = AGGREGATED.match(line)
        if said is None:
            continue
        if said[2] is not None:
            updates = int(said[2])
        else:
            found.append(Ended(datetime.strptime(said[1], "%Y-%m-%d %H:%M:%S,%f").timestamp(), updates))  # noqa: DTZ007
            updates = 0
    return found
