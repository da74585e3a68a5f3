"""The fake server over HTTP, as far as OpenAI's clients need it: chat, completions (also streamed), embeddings and models."""

import base64
import json
import struct
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .grpc_front import DRAINING, Gate
from .script import Answer, Failure, Received, Script, ending_of, pieces_of, vectors_of

STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""HTTP status by gRPC code; all others are 500."""
KINDS = {"/v1/chat/completions": "chat", "/v1/completions": "completion", "/v1/embeddings": "embedding"}
UNKNOWN = Failure("NOT_FOUND", "there is no such thing here", reason="not_found")


class FakeHttp(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: Script, models: Mapping[str, int], gate: Gate) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.models, self.gate = script, models, gate


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHttp

    def do_GET(self) -> None:
        if failure := self.server.gate.refusal(self._headers()):
            return self._refuse(failure)
        known = [
            {"id": name, "object": "model", "owned_by": "fake", "root": name, "parent": None, "max_model_len": size}
            for name, size in self.server.models.items()
        ]
        if self.path == "/v1/models":
            return self._send(200, {"object": "list", "data": known})
        one = [model for model in known if self.path == f"/v1/models/{model['id']}"]
        if one:
            return self._send(200, one[0])
        if self.path in ("/health", "/livez", "/readyz"):
            return self._send(200, {"status": "ok"})
        return self._refuse(UNKNOWN)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path not in KINDS:
            return self._refuse(UNKNOWN)
        try:
            asked = json.loads(body)
        except ValueError:
            return self._refuse(Failure("INVALID_ARGUMENT", "the body is no JSON", reason="invalid_value"))
        if failure := self.server.gate.refusal(self._headers()) or (DRAINING if self.server.gate.draining else None):
            return self._refuse(failure)
        if asked.get("model") not in self.server.models:
            return self._refuse(Failure("NOT_FOUND", "there is no such model", reason="model_not_found", param="model"))
        received = self._received(asked)
        said = self.server.script.next(received)
        if isinstance(said, Failure) and not (received.streamed and said.after):
            return self._refuse(said)
        answer = self.server.script.default if isinstance(said, Failure) else said
        if received.streamed:
            return self._stream(received, answer, said if isinstance(said, Failure) else None)
        time.sleep(answer.pause_s)
        write = _vectors if received.kind == "embedding" else _whole
        return self._send(200, write(self.server.script, received, answer))

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, to keep the output of tests clean."""

    def _headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    def _received(self, asked: dict[str, Any]) -> Received:
        prompt = asked.get("input" if KINDS[self.path] == "embedding" else "prompt", ())
        one = isinstance(prompt, str) or (prompt and all(isinstance(token, int) for token in prompt))
        apart = ("model", "messages", "prompt", "input", "stream", "tools")
        options = {name: value for name, value in asked.items() if name not in apart and value is not None}
        if "max_completion_tokens" in options:
            options["max_tokens"] = options["max_completion_tokens"]
        return Received(
            kind=KINDS[self.path],
            protocol="http",
            streamed=bool(asked.get("stream")),
            model=asked["model"],
            messages=asked.get("messages", ()),
            prompts=[prompt] if one else list(prompt),
            options=options,
            tools=[tool["function"]["name"] for tool in asked.get("tools") or ()],
            headers=self._headers(),
        )

    def _refuse(self, failure: Failure) -> None:
        headers = {} if failure.retry_after_s is None else {"retry-after": f"{failure.retry_after_s:g}"}
        self._send(STATUS.get(failure.code, 500), {"error": _error(failure)}, headers)

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def _stream(self, received: Received, answer: Answer, failure: Failure | None) -> None:
        self.send_response(200)
        for name, value in {"content-type": "text/event-stream", "connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        for place, chunk in enumerate(_chunks(self.server.script, received, answer)):
            if failure is not None and place == failure.after:
                return self._event({"error": _error(failure)})
            if self.server.script.breaks_now(received, answer, place):
                return None  # the connection ends without an end of the stream
            time.sleep(answer.pause_s)
            self._event(chunk)
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _event(self, chunk: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()


def _chunks(script: Script, received: Received, answer: Answer) -> Iterator[dict[str, Any]]:
    chat, limit = received.kind == "chat", _limit(received)
    for word in pieces_of(answer, limit):
        yield _chunk(received, [_part(index, {"content": word} if chat else word) for index in range(received.num_choices)])
    last: Any = {"tool_calls": _calls(answer, streamed=True)} if answer.tool_calls else {}
    reason = ending_of(answer, limit)
    yield _chunk(received, [_part(index, last if chat else "", reason) for index in range(received.num_choices)])
    if (received.options.get("stream_options") or {}).get("include_usage"):
        yield {**_chunk(received, []), "usage": _usage(script, received, answer)}


def _chunk(received: Received, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = "chat.completion.chunk" if received.kind == "chat" else "text_completion"
    return {"id": "fake", "object": kind, "created": 0, "model": received.model, "choices": choices}


def _part(index: int, news: Any, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta" if isinstance(news, dict) else "text": news, "finish_reason": reason, "logprobs": None}


def _whole(script: Script, received: Received, answer: Answer) -> dict[str, Any]:
    limit = _limit(received)
    text, reason = "".join(pieces_of(answer, limit)), ending_of(answer, limit)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if answer.tool_calls:
        message["tool_calls"] = _calls(answer)
    said: dict[str, Any] = {"message": message} if received.kind == "chat" else {"text": text}
    choices = [{"index": index, "finish_reason": reason, "logprobs": None, **said} for index in range(received.num_choices)]
    kind = "chat.completion" if received.kind == "chat" else "text_completion"
    usage = _usage(script, received, answer)
    return {"id": "fake", "object": kind, "created": 0, "model": received.model, "choices": choices, "usage": usage}


def _vectors(script: Script, received: Received, answer: Answer) -> dict[str, Any]:
    packed = received.options.get("encoding_format") == "base64"
    written = [base64.b64encode(struct.pack(f"<{len(one)}f", *one)).decode() if packed else one for one in vectors_of(answer, received)]
    data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(written)]
    asked = script.prompt_tokens(received)
    return {"object": "list", "model": received.model, "data": data, "usage": {"prompt_tokens": asked, "total_tokens": asked}}


def _calls(answer: Answer, *, streamed: bool = False) -> list[dict[str, Any]]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in answer.tool_calls
    ]
    return [{"index": index, **call} for index, call in enumerate(calls)] if streamed else calls


def _usage(script: Script, received: Received, answer: Answer) -> dict[str, int]:
    asked = script.prompt_tokens(received)
    told = len(list(pieces_of(answer, _limit(received)))) * received.num_choices
    return {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told}


def _limit(received: Received) -> int | None:
    limit = received.options.get("max_tokens")
    return None if limit is None else int(limit)


def _error(failure: Failure) -> dict[str, Any]:
    return {"message": failure.message, "type": "scripted", "param": failure.param, "code": failure.reason}
