"""What a process of the server writes to its log: lines for people, or one JSON object each for programs.

No message has what clients wrote: none is made from it. A request is named by its id.
"""

import json
import logging
from datetime import UTC, datetime

PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """time (RFC 3339, UTC), level, logger, message, and where there is one the error with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        if record.exc_info and record.exc_info[0] is not None:
            told["error"] = record.exc_info[0].__name__
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


def formatter(kind: str) -> logging.Formatter:
    """``kind``: "text" or "json"."""
    return JsonFormatter() if kind == "json" else logging.Formatter(PLAIN)


def configure(level: str, kind: str) -> None:
    """Send this process's log to stderr. To be called once, by a program's own process."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(kind))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
