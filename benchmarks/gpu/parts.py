"""The parts of the benchmark, run one by one in this process. `python -m benchmarks.gpu` starts it, and restarts it if it is lost."""

import argparse
import gc
import logging
import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import (
    ceilings,
    collectives,
    compare_settings,
    graph_replays,
    multi_gpu,
    peer_transformers,
    prefill_launches,
    whole_model,
    workloads,
)
from benchmarks.gpu.ceilings import GUESSED, Ceilings
from benchmarks.gpu.floors import Floors
from benchmarks.gpu.kernels.checks import TINY as TINY_SIZES
from benchmarks.gpu.kernels.checks import Checks, Sizes
from benchmarks.gpu.kernels.registry import CHECKS, run
from benchmarks.gpu.models import ServedModel, random_model
from benchmarks.gpu.results import HANG_S, Results, ended_after
from engine.request import SamplingParams
from engine.run.settings import QuantizeName
from parallel.quantised_format import BYTES

GREEDY, FILTERED = SamplingParams(temperature=0.0), SamplingParams(top_k=20, top_p=0.8, temperature=0.7)
PENALISED = replace(FILTERED, repetition_penalty=1.05)
"""The penalty of Qwen2's generation_config.json."""


@dataclass(frozen=True)
class ModelPart:
    """A model, and what is measured with it."""

    name: str
    shape: str
    quantize: QuantizeName | None = None
    layers: int | None = None
    """None = all."""
    rows: tuple[int, ...] = (1, 8, 32, 128)
    contexts: tuple[int, ...] = (1, 512, 6000, 14000, 30000)
    is_launched_too: bool = False
    """Whether steps are also measured without CUDA graphs."""
    beside: tuple[tuple[int, int, int], ...] = ()
    """Workloads for transformers: (sequences, tokens in, tokens out)."""
    num_sequences: int = 32
    """Sequences in each cell of W4."""
    cells: tuple[tuple[int, int], ...] = workloads.GRID
    sequences: tuple[int, int, int] = (256, 100, 1024)
    """W2: number of sequences, and the least and most tokens in and out of each."""
    minutes: float = 1.5


