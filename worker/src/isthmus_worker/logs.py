"""Logs for machines and for people: one line an event, `key=value`."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class KeyValue(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO event="task done" job=heart round=3`"""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the values hold."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        values = {"event": record.getMessage()} | {
            name: value for name, value in vars(record).items() if name not in _STANDARD and value not in (None, "")
        }
        if record.exc_info and record.exc_info[1] is not None:
            values["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        return f"{at} {record.levelname} " + " ".join(f"{name}={_quoted(value)}" for name, value in values.items())


def set_up_logging(level: str) -> None:
    """Log to standard error. Libraries only speak up when something is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValue())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("isthmus_worker").setLevel(level.upper())


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not any(character in text for character in ' "=')
    return text if plain and text else json.dumps(text, ensure_ascii=False)
