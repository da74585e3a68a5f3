"""Speculative decoding with a draft model: none, one that is always right, and one that rarely is. The answers must be the same.

    python -m benchmarks.speculative_decoding [--idle-layers 60] [--few-layers 6] [--streams 1 4] [--tokens 96] [--rounds 3]

The target model is the demo model plus layers that add nothing (their outputs are multiplied by 0): it gives the same answers as the demo
model at a higher cost. So the demo model is a perfect draft model for it, and the demo model's first few layers are a bad one. How often
real pairs agree is shown by the metric ``manta_accepted_draft_tokens_total``; here the acceptance rate is known, so that the cost of
speculation can be measured.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.run.local_executor import LocalExecutor
from engine.run.settings import RunnerConfig
from model.checkpoint import Checkpoint, write_checkpoint
from serve.config import ModelSettings
from serve.model_source import find_model

OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
PROMPT_TOKENS = 64


def with_layers(source: Path, place: Path, count: int) -> Path:
    """Write the checkpoint with its first ``count`` layers; if it has fewer, layers that add nothing follow."""
    config = json.loads((source / "config.json").read_text())
    there = config["num_hidden_layers"]
    with Checkpoint(source) as checkpoint:
        tensors = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    for layer in range(count):
        prefix, like = f"model.layers.{layer}.", f"model.layers.{min(layer, there - 1)}."
        for name in [name for name in tensors if name.startswith(like)]:
            rest = name.removeprefix(like)
            kept[prefix + rest] = tensors[name] * 0 if layer >= there and rest in OUTPUTS else tensors[name].clone()
    place.mkdir()
    for file in source.glob("*.json"):
        if "safetensors" not in file.name:
            shutil.copy(file, place)
    write_checkpoint(place, kept, config | {"num_hidden_layers": count})
    return place


class ServedModel:
    """An engine with or without a draft model."""

    def __init__(self, name: str, folder: Path, draft: Path | None) -> None:
        self.name = name
        config = EngineConfig(speculate="draft" if draft else None, prefix_cache=False)
        runner = RunnerConfig(device="cpu", draft_model=str(draft) if draft else None, kv_cache_bytes=1 << 30)
        self._executor = LocalExecutor.open(folder, runner_config=runner, engine_config=config)
        self.engine = Engine(self._executor, config)
        self.answers: dict[int, list[tuple[int, ...]]] = {}

    def close(self) -> None:
        self._executor.close()

    def run(self, streams: int, tokens: int) -> float:
        """Tokens a second."""
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens)
        for number in range(streams):
            prompt = tuple(1000 + (37 * number + 11 * place) % 9000 for place in range(PROMPT_TOKENS))
            self.engine.submit(Request(id=str(number), prompt=prompt, sampling=sampling))
        told: dict[str, list[int]] = {}
        began = time.perf_counter()
        while True:
            for event in self.engine.turn():
                told.setdefault(event.request_id, []).extend(event.tokens)
            if not self.engine.scheduler.num_requests:
                break
        seconds = time.perf_counter() - began
        self.answers[streams] = [tuple(told[name]) for name in sorted(told)]
        return streams * tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle-layers", type=int, default=60)
    parser.add_argument("--few-layers", type=int, default=6)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    demo = find_model(ModelSettings()).folder
    layers = json.loads((demo / "config.json").read_text())["num_hidden_layers"]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        deep = with_layers(demo, Path(folder) / "deep", layers + arguments.idle_layers)
        few = with_layers(demo, Path(folder) / "few", arguments.few_layers)
        drafts = {"none": None, "always right": demo, "rarely right": few}
        served = [stack.enter_context(closing(ServedModel(name, deep, draft))) for name, draft in drafts.items()]
        print(f"{layers + arguments.idle_layers} layers; drafts of {layers} and {arguments.few_layers}; {torch.get_num_threads()} threads")
        print(f"{'streams':>8}  {'draft model':<14}{'tokens/s':>10}{'of none':>9}{'held':>7}{'tokens/step':>13}  answers")
        for streams in arguments.streams:
            compare(served, streams, arguments.tokens, arguments.rounds)


def compare(served: list[ServedModel], streams: int, tokens: int, rounds: int) -> None:
    """Run all models in interleaved rounds and print their figures; the first round is not counted."""
    rates: dict[str, list[float]] = {one.name: [] for one in served}
    before = [one.engine.stats for one in served]
    for count in range(rounds + 1):
        for one in served:
            rate = one.run(streams, tokens)
            rates[one.name] += [rate] if count else []
    for one, was in zip(served, before, strict=True):
        now, plain = one.engine.stats, statistics.median(rates[served[0].name])
        rate, drafted = statistics.median(rates[one.name]), now.drafted_tokens - was.drafted_tokens
        held = f"{(now.accepted_tokens - was.accepted_tokens) / drafted:.0%}" if drafted else "-"
        a_step = (rounds + 1) * tokens * streams / (now.num_steps - was.num_steps)
        same = "the same" if one.answers[streams] == served[0].answers[streams] else "others"
        print(f"{streams:>8}  {one.name:<14}{rate:>10.1f}{rate / plain:>9.2f}{held:>7}{a_step:>13.2f}  {same}")


if __name__ == "__main__":
    main()
