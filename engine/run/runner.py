"""Executes steps on one rank: a StepPlan becomes tensors, and on a sampling rank logits become tokens. Place 9 of a request.

There are three ways to compute a step: replay CUDA graphs (`engine.run.graph_steps`), launch the model and replay only the sampler
(`engine.run.mixed_steps`), or launch everything (`engine.run.eager_steps`).
"""

import time
from collections.abc import Callable
from itertools import count

import torch

from engine.executor import Capacity
from engine.plan import Rebalance, RebalanceResult, StepPlan, StepResult
from engine.run.async_step_queue import AsyncStepQueue
from engine.run.cuda_graphs import CapturedGraphs, GraphRecorder
from engine.run.decode_graphs import MAX_ROWS, DecodeGraphs
from engine.run.drafter import Drafter
from engine.run.eager_steps import EagerSteps
from engine.run.forward import Forward
from engine.run.grammar.guides import Guides
from engine.run.graph_steps import GraphSteps
from engine.run.mixed_steps import MixedSteps
from engine.run.open_sequences import OpenSequences
from engine.run.pooling import Pooler
from engine.run.prompt_graphs import PromptGraphs
from engine.run.prompt_logprobs import PromptScorer
from engine.run.rebalance import ExpertRebalancer
from engine.run.result_builder import ResultBuilder
from engine.run.sampling.edit_table import EditTable
from engine.run.sampling.sampler import Sampler
from engine.run.sampling.sampler_graphs import SamplerGraphs
from engine.step_handle import CompletedStep, StepHandle
from model.kv_cache import KvCache
from model.qwen2 import Qwen2
from parallel.topology import Topology


def sampling_ranks(topology: Topology) -> tuple[int, ...]:
    """The rank of each shard (dp position) that samples and answers: the first of the last stage, whose ranks have the logits."""
    return tuple(range(topology.size - topology.ranks_per_stage, topology.size, topology.tp))


