"""Reads rows.yaml: every row as an HTTP request, and as a gRPC call where it can be said there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from google.protobuf.message import Message

from serve.grpc.generated import service_pb2
from serve.grpc.requests import OPTIONAL

MODEL = "tiny"
PATHS = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "embedding": "/v1/embeddings",
    "response": "/v1/responses",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}
GOOD: dict[str, dict[str, Any]] = {
    "chat": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    "completion": {"model": MODEL, "prompt": "Once upon"},
    "embedding": {"model": MODEL, "input": "Once upon"},
    "response": {"model": MODEL, "input": "Once upon"},
    "tokenize": {"model": MODEL},
    "detokenize": {"model": MODEL},
}
METHODS = {
    "chat": ("Chat", service_pb2.ChatRequest),
    "completion": ("Generate", service_pb2.GenerateRequest),
    "embedding": ("Embed", service_pb2.EmbedRequest),
    "tokenize": ("Tokenize", service_pb2.TokenizeRequest),
    "detokenize": ("Detokenize", service_pb2.DetokenizeRequest),
}
STREAMS = {
    "chat": ("ChatStream", service_pb2.ChatStreamRequest),
    "completion": ("GenerateStream", service_pb2.GenerateStreamRequest),
}
GRPC_CODES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 413: "INVALID_ARGUMENT"}
GRPC_PARAMS = {"top_logprobs": ("top_logprobs", "logprobs")}


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    spec: dict[str, Any]

    @property
    def of(self) -> str:
        return str(self.spec.get("of", "chat"))

    @property
    def status(self) -> int:
        return int(self.spec.get("status", 400))

    @property
    def param(self) -> str | None:
        return self.spec.get("param")

    @property
    def code(self) -> str | None:
        return self.spec.get("code")

    @property
    def grpc_code(self) -> str:
        return str(self.spec.get("grpc_code", GRPC_CODES.get(self.status, "")))

    @property
    def over_http(self) -> bool:
        return bool({"set", "raw", "hex"} & self.spec.keys())

    @property
    def over_grpc(self) -> bool:
        said = {"grpc", "so_far"} & self.spec.keys()
        return (bool(said) and self.spec.get("grpc") != "none") or ("set" in self.spec and not said)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of the gRPC call."""
        return tuple(expanded(self.spec.get("metadata", {})).items())

    def http(self, *, model: str) -> dict[str, Any]:
        """Arguments for an HTTP client."""
        headers = {"content-type": "application/json"} | expanded(self.spec.get("headers", {}))
        return {
            "method": self.spec.get("method", "POST"),
            "url": self.spec.get("path", PATHS[self.of]),
            "content": self._body(model),
            "headers": {name: value for name, value in headers.items() if value},
        }

    def grpc(self, *, model: str) -> tuple[str, Message]:
        """The method's name and its request."""
        method, kind = METHODS[self.of]
        if isinstance(self.spec.get("grpc"), dict):
            asked = _as_protobuf(self.of, GOOD[self.of]) | expanded(self.spec["grpc"])
        else:
            asked = _as_protobuf(self.of, GOOD[self.of] | expanded(self.spec.get("set", {})))
        asked = _renamed(asked, model)
        if "so_far" in self.spec:
            method, kind = STREAMS[self.of]
            asked = {"request": asked, "soFar": expanded(self.spec["so_far"])}
        return method, json_format.ParseDict(asked, kind())

    def _body(self, model: str) -> bytes:
        if "hex" in self.spec:
            return bytes.fromhex(self.spec["hex"])
        if "raw" in self.spec:
            return str(expanded(self.spec["raw"])).encode().replace(b'"tiny"', json.dumps(model).encode())
        return json.dumps(_renamed(GOOD[self.of] | expanded(self.spec["set"]), model)).encode()


def rows() -> list[Row]:
    specs = yaml.safe_load((Path(__file__).parent / "rows.yaml").read_text())["rows"]
    return [Row(name=str(spec["name"]), spec=spec) for spec in specs]


def expanded(value: Any) -> Any:
    """With the short forms written out."""
    if isinstance(value, list):
        return [expanded(one) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((form, said),) = value.items()
        if form == "times":
            what, count = said
            return expanded(what) * count
        if form == "nested":
            return [] if said == 1 else [expanded({"nested": said - 1})]
        if form == "power":
            return 2**said
        if form == "numbered":
            count, what = said
            return {str(number): expanded(what) for number in range(count)}
        if form == "named":
            return [{"type": "function", "function": {"name": f"f{number}"}} for number in range(said)]
        if form == "wrapped":
            return "".join(expanded(said))
        if form == "keyed":
            key, what = expanded(said)
            return {key: what}
    return {key: expanded(one) for key, one in value.items()}


def _renamed(asked: dict[str, Any], model: str) -> dict[str, Any]:
    return asked | {"model": model} if asked.get("model") == MODEL else asked


def _as_protobuf(of: str, said: dict[str, Any]) -> dict[str, Any]:
    """What OpenAI's JSON says, in the fields of `manta.v1`."""
    options = {name: said[name] for name in (*OPTIONAL, "stop", "stop_token_ids", "logit_bias", "ignore_eos") if said.get(name) is not None}
    asked: dict[str, Any] = {"model": said["model"]}
    if of == "chat":
        asked["messages"] = [_message(one) for one in said["messages"]]
        asked |= _tools(said)
    elif of == "completion":
        asked["prompts"] = [_prompt(one) for one in _prompts(said["prompt"])]
    elif of == "embedding":
        asked["inputs"] = [_prompt(one) for one in _prompts(said["input"])]
    asked |= {name: said[name] for name in ("echo", "dimensions", "priority") if name in said}
    if form := _form(said):
        options["response_format"] = form
    if options:
        asked["options"] = options
    return asked


def _message(said: dict[str, Any]) -> dict[str, Any]:
    message = said | {"role": f"ROLE_{said['role'].upper()}"}
    if "tool_calls" in said:
        message["tool_calls"] = [{"id": call["id"], **call["function"]} for call in said["tool_calls"]]
    return message


def _tools(said: dict[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    if "tools" in said:
        functions = [tool["function"] for tool in said["tools"]]
        asked["tools"] = [one | ({"parameters": json.dumps(one["parameters"])} if "parameters" in one else {}) for one in functions]
    match said.get("tool_choice"):
        case str(mode):
            asked["tool_choice"] = {"mode": f"TOOL_CHOICE_MODE_{mode.upper()}"}
        case {"function": {"name": name}}:
            asked["tool_choice"] = {"function": name}
    return asked


def _form(said: dict[str, Any]) -> dict[str, Any] | None:
    match said.get("response_format") or said.get("structured_outputs"):
        case {"json_schema": {"schema": schema}}:
            return {"json_schema": json.dumps(schema)}
        case {"regex": regex}:
            return {"regex": regex}
        case {"choice": texts}:
            return {"choices": {"texts": texts}}
        case {"grammar": grammar}:
            return {"grammar": grammar}
    return None


def _prompts(prompt: Any) -> list[Any]:
    return [prompt] if isinstance(prompt, str) else prompt


def _prompt(prompt: Any) -> dict[str, Any]:
    return {"text": prompt} if isinstance(prompt, str) else {"token_ids": {"ids": prompt}}
