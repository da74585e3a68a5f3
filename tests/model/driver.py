"""Runs a model with forward batches built by hand, without the engine: whole prompts, chunks, and mixtures with decodes.

Runs in the ranks' processes, so it does not import transformers, which takes seconds.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from model.adapter import Adapter
from model.attention.choose import BackendName
from model.batch import ForwardBatch
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.kv_cache import KvCache
from model.load import CheckpointMismatch, LoadReport, load_model
from parallel.collectives import barrier
from parallel.dispatch import DispatchName
from parallel.groups import ParallelGroups
from parallel.weight_format import WeightFormat

BLOCK_TOKENS = 4
NUM_GREEDY = 16
CPU = torch.device("cpu")


@dataclass
class Progress:
    """One sequence: its tokens, how many of them are in the cache, its blocks, and the logits of every position computed."""

    tokens: list[int]
    blocks: list[int]
    num_computed: int = 0
    logits: list[Tensor] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.num_computed


class Driver:
    """One rank's model and cache. Every rank makes the same calls; logits are returned on the last stage."""

    def __init__(
        self,
        folder: Path,
        groups: ParallelGroups,
        *,
        dtype: torch.dtype = torch.float32,
        backend: BackendName = "auto",
        dispatch: DispatchName = "local",
        redundant_experts: int = 0,
        num_blocks: int = 256,
        format: WeightFormat | None = None,
        table_format: WeightFormat | None = None,
        kv_may_be_bfloat16: bool = False,
        adapter: Path | None = None,
    ) -> None:
        config = ModelConfig.from_checkpoint(folder)
        with Checkpoint(folder) as checkpoint, nullcontext() if adapter is None else Adapter(adapter) as opened:
            self.model, self.report = load_model(
                checkpoint,
                config,
                groups,
                device=CPU,
                dtype=dtype,
                block_tokens=BLOCK_TOKENS,
                backend=backend,
                dispatch=dispatch,
                redundant_experts=redundant_experts,
                format=format,
                table_format=table_format,
                kv_may_be_bfloat16=kv_may_be_bfloat16,
                adapter=opened,
            )
        self.cache = KvCache(self.model.kv_layout, num_blocks, CPU)
        self.free = list(range(num_blocks))

    def start(self, tokens: Sequence[int], room: int = 0) -> Progress:
        """A sequence with blocks for ``room`` more tokens, scattered over the cache."""
        count = -(-(len(tokens) + room) // BLOCK_TOKENS)
        blocks = [self.free.pop(len(self.free) // 3) for _ in range(count)]
        return Progress(list(tokens), blocks)

    @torch.no_grad()
    def step(self, works: Sequence[tuple[Progress, int]]) -> None:
        """Compute the next ``count`` tokens of each sequence in one forward pass, and keep the logits of all of them."""
        works = sorted(works, key=lambda work: work[1] > 1)
        logits = self.model(build_batch(works), self.cache)
        for sequence, count in works:
            sequence.num_computed += count
            if logits is not None:
                sequence.logits.append(logits[:count].float())
                logits = logits[count:]

    def whole(self, tokens: Sequence[int]) -> Tensor:
        """Logits of every position, computed in one step."""
        return self.chunked(tokens, len(tokens))

    def chunked(self, tokens: Sequence[int], chunk: int) -> Tensor:
        sequence = self.start(tokens)
        while sequence.pending:
            self.step([(sequence, min(chunk, sequence.pending))])
        return self._logits(sequence)

    @torch.no_grad()
    def last_logits(self, tokens: Sequence[int], chunk: int) -> Tensor:
        """As an engine does: only the last step asks for logits, for a single row (1, V)."""
        sequence = self.start(tokens)
        while sequence.pending:
            batch = build_batch([(sequence, min(chunk, sequence.pending))])
            sequence.num_computed += batch.num_tokens
            rows = batch.logit_rows_R[:0] if sequence.pending else batch.logit_rows_R[-1:]
            logits: Tensor = self.model(replace(batch, logit_rows_R=rows), self.cache)
            assert logits.shape == (len(rows), self.model.config.vocab_size)
        return logits

    def mixed(self, prompts: Sequence[Sequence[int]], budget: int) -> list[Tensor]:
        """All prompts, each joining one step after the one before it, the last four tokens of each as decodes."""
        waiting = [self.start(prompt) for prompt in prompts]
        done = list(waiting)
        running: list[Progress] = []
        while waiting or running:
            running += [waiting.pop(0)] if waiting else []
            self.step([(sequence, min(budget, max(1, sequence.pending - 4))) for sequence in running])
            running = [sequence for sequence in running if sequence.pending]
        return [self._logits(sequence) for sequence in done]

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The prompts together, then ``num_tokens`` tokens each. For models of one stage."""
        sequences = [self.start(prompt, room=num_tokens) for prompt in prompts]
        for _ in range(num_tokens):
            self.step([(sequence, sequence.pending) for sequence in sequences])
            for sequence in sequences:
                sequence.tokens.append(int(sequence.logits[-1][-1].argmax()))
        return [sequence.tokens[-num_tokens:] for sequence in sequences]

    def _logits(self, sequence: Progress) -> Tensor:
        self.free += sequence.blocks
        return torch.cat(sequence.logits) if sequence.logits else torch.empty(0)


def build_batch(works: Sequence[tuple[Progress, int]]) -> ForwardBatch:
    """Works of one token must come first. All logits are computed."""
    starts, tokens, positions, slots = [0], [], [], []
    for sequence, count in works:
        for position in range(sequence.num_computed, sequence.num_computed + count):
            tokens.append(sequence.tokens[position])
            positions.append(position)
            slots.append(sequence.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS)
        starts.append(len(tokens))
    width = max((len(sequence.blocks) for sequence, _ in works), default=0)
    tables = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence, _ in works]
    return ForwardBatch(
        tokens_T=torch.tensor(tokens, dtype=torch.int64),
        positions_T=torch.tensor(positions, dtype=torch.int64),
        slots_T=torch.tensor(slots, dtype=torch.int64),
        block_tables_SM=torch.tensor(tables, dtype=torch.int32).view(len(works), width),
        lengths_S=torch.tensor([sequence.num_computed + count for sequence, count in works], dtype=torch.int32),
        query_starts=tuple(starts),
        context_lengths=tuple(sequence.num_computed + count for sequence, count in works),
        num_decodes=sum(count == 1 for _, count in works),
        logit_rows_R=torch.arange(len(tokens)),
    )


def seeded_prompts(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


@dataclass
class Answers:
    """The results of one rank, one entry per prompt."""

    whole: list[Tensor]
    chunked: list[Tensor]
    mixed: list[Tensor]
    greedy: list[list[int]]


def answers(groups: ParallelGroups, folders: Sequence[Path], prompts: Sequence[list[int]], dispatch: DispatchName) -> list[Answers]:
    """The answers to each checkpoint on one rank."""
    found = []
    for folder in folders:
        driver = Driver(folder, groups, dispatch=dispatch)
        found.append(
            Answers(
                whole=[driver.whole(prompt) for prompt in prompts],
                chunked=[driver.chunked(prompt, 7) for prompt in prompts],
                mixed=driver.mixed(prompts, 6),
                greedy=driver.greedy(prompts, NUM_GREEDY) if groups.pp.size == 1 else [],
            )
        )
        barrier(groups.world)  # a stage sends without waiting: freeing the model now would lose its last message
    return found


def logits_of(
    groups: ParallelGroups, folder: Path, prompt: list[int], dtype: torch.dtype = torch.float32, format: WeightFormat | None = None
) -> Tensor:
    """``format``: of the layers' matrices."""
    driver = Driver(folder, groups, dtype=dtype, format=format)
    logits = driver.whole(prompt)
    barrier(groups.world)  # as above
    return logits


def read_report(groups: ParallelGroups, folder: Path) -> LoadReport:
    return Driver(folder, groups).report


def last_logits(groups: ParallelGroups, folder: Path, prompt: list[int], chunk: int) -> Tensor:
    return Driver(folder, groups).last_logits(prompt, chunk)


def own_prompts(groups: ParallelGroups, folder: Path, prompts: list[list[int]], chunk: int, dispatch: DispatchName) -> list[Tensor]:
    """Every dp rank computes its own prompts, all in the same number of steps, some of them with an empty batch."""
    driver = Driver(folder, groups, dispatch=dispatch)
    mine = [driver.start(prompt) for prompt in prompts[groups.dp.rank :: groups.dp.size]]
    for _ in range(-(-max(map(len, prompts)) // chunk)):
        driver.step([(sequence, min(chunk, sequence.pending)) for sequence in mine if sequence.pending])
    return [torch.cat(sequence.logits) for sequence in mine]


@dataclass(frozen=True)
class Followed:
    """How close a rank's results are to the expected ones; empty where it has no logits."""

    max_error: float
    greedy: list[list[int]]
    """For each sequence the most probable token after the prompt and after each later token."""


def follow(
    groups: ParallelGroups,
    folder: Path,
    sequences: list[list[int]],
    num_prompt: int,
    wanted: list[Tensor],
    dispatch: DispatchName,
    redundant_experts: int,
) -> Followed:
    """Each dp rank computes its own sequences: the prompts in one step, what follows token by token as if just sampled.

    ``wanted`` are the logits of every position.
    """
    driver = Driver(folder, groups, dispatch=dispatch, redundant_experts=redundant_experts)
    mine = [driver.start(tokens) for tokens in sequences[groups.dp.rank :: groups.dp.size]]
    driver.step([(sequence, num_prompt) for sequence in mine])
    while any(sequence.pending for sequence in mine):
        driver.step([(sequence, 1) for sequence in mine])
    barrier(groups.world)  # as above
    if not mine[0].logits:
        return Followed(0.0, [])
    found = [torch.cat(sequence.logits) for sequence in mine]
    errors = [float((one - other).abs().max()) for one, other in zip(found, wanted[groups.dp.rank :: groups.dp.size], strict=True)]
    return Followed(max(errors), [logits[num_prompt - 1 : -1].argmax(-1).tolist() for logits in found])


def mismatch_of(groups: ParallelGroups, folder: Path) -> tuple[str, ...]:
    """The missing tensors that loading reports."""
    try:
        Driver(folder, groups)
    except CheckpointMismatch as mismatch:
        return mismatch.missing
    return ()
