"""Additional requests that run beside the compared streams, and checks of what becomes of them. Each returns a list of violations."""

import asyncio
import json
import socket
import string
from collections.abc import Awaitable, Callable

import aiohttp
import psutil

from engine.failpoints import Failure, arm, disarm
from tests.faults.server import Victims
from tests.faults.streams import ASKS, LENGTH, PROMPTS, Seen, follow
from tests.history import History

END_S = 240.0
CROWD = 1_000
FEW = 12
SAME = 10
LONG_ANSWERS, LONG_ANSWER_TOKENS = 12, 700
"""Together 8,400 tokens of KV cache; two replicas have 7,800."""
LONG_PROMPTS, LONG_PROMPT_TOKENS = 4, 2_000
"""The model's context is 2,048 tokens; its tokenizer makes one token of each digit and space."""
POISON_CANDIDATES = "~^`@#%&+=" + string.ascii_uppercase[::-1]
"""The token that kills ranks is the first of these characters that does not occur in the compared streams."""

SideRequests = Callable[[Victims, int], Awaitable[list[str]]]
"""Called with the run's seed."""


async def poison(victims: Victims, seed: int) -> list[str]:
    """A request that kills every rank that computes it must fail with an error that says so; no other request may fail."""
    async with _session() as session:
        said = await _said(victims)
        poison = next(letter for letter in POISON_CANDIDATES if letter not in said)
        async with session.post(f"{victims.url}/tokenize", json={"prompt": poison}) as answer:
            (token,) = (await answer.json())["tokens"]
        arm(victims.failpoints, "rank.step", Failure(action="abort", token=token))
        try:
            body = {"model": "tiny", "prompt": [token, seed % token], "max_tokens": 20}
            async with session.post(f"{victims.url}/v1/completions", json=body) as answer:
                told = await answer.text()
        finally:
            disarm(victims.failpoints, "rank.step")
    return [] if "poison" in told else [f"the poisonous request was answered by {answer.status}: {told[:200]}"]


async def _said(victims: Victims) -> str:
    """All text of the compared streams, prompts and answers: the poisonous character must not be in it."""
    if victims.url not in _SAID:
        seen = [Seen(ask, History(ask.name)) for ask in ASKS]
        await asyncio.gather(*(follow(victims.url, victims.target, one) for one in seen))
        assert all(one.history.is_complete for one in seen)
        _SAID[victims.url] = "".join((*PROMPTS, *(choice.text for one in seen for choice in one.history.choices.values())))
    return _SAID[victims.url]


_SAID: dict[str, str] = {}


async def crowd(victims: Victims, seed: int) -> list[str]:
    """Every one of many simultaneous requests must be answered, or refused with a proper status."""

    async def ask(session: aiohttp.ClientSession) -> str:
        try:
            body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
            async with session.post(f"{victims.url}/v1/completions", json=body) as answer:
                await answer.read()
                return str(answer.status)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            return type(error).__name__

    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with _session(connector) as session:
        answers = await asyncio.gather(*(ask(session) for _ in range(CROWD)))
    wrong = sorted(set(answers) - {"200", "429", "503"})
    return [f"{answers.count(answer)} of {CROWD} connections ended with {answer}" for answer in wrong]


def newcomers(*, may_fail: int) -> SideRequests:
    """A few more requests, one after the other, of which ``may_fail`` may fail with an error of their front."""

    async def ask(session: aiohttp.ClientSession, victims: Victims, prompt: str) -> str:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
        try:
            async with session.post(f"{victims.url}/v1/completions", json=body) as answer:
                told = await answer.json()
        except (aiohttp.ClientError, ValueError) as error:
            return type(error).__name__
        return "" if answer.status == 200 else str(told["error"]["code"])

    async def come(victims: Victims, seed: int) -> list[str]:
        async with _session() as session:
            told = [answer for at in range(FEW) if (answer := await ask(session, victims, f"{seed} {at}"))]
        return [f"requests beside were told {told}"] if len(told) > may_fail or set(told) - {"internal_error", "unavailable"} else []

    return come


async def same_key(victims: Victims, seed: int) -> list[str]:
    """Send a request with an idempotency key ten times at once, and once more afterwards. All must get the same answer."""
    body = {"model": "tiny", "prompt": f"{seed}", "max_tokens": LENGTH, "ignore_eos": True, "temperature": 1.0, "seed": seed}

    async def ask(session: aiohttp.ClientSession) -> str:
        async with session.post(f"{victims.url}/v1/completions", json=body, headers={"idempotency-key": f"same-{seed}"}) as answer:
            told = await answer.json()
        return str(told["choices"][0]["text"]) if answer.status == 200 else f"{answer.status} {told}"

    async with _session() as session:
        answers = set(await asyncio.gather(*(ask(session) for _ in range(SAME))))
        answers.add(await ask(session))
    return [] if len(answers) == 1 and all(answers) else [f"one key, and {len(answers)} answers: {sorted(answers)}"[:400]]


async def deaf(victims: Victims, seed: int) -> list[str]:
    """A client that reads nothing of its stream must be disconnected."""
    body = {"model": "tiny", "prompt": f"{seed}", "max_tokens": 1_500, "n": 2, "ignore_eos": True, "stream": True, "logprobs": 5}
    raw, loop = json.dumps(body).encode(), asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        port = int(victims.url.rpartition(":")[2])
        await loop.sock_connect(client, ("127.0.0.1", port))
        own_port = client.getsockname()[1]
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        await loop.sock_sendall(client, head.encode() + raw)
        until = loop.time() + END_S
        while _is_served(port, own_port):
            if loop.time() > until:
                return ["the client that does not read was not left"]
            await asyncio.sleep(0.2)
    return []


async def long_answers(victims: Victims, seed: int) -> list[str]:
    """Requests that need more KV cache than there is: some must wait or be preempted, and all must complete."""
    before = await victims.counted("manta_preemptions_total")
    wrong = await _complete_all(victims, [f"{seed} {at}" for at in range(LONG_ANSWERS)], LONG_ANSWER_TOKENS)
    await asyncio.sleep(3.0)  # fronts exchange their counters every two seconds
    if await victims.counted("manta_preemptions_total") == before:
        wrong.append("nothing was preempted, so this has shown nothing")
    return wrong


async def long_prompts(victims: Victims, seed: int) -> list[str]:
    """Prompts that fill the model's context and share no prefix."""
    return await _complete_all(victims, [(f"{seed} {at} " * LONG_PROMPT_TOKENS)[:LONG_PROMPT_TOKENS] for at in range(LONG_PROMPTS)], 16)


async def _complete_all(victims: Victims, prompts: list[str], length: int) -> list[str]:
    async def complete(session: aiohttp.ClientSession, prompt: str) -> list[str]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": length, "ignore_eos": True}
        async with session.post(f"{victims.url}/v1/completions", json=body) as answer:
            told = await answer.json()
        counted = told.get("usage", {}).get("completion_tokens")
        return [] if counted == length else [f"a request beside was answered by {answer.status}, {counted} tokens: {str(told)[:200]}"]

    async with _session() as session:
        found = await asyncio.gather(*(complete(session, prompt) for prompt in prompts))
    return [one for wrong in found for one in wrong]


def _session(connector: aiohttp.TCPConnector | None = None) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=END_S))


def _is_served(port: int, own_port: int) -> bool:
    ends = [one for one in psutil.net_connections("tcp") if one.laddr and one.laddr[1] == port and one.raddr]
    return any(one.raddr[1] == own_port and one.status == "ESTABLISHED" for one in ends)
