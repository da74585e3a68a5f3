"""Streams that must each come to the same whole end, whatever happens behind the front meanwhile."""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import httpx

WAIT_S = 300.0
PROMPT = "Once upon a time"


class Broken(Exception):
    """A stream did not come to its end."""


def stream(url: str, max_tokens: int) -> str:
    """A greedy answer's text.

    Raises:
        Broken: it has no whole answer, and why.
    """
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=WAIT_S) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    except httpx.HTTPError as error:
        raise Broken(repr(error)) from error
    if answer.status_code != 200 or lines[-1:] != ["[DONE]"]:
        raise Broken(f"{answer.status_code}, and then {lines[-1:]}")
    events = [json.loads(line) for line in lines[:-1]]
    assert events[-1]["usage"]["completion_tokens"] == max_tokens
    return "".join(event["choices"][0]["text"] for event in events if event["choices"])


class Streams:
    """So many at any time as are asked for last. Leaving waits for those that still run."""

    def __init__(self, url: str, golden: str) -> None:
        """``golden``: an undisturbed answer, at least as long as any that will be asked for."""
        self._url, self._golden = url, golden
        self._clients = ThreadPoolExecutor(64)
        self._under_way: list[Future[str]] = []
        self.num_whole = 0
        self.wrong: list[str] = []

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.keep(0)
        for one in self._under_way:
            self._judge(one)
        self._clients.shutdown()

    @property
    def num_under_way(self) -> int:
        return sum(not one.done() for one in self._under_way)

    def keep(self, count: int, max_tokens: int = 200) -> None:
        """Judge those that have ended, and begin new ones until there are ``count``."""
        ended = [one for one in self._under_way if one.done()]
        self._under_way = [one for one in self._under_way if one not in ended]
        for one in ended:
            self._judge(one)
        while len(self._under_way) < count:
            self._under_way.append(self._clients.submit(stream, self._url, max_tokens))

    def _judge(self, ended: Future[str]) -> None:
        try:
            text = ended.result()
        except Broken as error:
            self.wrong.append(str(error))
            return
        if text and self._golden.startswith(text.rstrip("\ufffd")):  # what ends in the midst of a character
            self.num_whole += 1
        else:
            self.wrong.append(text[:300])
