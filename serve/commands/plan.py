"""`manta plan`: which parallel layouts of a model fit on given GPUs."""

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.run.settings import DtypeName, KvDtypeName, QuantizeName
from serve.commands.settings import WRONG_USAGE, exit_with_error

if TYPE_CHECKING:
    from serve.planning.plan import Layout, Plan, PlanInputs
    from serve.planning.shape import ModelShape

DEFAULT_CONTEXT = 32 * 1024
NUMBER = re.compile(r"(\d+)([km]?)", re.IGNORECASE)
TIMES = {"": 1, "k": 1024, "m": 1024**2}


def plan(
    model: Annotated[
        str | None, typer.Argument(help="A released model (Qwen2-57B-A14B, Qwen2.5-7B-Instruct), a checkpoint folder, or its config.json.")
    ] = None,
    gpus: Annotated[str, typer.Option("--gpus", help="GPUs of each host: 8xH100-80G, or by memory alone: 4x24G.")] = "",
    hosts: Annotated[int, typer.Option("--hosts", min=1, max=64, help="Number of hosts with these GPUs.")] = 1,
    context: Annotated[str | None, typer.Option("--context", help="Tokens per sequence, prompt plus answer: 32k, 8192.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Concurrent sequences, over all replicas.")] = 64,
    dtype: Annotated[
        DtypeName,
        typer.Option("--dtype", help="As for manta serve; auto is bfloat16, and float32 is not planned."),
    ] = "auto",
    quantize: Annotated[
        QuantizeName | None, typer.Option("--quantize", help="As for manta serve; by default weights are as stored.")
    ] = None,
    kv_dtype: Annotated[
        KvDtypeName, typer.Option("--kv-dtype", help="As for manta serve; auto has 16 bits, fp8 holds twice the tokens.")
    ] = "auto",
    max_step_tokens: Annotated[
        int | None, typer.Option("--max-step-tokens", min=1, help="Maximum tokens per step (engine.max_step_tokens).")
    ] = None,
    redundant_experts: Annotated[
        int, typer.Option("--redundant-experts", min=0, help="Extra experts per layer on each ep position, beyond its share.")
    ] = 0,
    draft_model: Annotated[
        str | None, typer.Option("--draft-model", help="Draft model for speculative decoding, given like MODEL.")
    ] = None,
    network: Annotated[float, typer.Option("--network-gbit", min=0.1, help="Network bandwidth between hosts per GPU, in Gbit/s.")] = 100.0,
    emit: Annotated[
        Literal["config", "helm"] | None, typer.Option("--emit", help="Print settings for `manta serve -c`, or values for the Helm chart.")
    ] = None,
    layout: Annotated[
        int | None,
        typer.Option("--layout", min=1, help="Row of the table to emit; by default the first that can be served today."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="List every layout, valid or not.")] = False,
    table: Annotated[bool, typer.Option("--table", hidden=True, help="Print docs/layouts.md.")] = False,
) -> None:
    """Plan the parallel layout of a model: what fits, and how fast it could be.

    Prints the valid layouts, best first, with the memory use of the fullest rank, and why other layouts are invalid.
    Everything is computed; it needs neither the weights nor a GPU.

    \b
      manta plan Qwen2-57B-A14B --gpus 8xH100-80G --context 32k --concurrency 64
      manta plan Qwen2-72B --gpus 4xA100-80G --quantize int4 --kv-dtype fp8
      manta plan Qwen2.5-32B-Instruct --gpus 2xH100-80G
      manta plan ./checkpoint --gpus 8x24G --hosts 2 --json
      manta plan Qwen2-57B-A14B --gpus 8xH100-80G --hosts 2 --redundant-experts 1
      manta plan Qwen2-72B --gpus 4xH100-80G --draft-model Qwen2-0.5B
      manta plan Qwen2-7B --gpus 2xL4 --emit config > manta.yaml
    """
    from serve.planning.errors import PlanError

    if table:
        from serve.planning.layouts_page import layouts_page

        return typer.echo(layouts_page(), nl=False)
    if model is None or not gpus:
        exit_with_error("give a model and GPUs: manta plan Qwen2-7B --gpus 2xA100-40G", code=WRONG_USAGE)
    try:
        inputs = _inputs(model, gpus, hosts, context, concurrency, dtype, quantize, kv_dtype, max_step_tokens, network)
        made = _plan(replace(inputs, redundant_experts=redundant_experts, draft=_shape(draft_model)))
    except PlanError as error:
        exit_with_error(str(error), code=WRONG_USAGE)
    if emit is not None:
        return _emit(made, emit, layout)
    _show(made, as_json, everything)
    if not made.layouts:
        raise typer.Exit(1)


