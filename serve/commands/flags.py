"""The settings that have a flag of their own: one table, and each command takes of it what makes sense there."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

Given = Mapping[str, tuple[str, object]]
"""By the path of a setting: its flag as it is written, and the value, None where it was not given."""
MODEL_HELP = (
    "`demo` (the default), a checkpoint folder, a repository of the Hugging Face hub, modelscope://owner/name, or s3://bucket/folder."
)


@dataclass(frozen=True)
class Flag:
    setting: str
    """Its path, section.field"""
    names: tuple[str, ...]
    """As it may be written; one without dashes stands by itself."""
    kind: type
    help: str

    @property
    def parameter(self) -> str:
        """What the command's function is given it as, which --help shows of what stands by itself."""
        return self.names[0].lstrip("-").replace("-", "_").lower()

    @property
    def annotation(self) -> object:
        info = typer.Option(*self.names, help=self.help) if self.names[0].startswith("-") else typer.Argument(help=self.help)
        return Annotated[self.kind | None, info]


def model_flag(help: str = MODEL_HELP) -> Flag:
    return Flag("model.source", ("MODEL",), str, help)


LAYOUT = (
    Flag("parallel.tensor", ("--tensor-parallel", "-t"), int, "Ranks that share heads, MLPs and vocabulary."),
    Flag("parallel.expert", ("--expert-parallel",), int, "Groups of ranks that share routed experts."),
    Flag("parallel.pipeline", ("--pipeline-parallel",), int, "Stages of layers."),
    Flag("parallel.data", ("--data-parallel",), int, "Copies of the attention within a replica."),
)
REVISION = Flag("model.revision", ("--revision",), str, "Branch, tag or commit on the hub.")
ADAPTER = Flag("model.adapter", ("--adapter",), str, "LoRA adapter to add to the weights: a folder, or named as MODEL is.")
WEIGHTS = (
    Flag("runner.dtype", ("--dtype",), str, "auto, bfloat16, float16 or float32."),
    Flag("runner.quantize", ("--quantize",), str, "int8, int4, or on GPUs fp8: round weights while loading."),
)
KV_AND_CONTEXT = (
    Flag("runner.kv_dtype", ("--kv-dtype",), str, "auto, or on GPUs fp8: twice as many tokens fit."),
    Flag("runner.max_context_tokens", ("--max-context-tokens",), int, "Prompt and answer together: lowers the model's limit."),
)
DRAFTING = (
    Flag("engine.speculate", ("--speculate",), str, "Speculative decoding, no answer changes: lookup (n-gram), or draft (--draft-model)."),
    Flag("runner.draft_model", ("--draft-model",), str, "Small model of the same vocabulary that guesses, named as MODEL is."),
)
FRONTS = (
    Flag("http.host", ("--http-host",), str, "Address of the HTTP front (127.0.0.1)."),
    Flag("http.port", ("--http-port",), int, "Port of the HTTP front (8000)."),
    Flag("grpc.host", ("--grpc-host",), str, "Address of the gRPC front (127.0.0.1)."),
    Flag("grpc.port", ("--grpc-port",), int, "Port of the gRPC front (9000)."),
)
RAY_ADDRESS = Flag("ray.address", ("--ray-address",), str, "A Ray that runs already: auto (the one of this host) or host:port of its head.")
APP = Flag("ray.app", ("--app",), str, "Name of the application (manta).")
SERVER = (
    model_flag(),
    Flag("model.name", ("--name",), str, "What clients call the model."),
    REVISION,
    ADAPTER,
    *LAYOUT,
    Flag("replicas.count", ("--replicas", "-r"), int, "Copies of the whole model."),
    *WEIGHTS,
    *KV_AND_CONTEXT,
    *DRAFTING,
    *FRONTS,
    RAY_ADDRESS,
    Flag("logging.level", ("--log-level",), str, "debug, info, warning or error."),
)
"""Of whatever starts a server, here or on a cluster."""


def with_flags(*flags: Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Of a command: its parameter `given` becomes these flags on the command line, and holds them when it is called."""

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
