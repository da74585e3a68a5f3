"""The workloads of `manta bench` for other engines. Imports nothing of Manta, because other engines run in environments without it."""

import json
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

VOCAB_SIZE = 151_936


@dataclass(frozen=True)
class Workload:
    name: str
    streams: int
    tokens_in: int
    tokens_out: int
    shared_prefix: int = 0

    def prompts(self, seed: int) -> list[list[int]]:
        draw = random.Random(seed)
        prefix = [draw.randrange(VOCAB_SIZE) for _ in range(self.shared_prefix)]
        return [prefix + [draw.randrange(VOCAB_SIZE) for _ in range(self.tokens_in)] for _ in range(self.streams)]


def workloads(tokens_out: int, only: Sequence[str] = ()) -> list[Workload]:
    """The workloads with at most ``tokens_out`` tokens out; with ``only``, those whose name contains one of its strings."""

    def streams(count: int) -> Workload:
        return Workload(f"{count} stream{'s' * (count > 1)} 128/{min(128, tokens_out)}", count, 128, min(128, tokens_out))

    first = [Workload("prefill 1,024", 1, 1024, 1), *map(streams, (1, 8, 16, 32))]
    every = [*first, Workload("16 on one 1,024 prefix", 16, 32, min(32, tokens_out), 1024)]
    return [workload for workload in every if not only or any(part in workload.name for part in only)]


Generate = Callable[[list[list[int]], int], None]
"""Called with (prompts, tokens out): generates exactly this many tokens for each prompt, greedily, all prompts in one batch."""


def measure(generate: Generate, chosen: list[Workload]) -> None:
    """Run each workload once, after a short warm-up, and print the results as JSON on the last line of stdout."""
    generate([[1, 2, 3, 4] * 16], 4)
    found = []
    for workload in chosen:
        prompts = workload.prompts(time.time_ns())
        started = time.perf_counter()
        generate(prompts, workload.tokens_out)
        elapsed_s = time.perf_counter() - started
        tokens = len(prompts) * (len(prompts[0]) if workload.tokens_out == 1 else workload.tokens_out)
        found.append({"name": workload.name, "tokens_per_s": tokens / elapsed_s, "elapsed_s": elapsed_s})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"cells": found, "peak_bytes": peak}))
