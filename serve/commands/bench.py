"""`manta bench`: measure the engine on this machine, without fronts, Ray or network."""

import json
import resource
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.counted import counted
from serve.commands.flags import ADAPTER, DRAFTING, LAYOUT, REVISION, WEIGHTS, Given, model_flag, with_flags
from serve.commands.progress import Report, progress_shown
from serve.commands.settings import Assignments, ConfigFile, exit_with_error, load_settings

if TYPE_CHECKING:
    from engine.executor import Executor
    from engine.run.start import StartProgress
    from serve.bench.report import Figure
    from serve.bench.workload import Workload
    from serve.config import ServeConfig
    from serve.model_source import FoundModel


@with_flags(model_flag(), REVISION, ADAPTER, *LAYOUT, *WEIGHTS, *DRAFTING)
def bench(
    *,
    file: ConfigFile = None,
    given: Given,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measured rounds of each workload; medians are shown.")] = 3,
    warm_up: Annotated[bool, typer.Option("--warm-up/--no-warm-up", help="Run an unmeasured round of each workload first.")] = True,
    tokens_out: Annotated[int | None, typer.Option("--tokens-out", min=1, help="Limit the output tokens of every workload.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Run only workloads whose name contains this; may be repeated.")] = None,
    assignments: Assignments = None,
) -> None:
    """Benchmark the engine alone and compare it with this machine's limits.

    Closed loop: each workload submits identical requests at once, with random token ids as prompts, greedy sampling and a fixed
    output length. The floor is the least time this machine needs to read the weights or to multiply, at rates measured in the same run.

    \b
      manta bench demo
      manta bench demo --tensor-parallel 2 --only stream
      manta bench ./checkpoint --quantize int8 --rounds 5
      manta bench serve --help                       benchmark a running server
    """
    config, *others = load_settings(file, assignments, given).config.each_model()
    if others:
        exit_with_error("the settings list several models, but only one can be measured at a time: give one model, without the list")
    from serve.bench.report import TITLE, as_json, table_of
    from serve.model_check import with_local_draft_model
    from serve.model_source import ModelSourceError, find_model
    from serve.terminal import results, wrapped

    try:
        with progress_shown() as report:
            found = find_model(config.model, report)
            workloads = chosen_workloads(only, tokens_out)
            config = with_local_draft_model(config, found.location, report)
            lines, figures = measure(config, found, rounds, workloads, report, warm_up=warm_up)
    except (ModelSourceError, ValueError) as error:
        exit_with_error(str(error))
    console = results()
    for line in (*lines, TITLE):
        console.print("\n".join(wrapped(line, console.width, then="  ")), markup=False, soft_wrap=True)
    console.print(table_of(figures))
    if json_file is not None:
        json_file.write_text(json.dumps({"lines": lines, "cells": as_json(figures)}, indent=2) + "\n")


def chosen_workloads(only: Sequence[str] | None, tokens_out: int | None) -> list["Workload"]:
    """The workloads whose name contains one of the strings in `only`, or all workloads if it is not given.

    Raises:
        ValueError: no workload matches.
    """
    from serve.bench.workload import WORKLOADS

    workloads = [workload for workload in WORKLOADS if not only or any(part in workload.name for part in only)]
    if not workloads:
        raise ValueError(
            f"no workload is called {' or '.join(only or ())}; there are: {', '.join(workload.name for workload in WORKLOADS)}"
        )
    return workloads if tokens_out is None else [workload.shortened(tokens_out) for workload in workloads]


def measure(
    config: "ServeConfig", found: "FoundModel", rounds: int, workloads: Sequence["Workload"], report: Report, *, warm_up: bool = True
) -> tuple[list[str], list["Figure"]]:
    """Run all workloads. Returns lines that describe the model and machine, and a figure per workload.

    Raises:
        ValueError: the model cannot be run with these settings.
    """
    import torch

    from engine.engine import Engine
    from engine.gc_tuning import tune_gc
    from engine.run.host_resources import usable_cores
    from engine.run.start import choose_weight_formats, resolve_device, resolve_dtype
    from model.checkpoint import Checkpoint
    from model.config import ModelConfig
    from serve.bench.ceiling import measure_ceiling
    from serve.bench.control_plane import SEQUENCES, control_plane_s
    from serve.bench.report import summarise
    from serve.bench.weights import format_name, weight_bytes
    from serve.bench.workload import run_rounds

    model_config = ModelConfig.from_checkpoint(found.folder)
    device = resolve_device(config.runner.device)
    dtype = resolve_dtype(config.runner.dtype, device)
    report("measuring the machine", 0.0)
    ceiling = measure_ceiling(dtype, device, usable_cores())
    with Checkpoint(found.location) as checkpoint:
        formats = choose_weight_formats(checkpoint, model_config, config.runner, dtype, device)
    weights = weight_bytes(model_config, formats)
    figures = []
    with ExitStack() as running:
        executor = _executor(config, found, report)
        running.callback(executor.close)
        engine = Engine(executor, config.engine)
        tune_gc()  # as a rank and a replica do
        done = 0
        for workload in workloads:

            def count_round(name: str = workload.name) -> None:
                nonlocal done
                done += 1
                report(name, 0.1 + 0.9 * done / (len(workloads) * (rounds + warm_up)))

            results = run_rounds(
                engine, workload, vocab_size=model_config.vocab_size, rounds=rounds, after_round=count_round, warm_up=warm_up
            )
            figures.append(summarise(workload, results, weights, ceiling))
    lines = [
        f"{found.name}: {config.parallel.topology}, {str(dtype).removeprefix('torch.')} on {device}, torch {torch.__version__}",
        f"weights: {format_name(formats.matrices)}, embedding and head: {format_name(formats.table)}",
        f"machine: {counted(usable_cores(), 'core')}, reads {ceiling.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"copies {ceiling.copy_bytes_per_s / 1e9:.1f}, multiplies {ceiling.flop_per_s / 1e9:,.0f} GFLOP/s",
        f"deciding a step of {SEQUENCES} sequences takes {control_plane_s() * 1e6:,.0f} us of CPU",
        f"a step reads at least {weights.per_step / 1e6:,.0f} MB of weights",
        f"most memory held by this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB",
    ]
    return lines, figures


def _executor(config: "ServeConfig", found: "FoundModel", report: Report) -> "Executor":
    from engine.run.local_executor import LocalExecutor
    from engine.run.process_executor import ProcessExecutor

    def tell(progress: "StartProgress") -> None:
        report(f"starting: {progress.phase.replace('_', ' ')}", 0.1 * progress.done / max(progress.total, 1))

    topology = config.parallel.topology
    if topology.size == 1:
        return LocalExecutor.open(
            found.location, runner_config=config.runner, engine_config=config.engine, adapter=found.adapter, on_progress=tell
        )
    return ProcessExecutor(
        checkpoint_folder=found.location,
        topology=topology,
        runner_config=config.runner,
        engine_config=config.engine,
        adapter=found.adapter,
    )
