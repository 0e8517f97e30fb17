"""The agent's own process: `python -m isthmus_worker.agent --config FILE`, which is what `isthmus-worker run` becomes.

It is a program of its own so that nothing of the command line stays in its memory. It imports neither NumPy nor torch.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from isthmus_worker.connect import connect
from isthmus_worker.journal import Journal
from isthmus_worker.logs import set_up_logging
from isthmus_worker.loop import Agent, KeyRefused, NothingToServe
from isthmus_worker.settings import SettingsRefused, read_settings
from isthmus_worker.state import NotEnrolled, StateDir, StateInUse
from isthmus_worker.trainer import Trainer

log = logging.getLogger("isthmus_worker.agent")

STOPPED: Final = 0
MISCONFIGURED: Final = 2
KEY_REFUSED: Final = 3
STATE_IN_USE: Final = 4
NOTHING_TO_SERVE: Final = 5


class Stop(BaseException):
    """Somebody wants us to end. Whatever is being done may be given up anywhere: the journal allows for kill -9."""


def _stop(number: int, _frame: FrameType | None) -> None:
    for again in (signal.SIGTERM, signal.SIGINT):
        signal.signal(again, signal.SIG_IGN)
    raise Stop(signal.Signals(number).name)


def run(config: Path, level: str = "info") -> int:
    """Work until a signal comes; the exit code."""
    set_up_logging(level)
    try:
        settings = read_settings(config)
        state = StateDir.open(settings.state_dir)
        credentials = state.credentials()
        with state.locked():
            journal = Journal.open(state)
            trainer = Trainer(settings.resources, state.scratch)
            client = connect(settings, credentials.api_key)
            try:
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, _stop)
                Agent(settings, state, credentials, client, journal, trainer).run()
            except Stop as stop:
                log.info("stopping", extra={"signal": str(stop)})
            finally:
                trainer.stop()
                journal.close()
                client.close()
    except (SettingsRefused, NotEnrolled) as error:
        log.error("not configured", extra={"reason": str(error)})
        return MISCONFIGURED
    except StateInUse as error:
        log.error("not started", extra={"reason": str(error)})
        return STATE_IN_USE
    except KeyRefused as error:
        log.error("stopped", extra={"reason": str(error)})
        return KEY_REFUSED
    except NothingToServe as error:
        log.error("stopped", extra={"reason": str(error)})
        return NOTHING_TO_SERVE
    return STOPPED


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="isthmus-worker run")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    given = parser.parse_args(arguments)
    sys.exit(run(given.config, given.log_level))


if __name__ == "__main__":
    main()
