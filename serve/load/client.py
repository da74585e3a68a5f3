"""Sends conversations to an OpenAI endpoint when their time has come, and notes when each token arrived."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import aiohttp

from serve.load.workloads import Conversation, Turn

Api = Literal["chat", "completions"]
Ending = Literal["done", "cancelled", "failed"]


@dataclass(kw_only=True)
class Answer:
    """What one request's client saw. Times are seconds since the load began."""

    due_s: float
    """When it was to be sent. Waiting is counted from here, so that a generator that falls behind hides nothing."""
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    """When each piece of text came."""
    end_s: float = 0.0
    ending: Ending = "failed"
    error: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    """As the server counted them."""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to, and how."""

    url: str
    """Of the API: ends in /v1."""
    model: str
    api: Api = "chat"
    key: str | None = None
    extra: dict[str, object] = field(default_factory=dict)
    """Goes into the body of every request."""
    timeout_s: float = 600.0


async def run(target: Target, conversations: Sequence[Conversation], on_end: Callable[[Answer], None]) -> list[Answer]:
    """All answers, in the order of the requests. ``on_end`` is told each when it ends."""
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    began = time.perf_counter()
    limits = aiohttp.ClientTimeout(total=target.timeout_s)
    async with aiohttp.ClientSession(headers=headers, timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = [asyncio.create_task(_converse(session, target, conversation, began, on_end)) for conversation in conversations]
        try:
            return [answer for answers in await asyncio.gather(*tasks) for answer in answers]
        finally:
            for task in tasks:
                task.cancel()


async def find_model(url: str, key: str | None) -> str:
    """The first model that the endpoint lists.

    Raises:
        ValueError: it cannot be reached, or lists none.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        limits = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(headers=headers, timeout=limits) as session, session.get(f"{url}/models") as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, KeyError, IndexError, ValueError) as error:
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
                answer.error = f"{response.status}: {(await response.text())[:200]}"
                return
            await _read(response, turn, answer, began)
    except (aiohttp.ClientError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"


async def _read(response: aiohttp.ClientResponse, turn: Turn, answer: Answer, began: float) -> None:
    async for line in response.content:
        data = line.strip().removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
        if not data:
            continue
        if data == b"[DONE]":
            answer.ending = "done"
            return
        event = json.loads(data)
        if "error" in event:
            answer.error = str(event["error"])[:200]
            return
        if usage := event.get("usage"):
            answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in event.get("choices", ()):
            piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if piece:
                answer.text += piece
                answer.token_s.append(time.perf_counter() - began)
        if turn.cancel_after_tokens is not None and len(answer.token_s) >= turn.cancel_after_tokens:
            answer.ending = "cancelled"
            return
    answer.error = "the stream ended before [DONE]"