def _inputs(
    model: str,
    gpus: str,
    hosts: int,
    context: str | None,
    concurrency: int,
    dtype: DtypeName,
    quantize: QuantizeName | None,
    kv_dtype: KvDtypeName,
    max_step_tokens: int | None,
    network_gbit: float,
) -> "PlanInputs":
    from engine.config import EngineConfig
    from serve.planning.errors import PlanError
    from serve.planning.formats import ACTIVATION_BYTES, BF16, FLOAT16, FORMATS
    from serve.planning.hardware import Fleet, network, parse_gpus
    from serve.planning.memory import Workload
    from serve.planning.plan import PlanInputs
    from serve.planning.released_models import find_shape

    if dtype == "float32":
        raise PlanError("float32 is not planned: plans count 16 bits for activations and KV; use bfloat16 (the default) or float16")
    shape, defaults = find_shape(model), EngineConfig()
    stored = FLOAT16 if dtype == "float16" and shape.format is BF16 else shape.format
    count, gpu = parse_gpus(gpus)
    workload = Workload(
        context_tokens=min(DEFAULT_CONTEXT, shape.max_context_tokens) if context is None else parse_tokens(context),
        concurrency=concurrency,
        step_tokens=max_step_tokens or defaults.max_step_tokens,
        block_tokens=defaults.block_tokens,
        kv_element_bytes=1 if kv_dtype == "fp8" else ACTIVATION_BYTES,
    )
    fleet = Fleet(gpu=gpu, gpus_per_host=count, hosts=hosts, network=network(network_gbit))
    return PlanInputs(shape=shape, fleet=fleet, format=FORMATS[quantize] if quantize else stored, dtype=dtype, workload=workload)


def _shape(draft_model: str | None) -> "ModelShape | None":
    from serve.planning.released_models import find_shape

    return None if draft_model is None else find_shape(draft_model)


def _plan(inputs: "PlanInputs") -> "Plan":
    from serve.planning.plan import make_plan

    return make_plan(inputs)


def parse_tokens(text: str) -> int:
    """Parse a number of tokens: ``8192``, ``32k`` (times 1024) or ``1m`` (times 1024^2).

    Raises:
        PlanError: not a number of tokens, or zero.
    """
    from serve.planning.errors import PlanError

    found = NUMBER.fullmatch(text.strip())
    if found is None or int(found[1]) < 1:
        raise PlanError(f"--context {text!r} is not a number of tokens; write for example 32k or 8192")
    return int(found[1]) * TIMES[found[2].lower()]


def _show(plan: "Plan", as_json: bool, everything: bool) -> None:
    if as_json:
        from serve.planning import as_json as form

        return typer.echo(json.dumps(form.as_json(plan), indent=2))
    from serve.planning.render import render

    render(plan, everything=everything)


def _emit(plan: "Plan", what: Literal["config", "helm"], number: int | None) -> None:
    from serve.planning.emit import config_yaml, helm_yaml

    write = config_yaml if what == "config" else helm_yaml
    typer.echo(write(_chosen(plan, number), plan.inputs), nl=False)


def _chosen(plan: "Plan", number: int | None) -> "Layout":
    """Row ``number`` of the plan, or the first layout that can be served. Exits the program if there is no such layout."""
    if number is not None:
        if number > len(plan.layouts):
            exit_with_error(
                f"there are {len(plan.layouts)} layouts and no number {number}; run without --emit to see them", code=WRONG_USAGE
            )
        return plan.layouts[number - 1]
    if first := plan.first_served():
        return first
    if not plan.layouts:
        exit_with_error("no layout is valid; run without --emit to see why")
    reasons = "; ".join(dict.fromkeys(limit.sentence for limit in plan.layouts[0].limits))
    exit_with_error(f"none of the {len(plan.layouts)} valid layouts can be served today: {reasons}\n--layout 1 emits the best one anyway")
