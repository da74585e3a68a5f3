"""The settings that have a flag of their own, in one table; each command picks the flags that apply to it."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

Given = Mapping[str, tuple[str, object]]
"""Path of a setting to (flag name, value); the value is None if the flag was not given."""
MODEL_HELP = (
    "`demo` (default), a checkpoint folder, a Hugging Face repository (owner/name), modelscope://owner/name, or s3://bucket/folder."
)


@dataclass(frozen=True)
class Flag:
    setting: str
    """Path of the setting, section.field"""
    names: tuple[str, ...]
    """Spellings of the flag; a name without dashes is a positional argument."""
    kind: type
    help: str

    @property
    def parameter(self) -> str:
        """Name of the function parameter; --help shows it for positional arguments."""
        return self.names[0].lstrip("-").replace("-", "_").lower()

    @property
    def annotation(self) -> object:
        info = typer.Option(*self.names, help=self.help) if self.names[0].startswith("-") else typer.Argument(help=self.help)
        return Annotated[self.kind | None, info]


def model_flag(help: str = MODEL_HELP) -> Flag:
    return Flag("model.source", ("MODEL",), str, help)


LAYOUT = (
    Flag("parallel.tensor", ("--tensor-parallel", "-t"), int, "Tensor-parallel ranks per replica."),
    Flag("parallel.expert", ("--expert-parallel",), int, "Expert-parallel groups (Qwen2-MoE)."),
    Flag("parallel.pipeline", ("--pipeline-parallel",), int, "Pipeline stages per replica."),
    Flag("parallel.data", ("--data-parallel",), int, "Data-parallel copies of the attention in a replica."),
)
REVISION = Flag("model.revision", ("--revision",), str, "Branch, tag or commit on the hub.")
ADAPTER = Flag("model.adapter", ("--adapter",), str, "LoRA adapter to merge into the weights: a folder, repository or URL.")
WEIGHTS = (
    Flag("runner.dtype", ("--dtype",), str, "auto, bfloat16, float16 or float32."),
    Flag("runner.quantize", ("--quantize",), str, "Quantize the weights while loading: int8, int4, or (GPUs) fp8."),
)
KV_AND_CONTEXT = (
    Flag("runner.kv_dtype", ("--kv-dtype",), str, "KV cache dtype: auto, or (GPUs) fp8, which holds twice the tokens."),
    Flag("runner.max_context_tokens", ("--max-context-tokens",), int, "Limit of prompt plus answer, below the model's own."),
)
DRAFTING = (
    Flag("engine.speculate", ("--speculate",), str, "Speculative decoding, same answers: lookup (n-gram) or draft (--draft-model)."),
    Flag("runner.draft_model", ("--draft-model",), str, "Draft model with the same vocabulary, given like MODEL."),
)
FRONTS = (
    Flag("http.host", ("--http-host",), str, "Address that the HTTP API listens on (127.0.0.1)."),
    Flag("http.port", ("--http-port",), int, "Port of the HTTP API (8000)."),
    Flag("grpc.host", ("--grpc-host",), str, "Address that the gRPC API listens on (127.0.0.1)."),
    Flag("grpc.port", ("--grpc-port",), int, "Port of the gRPC API (9000)."),
)
RAY_ADDRESS = Flag("ray.address", ("--ray-address",), str, "Existing Ray cluster: auto (this host's) or host:port of its head.")
APP = Flag("ray.app", ("--app",), str, "Application name on the cluster (manta).")
SERVER = (
    model_flag(),
    Flag("model.name", ("--name",), str, "Model name that clients use."),
    REVISION,
    ADAPTER,
    *LAYOUT,
    Flag("replicas.count", ("--replicas", "-r"), int, "Number of replicas of the model."),
    *WEIGHTS,
    *KV_AND_CONTEXT,
    *DRAFTING,
    *FRONTS,
    RAY_ADDRESS,
    Flag("logging.level", ("--log-level",), str, "debug, info, warning or error."),
)
"""Flags of the commands that start a server, on this machine or on a cluster."""


def with_flags(*flags: Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: replace the command's parameter `given` by these flags on the command line, and pass their values as `given`."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**values: Any) -> None:
            command(given={flag.setting: (flag.names[0], values.pop(flag.parameter)) for flag in flags}, **values)

        called.__signature__ = inspect.Signature(list(_parameters(command, flags)))  # type: ignore[attr-defined]  # typer reads it
        return called

    return wrap


def _parameters(command: Callable[..., None], flags: tuple[Flag, ...]) -> "list[inspect.Parameter]":
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "given":
            shown += [inspect.Parameter(flag.parameter, parameter.KEYWORD_ONLY, default=None, annotation=flag.annotation) for flag in flags]
        else:
            shown.append(parameter)
    return shown
