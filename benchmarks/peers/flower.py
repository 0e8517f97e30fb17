"""Flower 1.42 as it is deployed: one SuperLink, a SuperNode for each client, all processes, without TLS.

What is run, in the environment of `environments`, with FLWR_HOME in a temporary folder:

    flower-superlink --insecure --port P --disable-runtime-dependency-installation
    flower-supernode --insecure --superlink 127.0.0.1:P --port Q        (for each client)
    flwr run flower_app benchmark --run-config 'shapes="..." clients=N rounds=R times="..."'

`flower_app` is FedAvg over NumPy arrays without evaluation; a round ends when its aggregate is there.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.peers.environments import environment_of
from benchmarks.peers.running import Ended, PeerRounds, Shape, rounds_told, site
from tests.acceptance.island import free_port

VERSION: Final = "1.42.0"
APP: Final = Path(__file__).parent / "flower_app"
CONNECTION: Final = """
[superlink.benchmark]
address = "127.0.0.1:{port}"
insecure = true
"""


class Flower:
    """Flower's parts as processes of their own."""

    name = f"Flower {VERSION}"

    def __init__(self) -> None:
        self.notes: list[str] = []

    def rounds(self, shapes: Sequence[Shape], clients: int, rounds: int) -> PeerRounds:
        """Rounds of a new SuperLink with new SuperNodes."""
        programs, relaxed = environment_of("flwr", VERSION)
        if relaxed:
            self.notes = [
                f"{self.name} was installed without its declared dependencies, and then with them, "
                f"but these in the newest version there is: {', '.join(relaxed)}"
            ]
        with site(environment=_environment(programs)) as here:
            port = free_port()
            (here.folder / "config.toml").write_text(CONNECTION.format(port=port), encoding="utf-8")
            here.environment["FLWR_HOME"] = str(here.folder)
            link = here.start(
                "superlink", programs / "flower-superlink", "--insecure", "--port", port,
                "--disable-runtime-dependency-installation",
            )  # fmt: skip
            here.wait_for_port(port)
            for number in range(clients):
                node = programs / "flower-supernode"
                own = free_port()
                here.start(f"supernode-{number}", node, "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", own)
            times = here.folder / "times"
            config = _config(shapes, clients, rounds, times)
            here.call(programs / "flwr", "run", APP, "benchmark", "--run-config", config)
            return rounds_told(here, lambda: told(times), server=link, clients=clients, rounds=rounds)


def told(times: Path) -> list[Ended]:
    """The rounds whose lines the app has written."""
    lines = times.read_text(encoding="ascii").splitlines() if times.exists() else []
    return [Ended(float(when), int(updates)) for when, updates in map(str.split, lines)]


def _environment(programs: Path) -> dict[str, str]:
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",  # Flower starts its programs by name
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def _config(shapes: Sequence[Shape], clients: int, rounds: int, times: Path) -> str:
    text = ",".join("x".join(map(str, shape)) for shape in shapes)
    return f'shapes="{text}" clients={clients} rounds={rounds} times="{times}"'
