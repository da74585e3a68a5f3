"""Measure one shape with vLLM in this process, for `benchmarks.gpu.peer_vllm`."""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import config_of
from benchmarks.gpu.parts import MODELS, TINY, ModelPart, is_chosen
from benchmarks.gpu.results import HANG_S, Results, ended_after
from benchmarks.gpu.workloads import drawn, mixed

START_S = 150.0
"""Time for vLLM to become ready."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # vLLM looks for FlashInfer's sampler even for greedy sampling, and it is not installed everywhere.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


@dataclass(frozen=True)
class Way:
    """How vLLM is started."""

    name: str
    compilation: dict[str, Any] = field(default_factory=dict)
    """vLLM's `compilation_config`."""
    environment: dict[str, str] = field(default_factory=dict)


GRAPHS_ALONE = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "custom_ops": ["all"]}
WAYS = (
    Way("vllm"),
    Way("vllm not compiled", GRAPHS_ALONE, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
)
"""First with its defaults: torch.compile, CUDA graphs (full for decode steps, piecewise for others), a separate engine process. Then with
its own fused kernels instead of Inductor's and in one process, which starts quickly and is less likely to fail."""

PARTS = {part.name: part for part in (*MODELS, replace(TINY, name="small", shape="small"))}
"""The last one only tests the script; vLLM does not support heads as small as in our tiny models."""

_ids = count()
_started: list["Peer"] = []
"""Never shut down: that would take seconds of device time; the process just exits."""


class Peer:
    """An engine of vLLM."""

    def __init__(self, part: ModelPart, way: Way, folder: Path, also: dict[str, Any]) -> None:
        """``folder``: where to write the model's config.json. ``also``: further arguments of `vllm.LLM`, which override ours."""
        from vllm import LLM

        raw = config_of(part.shape, part.layers)
        (folder / "config.json").write_text(json.dumps(raw))
        self.vocab_size: int = raw["vocab_size"]
        ours: dict[str, Any] = {
            "model": str(folder),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "enable_prefix_caching": False,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "gpu_memory_utilization": 0.85,
        }
        if part.quantize is not None:
            ours["quantization"] = part.quantize
        ours |= also
        if compilation := way.compilation | also.get("compilation_config", {}):
            ours["compilation_config"] = compilation
        self.engine: Any = LLM(**ours).llm_engine

    def submit(self, prompt: tuple[int, ...], tokens_out: int, *, streams: bool) -> None:
        """``streams``: deliver tokens as they come, like a server; otherwise all at the end, like `LLM.generate`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens_out, ignore_eos=True, detokenize=False, output_kind=kind)
        self.engine.add_request(f"gpu-{next(_ids)}", {"prompt_token_ids": list(prompt)}, sampling)


def closed_loop(
    results: Results, peer: Peer, requests: Sequence[tuple[int, int]], seed: int, *, streams: bool = False
) -> tuple[float, float, float]:
    """Run all requests at once. Returns (seconds, seconds until the first step ended, median gap between steps). For one streaming sequence
    this is the gap between tokens.

    Raises:
        RuntimeError: the number of tokens is not the requested one.
    """
    prompts = drawn(requests, seed, peer.vocab_size)
    wanted = sum(tokens_out for _, tokens_out in requests)
    ends, tokens = list[float](), 0
    began = time.perf_counter()
    for prompt, (_, tokens_out) in zip(prompts, requests, strict=True):
        peer.submit(prompt, tokens_out, streams=streams)
    while peer.engine.has_unfinished_requests():
        outputs = peer.engine.step()
        if outputs or not streams:
            ends.append(time.perf_counter())
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        results.go_on()
    if tokens != wanted:
        raise RuntimeError(f"{tokens} tokens came, of {wanted}")
    gaps = [after - before for before, after in pairwise(ends)]
    return ends[-1] - began, ends[0] - began, statistics.median(gaps) if gaps else 0.0


def measure(results: Results, name: str, part: ModelPart, peer: Peer, only: list[str]) -> None:
    """``name``: part name of the figures. ``only``: selects workloads such as ``W1 512``, ``W2``, ``W4 128/2048`` by prefixes of words."""
    for context in part.contexts:
        if is_chosen(f"W1 {context}", only):
            request = [(context, 4 if part.name == "small" else 64)]
            rounds = [closed_loop(results, peer, request, seed, streams=True) for seed in range(3)][1:]
            first_s, gap_s = (statistics.median(one[at] for one in rounds) for at in (1, 2))
            results.add(name, f"W1 prompt of {context}", first_s * 1000, "ms")
            results.add(name, f"W1 one stream behind {context}", 1 / gap_s, "tokens/s")
    if is_chosen("W2", only):
        number, least, most = part.sequences
        requests = mixed(number, least, most)
        seconds, _, gap_s = closed_loop(results, peer, requests, seed=1)
        results.add(name, f"W2 {number} sequences", sum(tokens_out for _, tokens_out in requests) / seconds, "tokens/s")
        results.add(name, "W2 gap between steps", gap_s * 1000, "ms")
    for tokens_in, tokens_out in part.cells:
        if is_chosen(f"W4 {tokens_in}/{tokens_out}", only):
            cell = f"W4 {part.num_sequences} x {tokens_in}/{tokens_out}"
            seconds, _, gap_s = closed_loop(results, peer, [(tokens_in, tokens_out)] * part.num_sequences, seed=tokens_in)
            results.add(name, cell, part.num_sequences * tokens_out / seconds, "tokens/s")
            results.add(name, f"  {cell}, gap between steps", gap_s * 1000, "ms")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.peer_vllm_parts", description=__doc__)
    parser.add_argument("--shape", choices=PARTS, required=True)
    parser.add_argument("--way", type=int, default=0)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--also", type=json.loads, default={})
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    part, way = PARTS[options.shape], WAYS[options.way]
    os.environ.update(OFFLINE | way.environment)
    results = Results(options.out, options.minutes)
    if options.out is not None:
        results.take_up()
    name = f"{options.shape} {way.name}"
    with tempfile.TemporaryDirectory() as folder:

        def start() -> None:
            _started.append(Peer(part, way, Path(folder), options.also))

        with ended_after(min(START_S, results.seconds_for(options.minutes))):
            results.run(f"{name}, its start", options.minutes, start)
        for peer in _started:
            with ended_after(results.seconds_for(options.minutes) + HANG_S):
                results.run(name, options.minutes, partial(measure, results, name, part, peer, options.only))
    return 0 if _started and name not in results.failed else 1


if __name__ == "__main__":
    ended_with = main()
    sys.stdout.flush()
    os._exit(ended_with)  # `peer_vllm` kills what remains