class Runner:
    """One rank of a replica, ready to execute steps.

    It knows the block tables of its shard's open sequences; only a sampling rank knows more about them.
    """

    def __init__(
        self,
        *,
        model: Qwen2,
        cache: KvCache,
        capacity: Capacity,
        sampler: Sampler | None,
        device: torch.device,
        shard: int = 0,
        guides: Guides | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """``sampler``, ``guides`` and ``drafter`` are given only on the ranks that sample.

        Without ``guides`` requests with a grammar are refused; without a ``drafter`` this rank proposes no drafts.
        """
        self.capacity, self.shard = capacity, shard
        self.model, self.cache, self.device = model, cache, device
        self.rebalancer = ExpertRebalancer(model)
        vocab_size = sampler.vocab_size if sampler else None
        guides = guides or Guides(None, vocab_size=vocab_size or 0)
        self.sequences = OpenSequences(shard=shard, vocab_size=vocab_size, guides=guides, pooler=Pooler(model), device=device)
        self.result_builder = ResultBuilder(sampler, self.sequences, runs_ahead=capacity.runs_ahead)
        self.forward = Forward(model, cache)
        self.async_steps = AsyncStepQueue(self.sequences, self.result_builder)
        self._eager_steps = EagerSteps(
            self.forward, self.sequences, self.result_builder, scorer=PromptScorer(model, vocab_size), drafter=drafter
        )
        self.decode_graphs: DecodeGraphs | None = None
        """Set by `capture`, as are those below."""
        self.sampler_graphs: SamplerGraphs | None = None
        self.graph_steps: GraphSteps | None = None
        """Executes the steps that `decode_graphs` can replay."""
        self.mixed_steps: MixedSteps | None = None

    def __repr__(self) -> str:
        return f"<Runner [{'samples' if self.is_sampling else 'computes'} on {self.device} | {self.sequences} | {self.cache}]>"

    @property
    def is_sampling(self) -> bool:
        """Whether `run` returns results here, which is so on exactly one rank of each shard."""
        return self.result_builder.sampler is not None

    def capture(
        self,
        graphs: GraphRecorder,
        *,
        max_rows: int,
        edits: bool = False,
        max_prompt_tokens: int = 0,
        prompts_ahead: bool = False,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """Capture CUDA graphs of decode-only steps, which `run` replays from then on.

        All ranks of the replica must call this at the same time, while no sequence is open, and `engine.run.decode_graphs.capture_obstacle`
        must be None.

        ``edits``: count the tokens that sequences have seen on the device, so that penalties are replayed too. Not to be combined with
        speculative decoding. ``max_prompt_tokens``: replay other steps of up to so many tokens piecewise; 0 = never. ``prompts_ahead``:
        see `RunnerConfig`. ``on_progress`` is called with (done, total).
        """
        self.decode_graphs = DecodeGraphs(
            self.model,
            self.cache,
            graphs,
            max_rows=min(max_rows, MAX_ROWS),
            max_blocks=self.capacity.blocks_for(self.capacity.max_context_tokens),
            vocab_size=self.result_builder.sampler.vocab_size if self.result_builder.sampler else None,
            broadcasts_tokens=self.capacity.runs_ahead,
        )
        captured: list[CapturedGraphs] = [self.decode_graphs]
        if self.result_builder.sampler is not None:
            self.sampler_graphs = self._make_sampler_graphs(self.result_builder.sampler, self.decode_graphs, graphs, edits=edits)
            captured.append(self.sampler_graphs)
        self.graph_steps = GraphSteps(
            self.decode_graphs,
            self.sampler_graphs,
            sequences=self.sequences,
            result_builder=self.result_builder,
            async_steps=self.async_steps,
            runs_ahead=self.capacity.runs_ahead,
        )
        self.forward.prompt_graphs = self.mixed_steps = None
        if max_prompt_tokens:
            self.forward.prompt_graphs = PromptGraphs(self.model, self.cache, graphs, max_tokens=max_prompt_tokens)
            captured.append(self.forward.prompt_graphs)
        if prompts_ahead and self.is_sampling and self.capacity.runs_ahead:
            self.mixed_steps = MixedSteps(self.graph_steps, self.forward)
        done, total = count(1), sum(one.num_graphs for one in captured)
        for one in captured:
            one.capture(lambda: on_progress(next(done), total))

    def _make_sampler_graphs(self, sampler: Sampler, decode_graphs: DecodeGraphs, graphs: GraphRecorder, *, edits: bool) -> SamplerGraphs:
        assert decode_graphs.logits is not None
        sizes = decode_graphs.sizes
        table = EditTable(num_entries=sizes[-1], vocab_size=sampler.vocab_size, device=self.device) if edits else None
        self.sequences.enable_sampler_graphs(table)
        return SamplerGraphs(
            decode_graphs.logits,
            sizes,
            graphs,
            table=table,
            tokens_P=decode_graphs.tokens_P,
            positions_P=decode_graphs.positions_P,
            report=decode_graphs.report,
        )

    def close(self) -> None:
        """Release all CUDA graphs.

        Must precede leaving the process groups: NCCL waits forever to leave a group while a graph that contains its collectives is
        alive.
        """
        for graphs in (self.decode_graphs, self.sampler_graphs, self.forward.prompt_graphs):
            if graphs is not None:
                graphs.release()
        self.decode_graphs = self.sampler_graphs = self.forward.prompt_graphs = None
        self.graph_steps = self.mixed_steps = None

    def run(self, plan: StepPlan) -> StepResult | None:
        """Execute one step together with all other ranks. Returns the shard's result on its sampling rank, None elsewhere."""
        return self.begin(plan).result()

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> StepHandle:
        """Like `run`, but a step that needs nothing from the host may still be running on the device when the next one is begun.

        Results must be asked for in the order in which the steps were begun. At most two steps are in flight.
        """
        began = time.perf_counter()
        self.async_steps.make_room()
        rebalanced = self._rebalance(plan.rebalance) if plan.rebalance else None
        self.sequences.open_and_close(plan)
        for steps in (self.graph_steps, self.mixed_steps):
            if steps is not None and (begun := steps.begin(plan, began)) is not None:
                return begun
        self.async_steps.finish_all()
        return CompletedStep(self.result_builder.build(plan, self._eager_steps.run(plan), began, rebalanced))

    def _rebalance(self, order: Rebalance) -> RebalanceResult:
        self.async_steps.finish_all()
        rebalanced = self.rebalancer.run(order)
        if rebalanced.num_moved and self.decode_graphs is not None:
            self.decode_graphs.capture()  # experts have moved in memory. Steps with prompts of such a model are never captured
            self.rebalancer.discard_counts()
        return rebalanced