@dataclass
class Bench:
    results: Results
    device: torch.device
    tiny: bool
    ceilings: Ceilings = GUESSED

    def measure_ceilings(self) -> None:
        try:
            ceilings.measure(self.results, self.device, tiny=self.tiny)
        finally:
            self.ceilings = ceilings.found_in(self.results)  # those that were measured before an error

    def check_kernels(self, check: str) -> None:
        run(check, Checks(self.results, self.device, self.ceilings, TINY_SIZES if self.tiny else Sizes()))

    def check_whole(self) -> None:
        whole_model.check(self.results, self.device, tiny=self.tiny)

    def check_replays(self, part: ModelPart) -> None:
        graph_replays.check(self.results, part.name, self._serve(part, cuda_graphs=True, max_rows=64))  # captures a third fewer graphs

    def compare_early(self, part: ModelPart) -> None:
        self._compare(part, compare_settings.EARLY_LAUNCHES, compare_settings.UP_TO_PDL_ROWS)

    def compare_gated(self, part: ModelPart) -> None:
        self._compare(part, compare_settings.GATED_GEMV, compare_settings.FEW_ROWS)

    def _compare(self, part: ModelPart, ways: tuple[compare_settings.Way, ...], rows: tuple[int, ...]) -> None:
        model = random_model(part.shape, self.device, quantize=part.quantize, layers=part.layers)
        compare_settings.compare(self.results, part.name, model, ways, rows)

    def compare_prompts(self, part: ModelPart) -> None:
        prefill_launches.compare(self.results, part.name, self._serve(part, cuda_graphs=False))

    def measure_collectives(self) -> None:
        collectives.measure(self.results, self.device, tiny=self.tiny)

    def check_several(self) -> None:
        multi_gpu.check(self.results, self.device, tiny=self.tiny)

    def measure_model(self, part: ModelPart) -> None:
        context = 40 if self.tiny else 1024
        served = self._serve(part, cuda_graphs=True)
        floors = self._floors(part, served)
        steps = partial(workloads.steps, self.results, floors=floors, rows=part.rows, context=context)
        steps(part.name, served, kind=GREEDY)
        steps(part.name, served, kind=FILTERED)
        steps(part.name, served, kind=PENALISED)
        self._profile(part, served, context)
        workloads.single_stream(self.results, part.name, served, floors, part.contexts, 4 if self.tiny else 64)
        count, least, most = part.sequences
        workloads.many(self.results, part.name, served, floors, sequences=count, least=least, most=most)
        workloads.grid(self.results, part.name, served, floors, sequences=part.num_sequences, cells=part.cells)

    def measure_launched(self, part: ModelPart) -> None:
        served = self._serve(part, cuda_graphs=False)
        floors = self._floors(part, served)
        name = f"{part.name} launched"
        workloads.steps(self.results, name, served, floors, rows=part.rows, context=40 if self.tiny else 1024, kind=GREEDY)

    def measure_peer(self, part: ModelPart) -> None:
        peer_transformers.measure(self.results, part.name, part.shape, self.device, layers=part.layers, cells=list(part.beside))

    def _serve(self, part: ModelPart, *, cuda_graphs: bool, max_rows: int = 256) -> ServedModel:
        model = random_model(part.shape, self.device, quantize=part.quantize, layers=part.layers)
        kv_cache_bytes = 1 << 22 if self.device.type == "cpu" else None
        served = ServedModel(model, max_running=8 if self.tiny else max_rows, cuda_graphs=cuda_graphs, kv_cache_bytes=kv_cache_bytes)
        print(f"{part.name}: {served.runner}", flush=True)
        return served

    def _floors(self, part: ModelPart, served: ServedModel) -> Floors:
        model = served.model
        rate = self.ceilings.fp8_flop_per_s if part.quantize == "fp8" else self.ceilings.flop_per_s
        weight_bytes = BYTES[part.quantize] if part.quantize else model.dtype.itemsize
        return Floors(
            model.config, self.ceilings, weight_bytes=weight_bytes, kv_element_bytes=model.kv_layout.dtype.itemsize, rate=rate
        )  # fmt: skip

    def _profile(self, part: ModelPart, served: ServedModel, context: int) -> None:
        if self.device.type != "cuda":
            return
        for rows in (part.rows[0], part.rows[-1]):
            try:
                for kernel, time_us, number in workloads.profile(self.results, part.name, served, rows=rows, context=context)[:14]:
                    print(f"    {time_us:9.1f} us  {number:5} x  {kernel}", flush=True)
            except RuntimeError as error:  # the profiler does not work on this machine
                print(f"    no profile: {error}", flush=True)

    def forget(self) -> bool:
        """Free what a part left in memory. Returns False if the device is lost to this process: an illegal memory access of a kernel
        breaks the CUDA context, and may only be noticed after the part."""
        try:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"the device is lost: {error}", flush=True)
            return False
        return True


