"""What is refused before the service hears of it, streaming or not, and how."""

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from serve.caller import ANONYMOUS, Caller
from serve.caller import Scope as KeyScope
from serve.deployment import DISCONNECT_ERRORS
from serve.errors import NotAuthenticated, code_of
from serve.http.app import create_app
from serve.limits import Limits
from tests.serve.http.conftest import MODEL, ScriptedService

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "Hi"}


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error, which must have OpenAI's shape and nothing else."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return dict(body["error"])


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"  \n",
        b"null",
        b"[]",
        b'"text"',
        b"Hello",
        b'{"model": "x',
        b'{"model": "\xff\xfe"}',
        b'{"model": "\\ud800"}',
        b"{'model': 1}",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"n": 01}',
        b"\xef\xbb\xbf{}",
        b"{}{}",
    ],
    ids=repr,
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_body_that_is_no_json_object_is_refused(http: httpx.AsyncClient, service: ScriptedService, path: str, raw: bytes) -> None:
    error = refusal(await http.post(path, content=raw, headers=JSON), 400)
    assert error["type"] == "invalid_request_error"
    assert service.asked == []


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"])
async def test_a_body_that_does_not_say_it_is_json_is_415(http: httpx.AsyncClient, chat_body: Any, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    assert refusal(await http.post(CHAT, content=json.dumps(chat_body), headers=headers), 415)["code"] == "unsupported_media_type"


async def test_a_compressed_body_is_415(http: httpx.AsyncClient) -> None:
    refusal(await http.post(CHAT, content=b"\x1f\x8b", headers=JSON | {"content-encoding": "gzip"}), 415)


@pytest.mark.parametrize("media_type", ["application/json; charset=UTF-8", "Application/JSON"])
async def test_json_may_say_its_charset(http: httpx.AsyncClient, chat_body: Any, media_type: str) -> None:
    assert (await http.post(CHAT, content=json.dumps(chat_body), headers={"content-type": media_type})).status_code == 200


class TestSizes:
    @pytest.fixture
    def limits(self) -> Limits:
        return Limits(body_bytes=300, json_depth=5, headers=20, header_bytes=2_000, id_chars=10)

    def padded(self, body: dict[str, Any], size: int) -> bytes:
        raw = json.dumps(body).encode()
        return raw + b" " * (size - len(raw))

    @pytest.mark.parametrize("announced", [True, False], ids=["with Content-Length", "without"])
    async def test_a_body_at_the_limit_passes_and_one_byte_more_is_413(
        self, http: httpx.AsyncClient, chat_body: Any, announced: bool
    ) -> None:
        async def pieces(raw: bytes) -> Any:
            for start in range(0, len(raw), 64):
                yield raw[start : start + 64]

        def content(size: int) -> Any:
            raw = self.padded(chat_body, size)
            return raw if announced else pieces(raw)

        assert (await http.post(CHAT, content=content(300), headers=JSON)).status_code == 200
        assert refusal(await http.post(CHAT, content=content(301), headers=JSON), 413)["code"] == "request_too_large"

    async def test_json_at_the_depth_limit_passes_and_one_level_more_is_refused(self, http: httpx.AsyncClient, chat_body: Any) -> None:
        def nested(levels: int) -> Any:
            return [] if levels == 1 else [nested(levels - 1)]

        assert (await http.post(CHAT, json=chat_body | {"zork": nested(4)})).status_code == 200
        assert "deeper than 5" in refusal(await http.post(CHAT, json=chat_body | {"zork": nested(5)}), 400)["message"]

    async def test_too_many_or_too_long_headers_are_431(self, http: httpx.AsyncClient, chat_body: Any) -> None:
        refusal(await http.post(CHAT, json=chat_body, headers={"x-long": "x" * 2_000}), 431)
        refusal(await http.post(CHAT, json=chat_body, headers={f"x-{n}": "" for n in range(20)}), 431)

    async def test_a_user_id_at_the_limit_passes_and_one_character_more_is_refused(self, http: httpx.AsyncClient, chat_body: Any) -> None:
        assert (await http.post(CHAT, json=chat_body | {"user": "a" * 10})).status_code == 200
        assert refusal(await http.post(CHAT, json=chat_body | {"user": "a" * 11}), 400)["param"] == "user"


async def test_a_length_of_thousands_of_digits_is_413(http: httpx.AsyncClient) -> None:
    refusal(await http.post(CHAT, content=b"{}", headers=JSON | {"content-length": "9" * 5_000}), 413)


async def test_json_nested_beyond_all_reason_is_refused_without_a_crash(http: httpx.AsyncClient) -> None:
    refusal(await http.post(CHAT, content=b'{"a":' + b"[" * 200_000, headers=JSON), 400)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{}] * 700_000},
        {"messages": [USER], "stop_token_ids": ["x"] * 700_000},
        {"messages": [USER], "logit_bias": {str(n): "x" for n in range(200_000)}},
        {"messages": [USER], "stop": [1] * 1_000_000},
        {"messages": [{"role": "assistant", "tool_calls": [1] * 1_000_000}]},
    ],
    ids=["messages", "stop_token_ids", "logit_bias", "stop", "tool_calls"],
)
async def test_a_hostile_list_costs_one_short_error(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    raw = json.dumps(body | {"model": "Qwen/tiny"}, separators=(",", ":")).encode()
    answer = await http.post(CHAT, content=raw, headers=JSON)
    assert len(raw) < Limits().body_bytes
    assert len(refusal(answer, 400)["message"]) < 200


BOTH = [
    ({"model": None}, "model"),
    ({"model": 1}, "model"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": "1"}, "top_p"),
    ({"top_k": 1.0}, "top_k"),
    ({"top_k": True}, "top_k"),
    ({"min_p": {}}, "min_p"),
    ({"n": 1.5}, "n"),
    ({"n": "2"}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"min_tokens": 0.5}, "min_tokens"),
    ({"seed": "1"}, "seed"),
    ({"stop": 1}, "stop"),
    ({"stop": ["a", 1]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop_token_ids": "2"}, "stop_token_ids"),
    ({"stop_token_ids": [1, True]}, "stop_token_ids[1]"),
    ({"logit_bias": {"AI": 1}}, "logit_bias"),
    ({"logit_bias": {"01": 1}}, "logit_bias"),
    ({"logit_bias": {"0": 1, "-0": 1}}, "logit_bias"),  # one token twice
    ({"logit_bias": {"1": "1"}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream_options": [], "stream": True}, "stream_options"),
    ({"stream_options": {"include_usage": "yes"}, "stream": True}, "stream_options.include_usage"),
    ({"user": ""}, "user"),
    ({"user": "a b"}, "user"),
    ({"user": 5}, "user"),
    ({"best_of": 4}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"best_of": 1.0}, "best_of"),
    ({"use_beam_search": 0}, "use_beam_search"),
    ({"chat_template_kwargs": {"enable_thinking": 0}}, "chat_template_kwargs"),
]
OF_CHAT = [
    ({"messages": None}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [USER, {"role": "user", "content": None}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": 5, "content": "Hi"}]}, "messages[0].role"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": "2", "logprobs": True}, "top_logprobs"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools"),
    ({"tools": {}}, "tools"),
    ({"tool_choice": "perhaps"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": "s"}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": 5, "schema": {}}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": "false", "schema": {}}}}, "response_format"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": 1}}, "structured_outputs"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a+"}, "guided_regex"),
    ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
    ({"response_format": "text"}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
]
OF_COMPLETIONS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, 2.5]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": "1"}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"suffix": "end"}, "suffix"),
]
CASES = [(path, *case) for path in (CHAT, COMPLETIONS) for case in BOTH]
CASES += [(CHAT, *case) for case in OF_CHAT] + [(COMPLETIONS, *case) for case in OF_COMPLETIONS]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("path", "wrong", "param"), CASES, ids=lambda value: repr(value)[:60])
async def test_a_wrong_field_is_a_400_that_names_it(
    http: httpx.AsyncClient,
    service: ScriptedService,
    chat_body: Any,
    completion_body: Any,
    path: str,
    wrong: dict[str, Any],
    param: str,
    stream: bool,
) -> None:
    body = (chat_body if path == CHAT else completion_body) | {"stream": stream} | wrong
    assert refusal(await http.post(path, json=body), 400)["param"] == param
    assert service.asked == []


@pytest.mark.parametrize("missing", ["model", "messages"])
async def test_a_missing_field_is_said_to_be_required(http: httpx.AsyncClient, chat_body: Any, missing: str) -> None:
    del chat_body[missing]
    assert refusal(await http.post(CHAT, json=chat_body), 400)["message"] == f"{missing} is required"


async def test_stream_options_without_a_stream_are_refused(http: httpx.AsyncClient, chat_body: Any) -> None:
    error = refusal(await http.post(CHAT, json=chat_body | {"stream_options": {"include_usage": True}}), 400)
    assert error["param"] == "stream_options"


async def test_an_error_does_not_echo_what_was_sent(http: httpx.AsyncClient, chat_body: Any) -> None:
    answer = await http.post(CHAT, json=chat_body | {"temperature": "SECRET" * 1000, "seed": "SECRET", "SECRET": 1})
    assert refusal(answer, 400)
    assert "SECRET" not in answer.text


async def test_fields_that_ask_for_nothing_are_taken(http: httpx.AsyncClient, chat_body: Any) -> None:
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "functions": None}
    nulls = dict.fromkeys(("temperature", "n", "stop", "logit_bias", "stop_token_ids", "stream", "stream_options", "logprobs", "user"))
    answer = await http.post(CHAT, json=chat_body | nothing | nulls | {"parallel_tool_calls": True, "user": "someone"})
    assert answer.status_code == 200
    assert "x-manta-ignored-fields" not in answer.headers


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_unknown_fields_are_ignored_and_named_in_a_header(http: httpx.AsyncClient, chat_body: Any, stream: bool) -> None:
    answer = await http.post(CHAT, json=chat_body | {"zork": 1, "abc": 2, "stream": stream})
    assert answer.status_code == 200
    assert answer.headers["x-manta-ignored-fields"] == "abc, zork"


async def test_messages_of_a_completion_are_no_field_and_are_not_judged(http: httpx.AsyncClient, completion_body: Any) -> None:
    answer = await http.post(COMPLETIONS, json=completion_body | {"messages": [{"tool_calls": [1] * 1_000}]})
    assert answer.status_code == 200
    assert answer.headers["x-manta-ignored-fields"] == "messages"


@pytest.mark.parametrize("so_far", [[{"index": 0, "token_ids": [1]}], [{"index": -1, "token_ids": [-1]}], "all of it"], ids=repr)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_broken_stream_cannot_go_on_over_http_and_a_client_that_tries_is_told(
    http: httpx.AsyncClient, service: ScriptedService, chat_body: Any, completion_body: Any, path: str, so_far: Any
) -> None:
    answer = await http.post(path, json=(chat_body if path == CHAT else completion_body) | {"so_far": so_far})
    assert answer.status_code == 200
    assert answer.headers["x-manta-ignored-fields"] == "so_far"
    assert service.asked[0].so_far == ()


async def test_unknown_names_cannot_forge_headers(http: httpx.AsyncClient, chat_body: Any) -> None:
    answer = await http.post(CHAT, json=chat_body | {"a\r\nset-cookie: x": 1})
    assert answer.headers["x-manta-ignored-fields"] == "(unprintable)"
    assert "set-cookie" not in answer.headers
    many = await http.post(CHAT, json=chat_body | {f"field_{n}": 1 for n in range(1000)})
    assert len(many.headers["x-manta-ignored-fields"].split(", ")) == 16


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "http://x/model", "other", "a" * 5_000])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_unknown_model_is_404_with_a_short_message(http: httpx.AsyncClient, chat_body: Any, name: str, stream: bool) -> None:
    error = refusal(await http.post(CHAT, json=chat_body | {"model": name, "stream": stream}), 404)
    assert error["code"] == "model_not_found"
    assert len(error["message"]) < 300


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT), ("PUT", CHAT), ("POST", "/v1/models"), ("DELETE", "/livez")])
async def test_the_wrong_method_is_405_and_says_the_right_one(http: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await http.request(method, path)
    error = refusal(answer, 405)
    assert error["code"] == "method_not_allowed"
    assert error["message"] == f"{path} does not take {method}, but {answer.headers['allow']}"


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat", "/v1/chat/completions/", "/docs", "/redoc", "/v1/images", "/../etc/passwd"])
async def test_an_unknown_path_is_404(http: httpx.AsyncClient, path: str) -> None:
    error = refusal(await http.get(path), 404)
    assert error["code"] == "not_found"
    assert "/v1" in error["message"]
    long = refusal(await http.get("/" + "x" * 2000), 404)
    assert len(long["message"]) < 200


async def test_a_good_request_after_each_bad_one_is_answered(http: httpx.AsyncClient, chat_body: Any) -> None:
    for _, wrong, _ in CASES[:20]:
        await http.post(CHAT, json=chat_body | wrong)
        assert (await http.post(CHAT, json=chat_body)).json()["choices"][0]["message"]["content"] == "Hello world"


@pytest.mark.parametrize("last", [{"type": "http.disconnect"}, *(error() for error in DISCONNECT_ERRORS)])
async def test_a_client_that_goes_while_its_request_is_read_is_no_error_of_ours(
    service: ScriptedService, caplog: pytest.LogCaptureFixture, last: Any
) -> None:
    messages, sent = iter([{"type": "http.request", "body": b'{"mod', "more_body": True}, last]), list[Any]()

    async def receive() -> Any:
        message = next(messages)
        if isinstance(message, Exception):
            raise message
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": headers,
        "query_string": b"",
        "http_version": "1.1",
    }
    with caplog.at_level("INFO"):
        app = create_app(lambda: service, disconnect_errors=DISCONNECT_ERRORS)
        await app(scope, receive, send)
    assert sent == []
    assert "the client left" in caplog.text
    assert "internal error" not in caplog.text


