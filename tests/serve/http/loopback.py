"""The HTTP app on a real socket, with the real service behind it and tokens by script."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from engine.plan import TokenEvent, TokenLogprobs
from engine.request import Request
from serve.text.tokenizer import Tokenizer

ANSWER = "The capital of France is Paris. Grüße 🙂 你好"


class ScriptedTokens:
    """A `TokenSource` that answers everything with `ANSWER` and ends as the engine would: at a stop token or the length."""

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        self.tokens = (*tokenizer.encode(ANSWER), eos)
        self.asked: list[Request] = []
        self.num_open = 0
        self.waits = False
        """Never send the second token."""

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.asked.append(request)
        self.num_open += 1
        try:
            for offset, token in enumerate(self.tokens[: request.sampling.max_tokens]):
                await (asyncio.Event().wait() if self.waits and offset else asyncio.sleep(0))
                yield self._event(request, offset, token)
                if token in request.sampling.stop_token_ids:
                    return
        finally:
            self.num_open -= 1

    def _event(self, request: Request, offset: int, token: int) -> TokenEvent:
        stopped = token in request.sampling.stop_token_ids
        full = offset + 1 == min(request.sampling.max_tokens, len(self.tokens))
        wanted = request.sampling.logprobs
        top = () if wanted is None else tuple((token + rank, -0.1 - rank) for rank in range(wanted))
        return TokenEvent(
            request_id=request.id,
            choice=request.choice,
            attempt=request.attempt,
            offset=offset,
            tokens=(token,),
            logprobs=() if wanted is None else (TokenLogprobs(-0.1, top),),
            finish_reason="stop" if stopped else "length" if full else None,
            stop_token=token if stopped else None,
        )

    def ready(self) -> bool:
        return True


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """The app's base URL, at a free port of 127.0.0.1."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    running = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        await eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running


async def eventually(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110  (what is waited for belongs to others and tells nobody)
            await asyncio.sleep(0.01)
