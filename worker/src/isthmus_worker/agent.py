"""The agent's own process, which `isthmus-worker run` becomes.

Nothing of the command line is in its memory, and it imports neither NumPy nor torch.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from isthmus.interruption import Interrupted, Interruption
from isthmus_worker.logs import set_up_logging
from isthmus_worker.settings import Settings, SettingsRefused, read_settings
from isthmus_worker.spawning import start_child
from isthmus_worker.state import Credentials, NotEnrolled, StateDir, StateInUse

log = logging.getLogger("isthmus_worker.agent")

CONFIG_VARIABLE: Final = "ISTHMUS_WORKER_CONFIG"
DEFAULT_CONFIG: Final = Path("worker.toml")

STOPPED: Final = 0
MISCONFIGURED: Final = 2
KEY_REFUSED: Final = 3
STATE_IN_USE: Final = 4
NOTHING_TO_SERVE: Final = 5
LEDGER_DAMAGED: Final = 6


def run(config: Path, level: str = "info") -> int:
    """Work until a signal comes; the exit code."""
    set_up_logging(level)
    try:
        settings = read_settings(config)
        state = StateDir.open(settings.state_dir)
        credentials = state.credentials()
        with state.locked():
            return _work(settings, state, credentials)
    except (SettingsRefused, NotEnrolled) as error:
        log.error("not configured", extra={"reason": str(error)})
        return MISCONFIGURED
    except StateInUse as error:
        log.error("not started", extra={"reason": str(error)})
        return STATE_IN_USE


def _work(settings: Settings, state: StateDir, credentials: Credentials) -> int:
    """The part that holds the state directory."""
    try:
        with Interruption(signal.SIGTERM, signal.SIGINT) as interruption:
            return _serve(settings, state, credentials, interruption)
    except Interrupted as interrupted:  # whatever was being done is given up: the journal allows for kill -9
        log.info("stopping", extra={"signal": str(interrupted)})
        return STOPPED


def _serve(settings: Settings, state: StateDir, credentials: Credentials, interruption: Interruption) -> int:
    """The first child starts while we import what speaks to the service."""
    child = start_child(settings.resources, state.scratch)

    from isthmus_worker.connect import connect  # noqa: PLC0415 - see above
    from isthmus_worker.journal import Journal  # noqa: PLC0415
    from isthmus_worker.ledger import LedgerDamaged  # noqa: PLC0415
    from isthmus_worker.loop import Agent, KeyRefused, NothingToServe  # noqa: PLC0415
    from isthmus_worker.trainer import Trainer  # noqa: PLC0415

    trainer = Trainer(settings.resources, state.scratch, child)
    with closing(Journal.open(state)) as journal, connect(settings, credentials.api_key) as client:
        try:
            Agent(settings, state, credentials, client, journal, trainer, check=interruption.check).run()
        except KeyRefused as error:
            log.error("stopped", extra={"reason": str(error)})
            return KEY_REFUSED
        except NothingToServe as error:
            log.error("stopped", extra={"reason": str(error)})
            return NOTHING_TO_SERVE
        except LedgerDamaged as error:
            log.error("stopped", extra={"reason": str(error)})
            return LEDGER_DAMAGED
        finally:
            trainer.stop()
    return STOPPED


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="isthmus-worker run")
    named = os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG
    parser.add_argument("--config", "-c", type=Path, default=Path(named))
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    given = parser.parse_args(arguments)
    sys.exit(run(given.config, given.log_level))
