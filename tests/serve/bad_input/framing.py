"""Reads framing.yaml, and sends what it says over a socket."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.serve.bad_input.checks import MOST_ERROR_BYTES, Target, says_little
from tests.serve.bad_input.table import PATHS, expanded

STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
GOOD = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}


@dataclass(frozen=True, kw_only=True)
class Framing:
    name: str
    pieces: tuple[bytes, ...]
    then: str
    outcomes: tuple[str, ...]
    """Status codes, "closed" or "nothing"."""


def framings(*, model: str) -> list[Framing]:
    specs = yaml.safe_load((Path(__file__).parent / "framing.yaml").read_text())["rows"]
    good = json.dumps({"model": model} | GOOD)
    return [
        Framing(
            name=spec["name"],
            pieces=tuple(_pieces(spec, good)),
            then=spec.get("then", "wait"),
            outcomes=tuple(str(one) for one in spec["status"]),
        )
        for spec in specs
    ]


async def refused_on_the_socket(target: Target, row: Framing) -> None:
    """The server says one of what the row allows, and little besides; others are served meanwhile, also while the client holds on."""
    async with connected(str(target.http.base_url)) as (reader, writer):
        try:
            for piece in row.pieces:
                writer.write(piece)
                await writer.drain()
            if row.then == "half_close":
                writer.write_eof()
        except ConnectionError:
            assert row.then != "hold"  # it had seen enough
        if row.then == "hold":
            await target.is_unharmed()
        outcome, text = ("nothing", b"") if row.then in ("leave", "hold") else await _outcome(reader, target.answer_s)
    assert outcome in row.outcomes, text[:500]
    if outcome not in ("200", "nothing", "closed"):
        assert len(text) <= MOST_ERROR_BYTES + 1_000  # headers too
        says_little(text.decode("latin-1").partition("\r\n\r\n")[2])


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def _outcome(reader: asyncio.StreamReader, answer_s: float) -> tuple[str, bytes]:
    """The first status, or that the connection was closed without one; a hang is neither."""
    text = b""
    async with asyncio.timeout(answer_s):
        while not _is_whole(text):
            try:
                more = await reader.read(65_536)
            except ConnectionError:
                break
            if not more:
                break
            text += more
    found = STATUS.match(text)
    return (found[1].decode(), text) if found else ("closed", text)


def _is_whole(text: bytes) -> bool:
    """An answer with a length, and all of it."""
    head, end, body = text.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return bool(end) and length is not None and len(body) >= int(length[1])


def _pieces(spec: dict[str, Any], good: str) -> list[bytes]:
    if "hex" in spec:
        return [bytes.fromhex(spec["hex"])]
    pieces = spec["send"] if isinstance(spec["send"], list) else [spec["send"]]
    said = {"PATH": PATHS["chat"], "LENGTH": str(len(good)), "GOOD": good}
    return [_filled(str(expanded(piece)), said).encode("latin-1") for piece in pieces]


def _filled(text: str, said: dict[str, str]) -> str:
    return re.sub("|".join(said), lambda found: said[found[0]], text)