async def test_each_refusal_is_told_once(service: ScriptedService) -> None:
    """For `manta_invalid_requests`."""
    told: list[str] = []

    class Locked:
        def authenticate(self, credentials: Sequence[str], scope: KeyScope | None) -> Caller:
            if not credentials:
                raise NotAuthenticated
            return ANONYMOUS

    app = create_app(lambda: service, authenticator=Locked, on_error=lambda error: told.append(code_of(error)))
    chat = {"model": MODEL, "messages": [USER]}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://manta") as client:

        async def code(method: str, path: str, *, key: bool = True, **sent: Any) -> str:
            headers = {**JSON, **({"authorization": "Bearer k"} if key else {}), **sent.pop("headers", {})}
            return str((await client.request(method, path, headers=headers, **sent)).json()["error"]["code"])

        answered = [
            await code("POST", CHAT, content=b"{not JSON"),
            await code("POST", CHAT, json={**chat, "temperature": "hot"}),
            await code("POST", CHAT, json={**chat, "model": "none such"}),
            await code("POST", CHAT, json={**chat, "model": "none such", "stream": True}),
            await code("POST", CHAT, content=b"x", headers={"content-type": "text/plain"}),
            await code("POST", CHAT, json=chat, key=False),
            await code("POST", "/v1/nowhere", json={}),
            await code("GET", CHAT),
        ]
        assert (await client.post(CHAT, json=chat, headers={"authorization": "Bearer k"})).status_code == 200
    assert told == answered
    assert answered == [
        *("invalid_value", "invalid_value", "model_not_found", "model_not_found", "unsupported_media_type"),
        *("invalid_api_key", "not_found", "method_not_allowed"),
    ]