REPLAYED = {
    "replays": ModelPart("0.5B", "0.5B", layers=4),
    "replays of experts": ModelPart("57B-A14B", "57B-A14B", layers=1),
    "replays in fp8": ModelPart("7B fp8", "7B", "fp8", 2),
}
"""Few layers, so that rounding differences do not accumulate."""
EARLY = {
    "early launches of 0.5B": ModelPart("0.5B", "0.5B"),
    "early launches of 7B": ModelPart("7B", "7B"),
    "early launches of experts": ModelPart("57B-A14B", "57B-A14B", layers=4),
}
GATED = {f"gated gemv of {name}": ModelPart(name, shape, kind) for name, shape, kind in (("7B", "7B", None), ("7B int4", "7B", "int4"))}
PROMPTS = {"prompts of 0.5B": ModelPart("0.5B", "0.5B"), "prompts of 7B": ModelPart("7B", "7B")}
SHORT = ((128, 128), (2048, 128))
FEW = (64, 100, 512)
MODELS = (
    ModelPart("0.5B", "0.5B", is_launched_too=True, beside=((1, 512, 64), (32, 128, 64)), num_sequences=256),
    ModelPart("7B", "7B", is_launched_too=True, beside=((1, 512, 32), (32, 128, 32)), num_sequences=128, minutes=2.0),
    ModelPart("72B fp8", "72B", "fp8", rows=(1, 8, 32), contexts=(512, 6000), cells=SHORT, sequences=FEW, minutes=2.5),
    ModelPart("57B-A14B", "57B-A14B", rows=(1, 2, 8, 32), contexts=(512, 6000), cells=SHORT, sequences=FEW, minutes=2.0),
    ModelPart("57B-A14B fp8", "57B-A14B", "fp8", rows=(1, 2, 8, 32), contexts=(512,), cells=SHORT, sequences=FEW, minutes=2.0),
)
TINY = ModelPart("tiny", "tiny", rows=(1, 3), contexts=(5,), num_sequences=3, cells=((8, 4), (20, 3)), sequences=(5, 3, 9))
TINY_MODELS = (
    replace(TINY, is_launched_too=True, beside=((1, 5, 3),)),
    replace(TINY, name="tiny-moe", shape="tiny-moe"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.parts", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--each", type=float, default=math.inf)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--behind", help="continue after this part, and keep the results in --out")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device(options.device)
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    results = Results(options.out, options.minutes)
    bench = Bench(results, device, options.tiny)
    chosen = [part for part in parts(bench) if is_chosen(part[0], options.only)]
    if options.behind is not None:
        results.take_up()
        bench.ceilings = ceilings.found_in(results)
        chosen = chosen[[name for name, _, _ in chosen].index(options.behind) + 1 :]
    for name, its_minutes, measure in chosen:
        minutes = min(its_minutes, options.each)
        with ended_after(results.seconds_for(minutes) + HANG_S) if device.type == "cuda" else nullcontext():
            goes_on = results.run(name, minutes, measure, bench.forget)
        if not goes_on:
            return LOST
    print(results.table(), flush=True)
    return 1 if results.failed else 0


LOST = 3
"""Exit code if this process lost the device."""


def is_chosen(part: str, only: list[str]) -> bool:
    """Whether the part's name or a word of it starts with one of ``only``: "7B" does not select 57B-A14B, and "kernels: experts" selects
    neither other kernels nor other parts with experts."""
    return not only or any(name.startswith(wanted) for wanted in only for name in (part, *part.split()))


def parts(bench: Bench) -> list[tuple[str, float, Callable[[], None]]]:
    """All parts: (name, minutes, function)."""
    found: list[tuple[str, float, Callable[[], None]]] = [("ceilings", 0.5, bench.measure_ceilings)]
    found += [(f"kernels: {name}", minutes, partial(bench.check_kernels, name)) for name, (minutes, _) in CHECKS.items()]
    found.append(("kernels: all of them in whole models", 0.6, bench.check_whole))
    if bench.device.type == "cuda":
        found += [(name, 0.4, partial(bench.check_replays, part)) for name, part in REPLAYED.items()]
        found += [(name, 0.5, partial(bench.compare_early, part)) for name, part in EARLY.items()]
        found += [(name, 0.5, partial(bench.compare_gated, part)) for name, part in GATED.items()]
        found += [(name, 0.4, partial(bench.compare_prompts, part)) for name, part in PROMPTS.items()]
    if bench.tiny or torch.cuda.device_count() > 1:
        found.append(("several ranks of small models", 1.5, bench.check_several))
        found.append(("collectives", 0.7, bench.measure_collectives))
    for part in TINY_MODELS if bench.tiny else MODELS:
        found.append((part.name, part.minutes, partial(bench.measure_model, part)))
        if part.is_launched_too:
            found.append((f"{part.name} launched", 0.4, partial(bench.measure_launched, part)))
        if part.beside:
            found.append((f"{part.name} transformers", 0.5, partial(bench.measure_peer, part)))
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="    %(name)s: %(message)s")
    sys.exit(main())
