"""The log format of the server's processes: lines for people, or one JSON object per line for programs.

No message contains text from clients. A request is named by its id.
"""

import json
import logging
from datetime import UTC, datetime

PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """time (RFC 3339, UTC), level, logger, message, pid, and the error with its traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["error"] = record.exc_info[0].__name__
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def formatter(kind: str) -> logging.Formatter:
    """``kind``: "text" or "json"."""
    return JsonFormatter() if kind == "json" else logging.Formatter(PLAIN)


def configure(level: str, kind: str) -> None:
    """Send this process's log to stderr. Call it once, in the program's main process."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(kind))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
