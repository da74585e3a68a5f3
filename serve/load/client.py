"""Load generator: sends conversations to an OpenAI endpoint at their scheduled times and records when each token arrives."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from serve.load.workloads import Conversation, Turn

Api = Literal["chat", "completions"]
Ending = Literal["done", "cancelled", "failed"]
FIND_TIMEOUT_S = 10.0
LONGEST_LINE_BYTES = 2**22
"""Of a stream."""
REASONING = ("reasoning_content", "reasoning")
"""Where servers put what a model thinks before it answers; tokens as any, but no part of the text."""


@dataclass(kw_only=True)
class Answer:
    """One request as its client saw it. Times are seconds since the load started."""

    due_s: float
    """Scheduled time. Latency counts from here, so that delays of the generator itself are not hidden."""
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    """Arrival time of each piece of text."""
    end_s: float = 0.0
    ending: Ending = "failed"
    error: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    """As the server counted them."""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server to send to, and request options."""

    url: str
    """Base URL of the API; ends in /v1."""
    model: str
    api: Api = "chat"
    key: str | None = None
    extra: dict[str, object] = field(default_factory=dict)
    """Fields that are added to every request body."""
    timeout_s: float = 600.0


async def run(target: Target, conversations: Sequence[Conversation], on_end: Callable[[Answer], None]) -> list[Answer]:
    """Run all conversations. Returns the answers in order of the requests; calls ``on_end`` with each answer when it ends."""
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    began = time.perf_counter()
    limits = aiohttp.ClientTimeout(total=target.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, timeout=limits, connector=connector, read_bufsize=LONGEST_LINE_BYTES) as session:
        tasks = [asyncio.create_task(_converse(session, target, conversation, began, on_end)) for conversation in conversations]
        try:
            return [answer for answers in await asyncio.gather(*tasks) for answer in answers]
        finally:
            for task in tasks:
                task.cancel()


async def find_model(url: str, key: str | None) -> str:
    """The first model that the endpoint lists.

    Raises:
        ValueError: the endpoint cannot be reached, or lists no model.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        limits = aiohttp.ClientTimeout(total=FIND_TIMEOUT_S)
        async with aiohttp.ClientSession(headers=headers, timeout=limits) as session, session.get(f"{url}/models") as response:
            if response.status in (401, 403):
                raise ValueError(f"{url}/models answers {response.status}: it needs {'another' if key else 'an'} API key (--key)")
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except TimeoutError as error:
        raise ValueError(f"{url}/models gave no answer in {FIND_TIMEOUT_S:g} s; is the server there?") from error
    except (aiohttp.ClientError, KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{url}/models names no model ({error}); is the server there, and does the address end in /v1?") from error


async def _converse(
    session: aiohttp.ClientSession, target: Target, conversation: Conversation, began: float, on_end: Callable[[Answer], None]
) -> list[Answer]:
    await asyncio.sleep(max(0.0, began + conversation.at_s - time.perf_counter()))
    answers: list[Answer] = []
    history: list[dict[str, str]] = []
    for turn in conversation.turns:
        due_s = conversation.at_s if not answers else answers[-1].end_s
        history.append({"role": "user", "content": turn.prompt})
        answer = Answer(due_s=due_s, sent_s=time.perf_counter() - began)
        await _ask(session, target, turn, history, answer, began)
        answer.end_s = time.perf_counter() - began
        history.append({"role": "assistant", "content": answer.text})
        answers.append(answer)
        on_end(answer)
        if answer.ending != "done":
            break
    return answers


async def _ask(
    session: aiohttp.ClientSession, target: Target, turn: Turn, history: list[dict[str, str]], answer: Answer, began: float
) -> None:
    body: dict[str, object] = {"model": target.model, "max_tokens": turn.max_tokens, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | turn.extra | target.extra
    if target.api == "chat":
        path, body["messages"] = "chat/completions", history
    else:
        path, body["prompt"] = "completions", "\n".join(message["content"] for message in history)
    try:
        async with session.post(f"{target.url}/{path}", json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {(await response.text(errors='replace'))[:200]}"
            elif response.content_type != "text/event-stream":
                answer.error = f"the server answers with {response.content_type} and not with a stream"
            else:
                await _read(response, turn, answer, began)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # ValueError: a line beyond `LONGEST_LINE_BYTES`
        answer.error = f"{type(error).__name__}: {error}"


async def _read(response: aiohttp.ClientResponse, turn: Turn, answer: Answer, began: float) -> None:
    """Other servers' streams may lack anything but the text: usage, choices, even [DONE]."""
    finished = False
    async for line in response.content:
        data = line.strip().removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
        if not data:
            continue
        if data == b"[DONE]":
            answer.ending = "done"
            return
        event = _event(data)
        if event is None or event.get("error"):
            answer.error = str(event["error"] if event else f"an event is no JSON object: {data[:100]!r}")[:200]
            return
        if isinstance(usage := event.get("usage"), dict):
            answer.prompt_tokens, answer.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        for choice in event.get("choices") or ():
            finished = finished or choice.get("finish_reason") is not None
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or ""
            answer.text += text
            if text or any(delta.get(name) for name in REASONING):
                answer.token_s.append(time.perf_counter() - began)
        if turn.cancel_after_tokens is not None and len(answer.token_s) >= turn.cancel_after_tokens:
            answer.ending = "cancelled"
            return
    if finished:
        answer.ending = "done"
    else:
        answer.error = "the stream ended before [DONE]"


def _event(data: bytes) -> dict[str, Any] | None:
    """The event as a dictionary; None if it is not a JSON object."""
    try:
        event = json.loads(data)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
