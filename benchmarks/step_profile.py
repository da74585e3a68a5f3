"""`python -m benchmarks.step_profile CHECKPOINT`: profile of a decode step on a CPU, by kernel, with the time between kernels.

Every function of our kernel library is timed, as are sampler, rank and engine. A caller's own part is its time minus that of what it calls.
Timing costs about 0.2 us per call.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.run.local_executor import LocalExecutor
from engine.run.runner import Runner
from engine.run.sampling.sampler import Sampler
from engine.run.settings import RunnerConfig
from model import native_layers
from model.qwen2 import Qwen2
from parallel.native import experts, sublayers
from parallel.native.library import native

Steps = list[dict[str, float]]
"""For each step: seconds by part; the key "step" is the whole step."""


SINGLE = {
    "screened": "head, by way of 8 bits",
    "add_norm": "norms",
    "gate": "gate",
    "rotate": "rotation",
    "layers": "all layers at once",
    "attention_sublayer": "norm and attention at once",
    "mlp_sublayer": "norm and MLP at once",
    "moe_sublayer": "norm and experts at once",
    "weighted_experts": "experts at once",
}


class Clock:
    """Seconds by part of the current step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name(*arguments)] += time.perf_counter() - began

        call.watched = function  # type: ignore[attr-defined]
        return call


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Time the library's functions, sampler, model and rank while the context is open."""
    library = native()
    if library is None:
        raise SystemExit("our kernels are not built here")
    put_back: list[Callable[[], None]] = []

    def watch(place: Any, name: str, part: Callable[..., str]) -> None:
        before = getattr(place, name)
        setattr(place, name, clock.timed(part, before))
        put_back.append(lambda: setattr(place, name, before))

    def watch_each(name: str, part: Callable[..., str]) -> None:
        functions: dict[Any, Any] = getattr(library, name)
        before = dict(functions)
        functions.update({key: clock.timed(part, function) for key, function in before.items()})
        put_back.append(lambda: functions.update(before))

    watch_each("linear", lambda *a: f"product {a[6]:,} -> {a[9]:,}")
    watch_each("experts", lambda *a: f"experts or gated product {a[10]:,} -> {a[12]:,}")
    for name, part in (("write_kv", "writing keys and values"), ("prefill", "attention of prompts"), ("decode", "attention")):
        watch_each(name, lambda *_, part=part: part)
    for name, part in SINGLE.items():
        watch(library, name, lambda *_, part=part: part)
    watch(Sampler, "sample", lambda *_: "sampling")
    for module in (sublayers, experts):  # calls between kernels are not timed
        before = module.address_of
        module.address_of = lambda function, before=before: before(getattr(function, "watched", function))
        put_back.append(lambda module=module, before=before: setattr(module, "address_of", before))
    for name in ("hidden", "logits"):
        watch(Qwen2, name, lambda *_: "(model)")
    watch(Runner, "begin", lambda *_: "(rank)")
    try:
        yield
    finally:
        for undo in reversed(put_back):
            undo()


def decode_steps(engine: Engine, clock: Clock, *, streams: int, tokens_in: int, tokens_out: int) -> Steps:
    """The steps in which every stream decodes one token."""
    for stream in range(streams):
        prompt = tuple((37 * stream + 11 * position) % 1000 for position in range(tokens_in))
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens_out)
        engine.submit(Request(id=f"{time.time_ns()}-{stream}", prompt=prompt, sampling=sampling))
    steps: Steps = []
    running, seen = streams, 0
    while running:
        clock.seconds.clear()
        began = time.perf_counter()
        events = engine.turn()
        took = time.perf_counter() - began
        running -= sum(event.finish_reason is not None for event in events)
        seen += 1
        if sum(len(event.tokens) for event in events) == streams and "attention of prompts" not in clock.seconds and running == streams:
            steps.append({**clock.seconds, "step": took})
    return steps


def table(steps: Steps) -> list[tuple[str, float]]:
    """(part, median seconds), largest first; time between parts is attributed to their callers."""
    parts = {name for step in steps for name in step}
    kernels = {name for name in parts if name not in ("step", "sampling") and not name.startswith("(")}
    rows = [{name: step.get(name, 0.0) for name in kernels | {"sampling"}} for step in steps]
    for row, step in zip(rows, steps, strict=True):
        row["model between its kernels"] = step["(model)"] - sum(row[name] for name in kernels)
        row["rank without model and sampling"] = step["(rank)"] - step["(model)"] - row["sampling"]
        row["engine"] = step["step"] - step["(rank)"]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return sorted(medians.items(), key=lambda item: -item[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--streams", type=int, action="append", help="may be repeated; 1, 8 and 32 without it")
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=24)
    parser.add_argument("--sublayer-by-sublayer", action="store_true", help="call each sublayer by itself, not all layers at once")
    parser.add_argument("--kernel-after-kernel", action="store_true", help="call each kernel by itself, so that all of them are seen")
    options = parser.parse_args()
    runner_config = RunnerConfig(quantize=options.quantize, kv_cache_bytes=300_000_000)
    clock = Clock()
    with watched(clock):  # from the start: layers keep what they call
        if options.sublayer_by_sublayer:
            native_layers.FEW_TOKENS = 0
        if options.kernel_after_kernel:
            Qwen2.native_layers = lambda *_: None
        executor = LocalExecutor.open(options.checkpoint, runner_config=runner_config, engine_config=EngineConfig())
        engine = Engine(executor, EngineConfig())
        for streams in options.streams or [1, 8, 32]:
            steps = decode_steps(engine, clock, streams=streams, tokens_in=options.tokens_in, tokens_out=options.tokens_out)
            whole_s = statistics.median(step["step"] for step in steps)
            print(f"\n{streams} streams, {options.quantize or 'bf16'}: {whole_s * 1e3:.2f} ms a step (median of {len(steps)})\n")
            print("| part | ms | of the step |\n|---|---|---|")
            for name, seconds in table(steps):
                print(f"| {name} | {seconds * 1e3:.3f} | {seconds / whole_s:.1%} |")
        executor.close()


if __name__ == "__main__":
    main()
