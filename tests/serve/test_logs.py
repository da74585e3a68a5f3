"""The log as JSON."""

import json
import logging
import sys

from serve.logs import JsonFormatter, formatter


def record(message: str, *arguments: object, error: bool = False) -> logging.LogRecord:
    exc_info = None
    if error:
        try:
            raise KeyError("rank 3")
        except KeyError:
            exc_info = sys.exc_info()
    return logging.LogRecord("serve.http", logging.WARNING, "file.py", 1, message, arguments, exc_info)


def test_a_line_is_one_object_whatever_the_message() -> None:
    line = JsonFormatter().format(record("request %s: %s", "req-1", 'a "quoted"\nline'))
    assert "\n" not in line
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == ("warning", "serve.http", 'request req-1: a "quoted"\nline')
    assert told["time"].endswith("Z")


def test_an_error_is_told_with_its_traceback() -> None:
    told = json.loads(JsonFormatter().format(record("it failed", error=True)))
    assert told["error"] == "KeyError"
    assert "rank 3" in told["traceback"]


def test_people_get_lines() -> None:
    assert formatter("text").format(record("hello")).endswith("WARNING serve.http: hello")
