"""Check small models on several GPUs of this host, as the ranks of one replica: logits against the same weights in float32 on the CPU, and
tokens of steps replayed from CUDA graphs, including the all-reduces, against the same steps launched eagerly.

This has not run on GPUs yet; on CPUs, two ranks of tiny models test the script.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.queues import Queue

import torch
from torch import Tensor

from benchmarks.gpu import whole_model
from benchmarks.gpu.collectives import START_S, Figure, figures_of
from benchmarks.gpu.models import RandomCheckpoint, RandomTensor, config_of, random_model
from benchmarks.gpu.results import Results
from engine.config import EngineConfig
from engine.plan import NewSequence, StepPlan, Work
from engine.request import SamplingParams
from engine.run.sampling.sampler import Sampler
from engine.run.settings import RunnerConfig
from engine.run.start import make_runner
from model.config import ModelConfig
from model.qwen2 import Qwen2
from parallel.groups import Rendezvous, open_groups
from parallel.topology import Topology

MOST_RANKS = 4
PROMPTS, STEPS = (37, 5, 18), 6
"""Prompt lengths of three sequences, and the number of steps."""
LOGITS, TOKENS = "logits of the median row, error", "tokens that differ, replayed and launched"


@dataclass(frozen=True)
class SeededTensor(RandomTensor):
    """A random tensor seeded by its name, so that every rank reads the same values."""

    @cached_property
    def whole(self) -> Tensor:
        if self.name.endswith("norm.weight"):
            return torch.ones(self.shape, dtype=self.dtype)
        return (0.02 * torch.randn(self.shape, generator=_seeded(self.name))).to(self.dtype)

    def read(self, *slices: slice) -> Tensor:
        return self.whole[slices]


def check(results: Results, device: torch.device, *, tiny: bool) -> None:
    """
    Raises:
        AssertionError: logits or tokens differ. Raised after everything was compared.
        RuntimeError: a rank died, or the ranks took too long.
    """
    ranks = min(torch.cuda.device_count(), MOST_RANKS) if device.type == "cuda" else 2
    shapes = ("tiny", "tiny-moe") if tiny else ("small", "small-moe")
    wrong = []
    for shape in shapes:
        results.go_on()
        for name, value, unit in figures_of(_rank, ranks, device.type, shape):
            results.add("several GPUs", f"{shape}: {name}, {ranks} ranks", value, unit)
            most = 0.0 if name == TOKENS else whole_model.MOST[None] if device.type == "cuda" else whole_model.MOST_IN_FLOAT32
            if not value <= most:  # as NaN is
                wrong.append(f"{shape}: {name} is {value:.2g} over {ranks} ranks")
    assert not wrong, "; ".join(wrong)


def _rank(rank: int, ranks: int, rendezvous: Rendezvous, kind: str, told: "Queue[list[Figure]]", shape: str) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cpu":
        torch.set_num_threads(1)
    config = ModelConfig.from_dict(config_of(shape))
    topology = Topology(tp=ranks, ep=ranks if config.moe else 1)
    tokens = torch.randint(config.vocab_size, (3, 200), generator=_seeded(shape)).tolist()
    with open_groups(topology, rank, rendezvous=rendezvous, device=device, timeout_s=START_S) as groups:
        checkpoint = RandomCheckpoint(config, torch.device("cpu"), SeededTensor)
        model = random_model(shape, device, checkpoint=checkpoint, groups=groups)
        with torch.inference_mode():
            found = whole_model.logits_of_steps(model, tokens).double().cpu()
        said = [_said(model, rank, tokens, cuda_graphs=cuda_graphs) for cuda_graphs in (True, False)]
    if rank == 0:
        twin = whole_model.twin_of(checkpoint, config, None)
        with torch.inference_mode():
            wanted = whole_model.logits_of_steps(twin, tokens).double()
        errors_T = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        different = sum(one != other for one, other in zip(*said, strict=True))
        told.put([(LOGITS, float(errors_T.median()), "relative"), (TOKENS, float(different), "tokens")])


def _said(model: Qwen2, rank: int, tokens: list[list[int]], *, cuda_graphs: bool) -> list[int]:
    """Tokens that a runner samples after prompts and single tokens. The input tokens are fixed, whatever was sampled before."""
    sampler = Sampler(vocab_size=model.config.vocab_size, device=model.device) if rank == 0 else None
    engine_config = EngineConfig(max_running=len(PROMPTS), max_step_tokens=256, prefix_cache=False)
    runner_config = RunnerConfig(device=str(model.device), cuda_graphs=cuda_graphs, kv_cache_bytes=1 << 24, tune_tiles=False)
    runner = make_runner(model, sampler, runner_config=runner_config, engine_config=engine_config)
    greedy, said = SamplingParams(temperature=0.0), []
    try:
        for step in range(STEPS):
            works = []
            for sequence, prompt in enumerate(PROMPTS):
                start, stop = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)
                blocks = tuple(range(3 * sequence, 3 * sequence + 3)) if step == 0 else ()
                works.append(Work(sequence, start, tuple(tokens[sequence][start:stop]), blocks, samples=True))
            opened = tuple(NewSequence(number, 0, prompt, greedy) for number, prompt in enumerate(PROMPTS)) if step == 0 else ()
            result = runner.run(StepPlan(step, tuple(works), opened))
            said += [token for sampled in result.sampled for token in sampled.tokens] if result else []
    finally:
        runner.close()
    return said


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
