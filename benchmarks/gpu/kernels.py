"""Every kernel against float64: random inputs drawn anew in every call, outputs poisoned before, at the sizes of Qwen2; and how fast it is.

T rows, H query heads, G KV heads, K head width, L tokens of a context.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.clock import median_s, replayed_s
from benchmarks.gpu.results import OutOfTime, Results
from engine.plan import Opening
from engine.request import SamplingParams
from engine.run.noise import uniform
from engine.run.sampling.columns import CHOICE, KIND, SEED, TEMPERATURE, TOP_K, SamplingColumns, hardest_of
from engine.run.sampling.edit_table import EditTable
from engine.run.sampling.filters import DrawParams, draw_filtered, whole_weight
from engine.run.sampling.sampler import Sampler
from engine.run.sampling.state import Row, SamplingState
from model.attention.backend import AttentionConfig
from model.batch import ForwardBatch
from model.rope import Rotation
from parallel.aligned_rows import empty_rows
from parallel.rounding import FP8, round_to_fp8
from parallel.scaled_format import Kind, ScaledFormat, unpack

if TYPE_CHECKING:
    from model.attention.cuda import CudaAttention  # triton

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Sizes:
    """What is checked: those of Qwen2 on a device, tiny ones where an interpreter stands in for it."""

    heads: Sequence[tuple[int, int, int]] = ((28, 4, 128), (14, 2, 64), (64, 8, 128))
    contexts: Sequence[int] = (1, 15, 16, 17, 640, 5000)
    prompts: Sequence[tuple[int, int]] = ((0, 700), (513, 130), (0, 33))
    """(behind, new)"""
    timed_prompts: Sequence[tuple[int, int]] = ((0, 8192), (0, 2048), (2048, 2048), (8000, 512))
    """(behind, new)"""
    timed: Sequence[tuple[int, int]] = ((1, 1024), (1, 30000), (32, 1024), (128, 1024))
    """(sequences, context)"""
    width: int = 3584
    inner: int = 18944
    rows: Sequence[int] = (1, 7, 32, 256)
    experts: tuple[int, int, int] = (64, 8, 2560)
    """(experts, chosen, inner width)"""
    vocab_size: int = 151_936
    undecided: int = 16


TINY = Sizes(
    heads=((4, 2, 16),), contexts=(1, 17), prompts=((3, 5),), timed_prompts=((3, 5),), timed=((1, 20),), width=64, inner=96, rows=(1, 5),
    experts=(4, 2, 32), vocab_size=300, undecided=2,
)  # fmt: skip
DRAWN = {
    "greedy": SamplingParams(temperature=0.0),
    "top-k 20": SamplingParams(top_k=20, top_p=0.8, temperature=0.7),
    "temperature 1": SamplingParams(),
    "top-p 0.5": SamplingParams(top_p=0.5, temperature=0.3),
    "large nuclei": SamplingParams(top_p=0.97, temperature=2.5),
}
"""Rows whose drawing is timed."""
FP8_EXPERTS_MOST = 5e-2
"""Of relative error: where an activation in between is rounded to its neighbour in bfloat16, FP8 rounds some of them by a step more."""
ROTATED_BYTES = 256 << 20
"""Read in turn, so that no run finds in the cache what the one before read: four times an H200's."""


@dataclass(frozen=True, kw_only=True)
class Attending:
    """Attention over a batch, and all that it is given."""

    run: Callable[[], Tensor]
    fused: Tensor
    """(T, H + 2 G, K)"""
    rotation: Rotation
    keys: Tensor
    values: Tensor
    tables: Tensor
    slots: Tensor
    """(T): where the new tokens' keys and values go."""
    starts: list[int]
    """Where each work's tokens begin."""


class Checks:
    """On one device. On a CPU Triton's interpreter must be on, and floats have 32 bits: it has no bfloat16."""

    def __init__(self, results: Results, device: torch.device, ceilings: Ceilings, sizes: Sizes) -> None:
        self._results, self._device, self._ceilings, self._sizes = results, device, ceilings, sizes
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._most = 1e-2 if device.type == "cuda" else 1e-4
        """Of relative error: roundings of bfloat16 add up to between 1e-3 and 1e-2."""

        self.wrong: list[str] = []

    def run(self, name: str) -> None:
        """One of `CHECKS`. What is wrong in it does not keep the rest of it from being seen.

        Raises:
            AssertionError: what was wrong.
        """
        try:
            CHECKS[name][1](self)
        except OutOfTime:
            if not self.wrong:
                raise
        if self.wrong:
            raise AssertionError("; ".join(self.wrong))

    # --- one kernel each

    def _noise(self) -> None:
        from parallel.cuda.noise import uniform as in_one_launch

        words = [torch.randint(-(2**63), 2**63 - 1, (1000,)), *(torch.randint(0, 2**32, (1000,)) for _ in range(2))]
        found = in_one_launch(*(some.to(self._device) for some in words), 0)
        different = int((found.cpu() != uniform(*words)).sum())
        self._results.add("kernels", "noise: rows that differ", float(different), "rows")
        self._expect(not different, f"noise differs from its twin in {different} of 1000 rows")

    def _small(self) -> None:
        from parallel.cuda.elementwise import add_rms_norm, rms_norm, swiglu

        width = self._sizes.width
        for rows in self._sizes.rows:
            x, residual, weight = self._random(rows, width), self._random(rows, width), self._random(width)
            total = x.double() + residual.double()
            with poisoned():
                normed = rms_norm(x, weight, 1e-6)
                stream = residual.clone()
                added = add_rms_norm(x, stream, weight, 1e-6)
                gated = swiglu(wide := self._random(rows, 2 * self._sizes.inner))
            self._judge(f"rms norm of {rows}", normed, _normed(x.double(), weight.double()))
            self._judge(f"add and norm of {rows}", added, _normed(total, weight.double()))
            self._judge(f"residual stream of {rows}", stream, total)
            gate, up = wide.double().chunk(2, -1)
            self._judge(f"swiglu of {rows}", gated, F.silu(gate) * up)

    def _attention(self) -> None:
        for heads in self._sizes.heads:
            for kv_dtype in self._kv_dtypes():
                self._attend([(length - 1, 1) for length in self._sizes.contexts], heads, kv_dtype)
        heads = self._sizes.heads[0]
        for sequences, context in self._sizes.timed:
            for kv_dtype in self._kv_dtypes():
                self._results.go_on()
                run = self._attending([(context - 1, 1)] * sequences, heads, kv_dtype).run
                num_bytes = 2 * sequences * context * heads[1] * heads[2] * kv_dtype.itemsize
                self._timed(f"decode of {sequences} behind {context}, KV in {kv_dtype}", run, num_bytes)

    def _prefill(self) -> None:
        for heads in self._sizes.heads:
            for kv_dtype in self._kv_dtypes():
                self._attend(list(self._sizes.prompts), heads, kv_dtype)
        heads = self._sizes.heads[0]
        for behind, new in self._sizes.timed_prompts:
            for kv_dtype in self._kv_dtypes():
                self._results.go_on()
                run = self._attending([(behind, new)], heads, kv_dtype).run
                rate = 4 * heads[0] * heads[2] * new * (behind + new / 2) / median_s(run, self._device)
                name = f"prompt of {new} behind {behind}, KV in {kv_dtype}"
                self._results.add("kernels", name, rate / 1e12, "TFLOP/s", self._ceilings.flop_per_s / 1e12)

    def _flashinfer(self) -> None:
        """As our own kernel is judged, where it is installed; and how fast both are with a long prompt."""
        if self._device.type != "cuda" or find_spec("flashinfer") is None:
            return
        from model.attention.cuda import CudaAttention
        from model.attention.flashinfer import FlashInferAttention

        for heads in self._sizes.heads:
            self._attend(list(self._sizes.prompts), heads, self._dtype, FlashInferAttention)
        heads, tokens = self._sizes.heads[0], 8192
        for name, kind in (("ours", CudaAttention), ("flashinfer", FlashInferAttention)):
            run = self._attending([(0, tokens)], heads, self._dtype, kind).run
            rate = 2 * heads[0] * heads[2] * tokens**2 / median_s(run, self._device)
            self._results.add("kernels", f"prompt of {tokens}, {name}", rate / 1e12, "TFLOP/s", self._ceilings.flop_per_s / 1e12)

    def _scaled(self) -> None:
        from parallel.cuda.scaled import multiply

        kinds: tuple[Kind, ...] = ("int8", "int4", "fp8") if self._device.type == "cuda" else ("int8", "int4")
        for kind in kinds:  # (Triton's interpreter loses a carry in FP8)
            tensors = ScaledFormat(kind, torch.float32).prepare({"weight": self._random(self._sizes.inner, self._sizes.width).float()})
            matrix = _whole(tensors, self._sizes.width)
            for rows in self._sizes.rows:
                x, bias = self._random(rows, self._sizes.width), self._random(self._sizes.inner)
                wide = _as_multiplied(kind, x)
                with poisoned():
                    found = multiply(x, tensors, bias)
                self._judge(f"{kind} product of {rows}", found, wide @ matrix.T + bias.double())
                self._timed(f"{kind} product of {rows}", *self._in_turn(x, tensors))

    def _in_turn(self, x: Tensor, tensors: dict[str, Tensor]) -> tuple[Callable[[], object], int]:
        """Products with so many copies of a matrix that none stays in the cache, and all bytes of them."""
        from parallel.cuda.scaled import multiply

        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        most = ROTATED_BYTES if self._device.type == "cuda" else num_bytes
        copies = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(-(-most // num_bytes))]
        return (lambda: [multiply(x, copy, None) for copy in copies]), num_bytes * len(copies)

    def _experts(self) -> None:
        kinds: tuple[Kind | None, ...] = (None, "int8", "fp8") if self._device.type == "cuda" else (None, "int8")
        for kind in kinds:
            self._experts_of(kind)

    def _experts_of(self, kind: Kind | None) -> None:
        """Plain ones, or rounded."""
        from parallel.cuda.grouped import GroupedExperts

        num_experts, chosen, inner = self._sizes.experts
        width, prefix = self._sizes.width, f"{kind} " if kind else ""
        up, down = ([self._matrix(kind, *shape) for _ in range(num_experts)] for shape in ((2 * inner, width), (width, inner)))
        grouped = GroupedExperts(num_experts, dict(enumerate(up)), dict(enumerate(down)))
        most = FP8_EXPERTS_MOST if kind == "fp8" else None
        for rows in self._sizes.rows:
            self._results.go_on()
            x, weights = self._random(rows, width), torch.rand(rows, chosen, device=self._device).to(self._dtype)
            ids = torch.stack([torch.randperm(num_experts, device=self._device)[:chosen] for _ in range(rows)])
            with poisoned():
                found = grouped(x, ids, weights)
            wanted = torch.zeros(rows, width, dtype=torch.float64, device=self._device)
            for expert in range(num_experts):
                at, place = (ids == expert).nonzero(as_tuple=True)
                if len(at):
                    gate, wide = (_as_multiplied(kind, x[at]) @ _whole(up[expert], width).T).chunk(2, -1)
                    y = _as_multiplied(kind, (F.silu(gate) * wide).to(self._dtype)) @ _whole(down[expert], inner).T
                    wanted.index_add_(0, at, y * weights[at, place].double().unsqueeze(-1))
            self._judge(f"{prefix}experts of {rows}", found, wanted, most)
            num_bytes = ids.unique().numel() * sum(tensor.nbytes for matrix in (up[0], down[0]) for tensor in matrix.values())
            self._timed(f"{prefix}experts of {rows}", lambda x=x, ids=ids, weights=weights: grouped(x, ids, weights), num_bytes)

    def _routing(self) -> None:
        from parallel.cuda.routing import CudaRouting

        num_experts, chosen, _ = self._sizes.experts
        for rows in self._sizes.rows:
            logits, gates = self._random(rows, num_experts), self._random(rows, 1)
            routed, shared = self._random(rows, self._sizes.width), self._random(rows, self._sizes.width)
            with poisoned():
                ids, weights = CudaRouting().choose(logits, chosen, renormalise=False)
                added = CudaRouting().add_shared(routed, gates, shared)
            wanted, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
            different = int((ids != order[:, :chosen]).sum())
            self._results.add("kernels", f"experts chosen of {rows} rows that differ", float(different), "experts")
            self._expect(not different, f"{different} of {ids.numel()} experts differ")
            self._judge(f"weights of experts of {rows}", weights, wanted[:, :chosen])
            self._judge(f"shared expert of {rows}", added, routed.double() + gates.double().sigmoid() * shared.double())

    def _sampling(self) -> None:
        """The same tokens on the device as on a CPU, of the same logits."""
        cpu, draw = torch.device("cpu"), random.Random()
        params = [SamplingParams(temperature=0.0), SamplingParams(top_k=20, top_p=0.8), SamplingParams(top_p=0.9), SamplingParams()]
        logits = (torch.randn(32, self._sizes.vocab_size) * 3).to(self._dtype)
        rows = [self._row(draw.choice(params), draw.randrange(1 << 31)) for _ in range(32)]
        wanted = Sampler(vocab_size=self._sizes.vocab_size, device=cpu).sample(logits, rows)
        found = Sampler(vocab_size=self._sizes.vocab_size, device=self._device).sample(logits.to(self._device), rows)
        different = sum(one.tokens != other.tokens for one, other in zip(found, wanted, strict=True))
        self._results.add("kernels", "sampling: rows that differ from the CPU's, of 32", float(different), "rows")
        self._expect(not different, f"sampling gives {different} other tokens of 32")
        if self._device.type == "cuda":
            for name, one in DRAWN.items():
                for count in self._sizes.rows:
                    self._time_drawing(name, one, count)

    def _time_drawing(self, name: str, params: SamplingParams, count: int) -> None:
        """Of a captured step, with logits as flat as no model's."""
        from parallel.cuda.draws import draw

        self._results.go_on()
        columns = SamplingColumns()
        for at in range(count):
            columns.put(at, self._row(params, at).state)
        told = torch.from_numpy(columns.of(np.arange(count))).to(self._device)
        logits_RV = empty_rows(count, self._sizes.vocab_size, dtype=self._dtype, device=self._device).normal_() * 3
        report_3R, floats = torch.empty(3, count, dtype=torch.int64, device=self._device), told[TEMPERATURE:].view(torch.float64)
        given = {
            "seed_R": told[SEED],
            "choice_R": told[CHOICE],
            "position_R": told[SEED] % 1000,
            "top_k_R": told[TOP_K],
            "kind_R": told[KIND],
        }
        given |= {"temperature_R": floats[0], "top_p_R": floats[1], "min_p_R": floats[2]}
        most = hardest_of(int(told[KIND].max()))
        seconds = replayed_s(lambda: draw(logits_RV, report_3R, most=most, **given), self._device, launches=5)
        self._results.add("kernels", f"drawing {count}, {name}", seconds * 1e6, "us")

    def _undecided(self) -> None:
        """Rows drawn where they lie against the CPU's sorting, and how long they keep a device."""
        from parallel.cuda.whole_rows import draw_undecided

        count, width = self._sizes.undecided, self._sizes.vocab_size
        logits, uniform_R = torch.randn(count, width) * 3, torch.rand(count, dtype=torch.float64)
        draw = random.Random()
        rows = [(draw.choice([0.7, 1.0, 2.5]), draw.choice([width, width // 2]), draw.choice([0.9, 0.97, 1.0]), 0.0) for _ in range(count)]
        numbers = torch.tensor(rows, dtype=torch.float64).T
        params = DrawParams(numbers[0], numbers[1].long(), numbers[2], numbers[3], uniform_R)
        wanted, _ = draw_filtered(logits, params, width, whole_weight(logits, params))
        none = torch.zeros(count, dtype=torch.int64)
        given = [
            x.contiguous().to(self._device)
            for x in (none.clone(), logits, numbers[0], params.top_k_R, numbers[2], numbers[3], uniform_R, none)
        ]
        draw_undecided(*given)
        different = int((given[0].cpu() != wanted).sum())
        self._results.add("kernels", f"undecided rows that differ from the CPU's, of {count}", float(different), "rows")
        self._expect(not different, f"{different} of {count} undecided rows differ")
        for name, decided in (("undecided", 0), ("decided", 1)):
            given[-1] = none.to(self._device) + decided
            seconds = median_s(lambda: draw_undecided(*given), self._device, repeats=3)
            self._results.add("kernels", f"{count} rows, {name}", seconds * 1000, "ms")

    def _edits(self) -> None:
        """To the bit, against plain torch on a CPU."""
        width, generator = self._sizes.vocab_size, torch.Generator().manual_seed(random.getrandbits(32))
        params = SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.3, logit_bias=((7, 3.0), (9, -100.0)))
        for count in self._sizes.rows:
            logits = torch.randn(count, width, generator=generator).to(self._dtype)
            tables = [EditTable(num_entries=count, vocab_size=width, device=one) for one in (self._device, torch.device("cpu"))]
            for number in range(count):
                history = tuple(torch.randint(0, width, (100,), generator=generator).tolist()) * 2
                for table in tables:
                    table.open(SamplingState(Opening(number, 0, 50, params, history), vocab_size=width))
            entries_R, none_R = torch.arange(count), torch.zeros(count, dtype=torch.int64)
            words_GW = torch.randint(-(2**31), 2**31, (1, -(-width // 32)), generator=generator).to(torch.int32)
            given = (entries_R, none_R, none_R - (entries_R % 2), words_GW)
            for table in tables:
                table.learn(*(x.to(table.device) for x in (entries_R, entries_R * 3, none_R + 500)))
            wanted = tables[1].edited_slowly(logits, *given)
            on_device = [x.to(self._device) for x in (logits, *given)]
            found = tables[0].edited(*on_device).cpu()
            different = int((found != wanted).sum())
            self._results.add("kernels", f"edited logits of {count} that differ", float(different), "numbers")
            self._expect(not different, f"{different} edited logits of {count} rows differ")
            num_bytes = count * width * (logits.itemsize + 4 + 4)
            self._timed(f"edits of {count}", lambda on_device=on_device, table=tables[0]: table.edited(*on_device), num_bytes)

    # --- parts of them

    def _attend(
        self, works: list[tuple[int, int]], heads: tuple[int, int, int], kv_dtype: torch.dtype, kind: "type[CudaAttention] | None" = None
    ) -> None:
        """What the kernels wrote is judged by what they were given; nothing that is wanted is read from where they write."""
        one = self._attending(works, heads, kv_dtype, kind)
        num_heads, num_kv_heads, head_dim = heads
        turned = _turned(one.fused[:, : num_heads + num_kv_heads].double(), one.rotation)
        q_THK, k_TGK = turned[:, :num_heads], turned[:, num_heads:]
        k_TGK, v_TGK = (self._as_kept(new, kv_dtype) for new in (k_TGK, one.fused[:, num_heads + num_kv_heads :].double()))
        behind_of = [
            [cache[one.tables[number].long()].flatten(0, 1)[:behind].double() for cache in (one.keys, one.values)]
            for number, (behind, _) in enumerate(works)
        ]
        with poisoned():
            found = one.run()
        by = f" by {kind.__name__}" if kind else ""
        name = f"{'decode' if all(new == 1 for _, new in works) else 'prefill'}{by} of {heads}, KV in {kv_dtype}"
        self._judge(f"{name}: keys", one.keys.flatten(0, 1)[one.slots], k_TGK)
        self._judge(f"{name}: values", one.values.flatten(0, 1)[one.slots], v_TGK)
        wanted = torch.zeros_like(q_THK)
        for number, (behind, new) in enumerate(works):
            mine = slice(one.starts[number], one.starts[number] + new)
            k_LGK, v_LGK = (torch.cat((old, new[mine])) for old, new in zip(behind_of[number], (k_TGK, v_TGK), strict=True))
            group = num_heads // num_kv_heads
            k_LHK, v_LHK = k_LGK.repeat_interleave(group, 1), v_LGK.repeat_interleave(group, 1)
            scores = torch.einsum("phk,lhk->hpl", q_THK[mine], k_LHK) * head_dim**-0.5
            places = torch.arange(behind + new, device=scores.device)
            hidden = places > places[behind:].unsqueeze(1)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            wanted[mine] = torch.einsum("hpl,lhk->phk", weights, v_LHK)
        parts = [slice(start, stop) for start, stop in pairwise(one.starts)]
        errors = [_error(found[mine], wanted[mine]) for mine in parts]
        worst = max(range(len(works)), key=lambda number: errors[number] if errors[number] == errors[number] else math.inf)
        behind, new = works[worst]
        # Of one norm over all of them a short context, whose numbers are the largest, would hide what is wrong with a long one.
        self._judge(
            f"{name}, worst of {len(works)} contexts", found[parts[worst]], wanted[parts[worst]], where=f" at {new} behind {behind}"
        )

    def _attending(
        self, works: list[tuple[int, int]], heads: tuple[int, int, int], kv_dtype: torch.dtype, kind: "type[CudaAttention] | None" = None
    ) -> "Attending":
        """Blocks lie in random order; nobody's hold NaN, and so do the new tokens' slots."""
        from model.attention.cuda import CudaAttention

        num_heads, num_kv_heads, head_dim = heads
        counts = [-(-(behind + new) // BLOCK_TOKENS) for behind, new in works]
        order = torch.randperm(sum(counts) + 1) + 1
        tables = torch.nn.utils.rnn.pad_sequence(list(order[: sum(counts)].split(counts)), batch_first=True).int()
        shape = (sum(counts) + 2, BLOCK_TOKENS, num_kv_heads, head_dim)
        caches = [self._random(*shape) for _ in range(2)]
        starts, slots = [0], []
        for number, (behind, new) in enumerate(works):
            places = torch.arange(behind, behind + new)
            slots.append(tables[number, places // BLOCK_TOKENS].long() * BLOCK_TOKENS + places % BLOCK_TOKENS)
            starts.append(starts[-1] + new)
        slots_T = torch.cat(slots).to(self._device)
        for cache in caches:
            cache[[0, int(order[-1])]] = torch.nan
            cache.flatten(0, 1)[slots_T] = torch.nan
        keys, values = (cache.to(kv_dtype) for cache in caches)
        fused = self._random(starts[-1], num_heads + 2 * num_kv_heads, head_dim)
        angles = torch.rand(starts[-1], 1, head_dim // 2, device=self._device) * 2 * math.pi
        rotation = Rotation(angles.cos().to(self._dtype), angles.sin().to(self._dtype))
        group = num_heads // num_kv_heads
        config = AttentionConfig(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_tokens=BLOCK_TOKENS,
            kv_of_query=tuple(head // group for head in range(num_heads)),
        )  # fmt: skip
        lengths = tuple(behind + new for behind, new in works)
        batch = ForwardBatch(
            tokens_T=torch.zeros(starts[-1], dtype=torch.int64),
            positions_T=torch.zeros(starts[-1], dtype=torch.int64),
            slots_T=slots_T,
            block_tables_SM=tables.to(self._device),
            lengths_S=torch.tensor(lengths, dtype=torch.int32, device=self._device),
            query_starts=tuple(starts),
            context_lengths=lengths,
            num_decodes=len(works) if all(new == 1 for _, new in works) else 0,
            logit_rows_R=torch.arange(0),
        )
        backend = (kind or CudaAttention)(config, self._device)
        backend.prepare(batch)
        return Attending(
            run=lambda: backend.attend(fused, rotation, keys, values, batch),
            fused=fused,
            rotation=rotation,
            keys=keys,
            values=values,
            tables=batch.block_tables_SM,
            slots=batch.slots_T,
            starts=starts,
        )

    def _as_kept(self, new: Tensor, kv_dtype: torch.dtype) -> Tensor:
        """In float64 what a cache in FP8 keeps of it. Other roundings are within what is allowed."""
        return new.to(self._dtype).to(FP8).double() if kv_dtype == FP8 else new

    def _matrix(self, kind: Kind | None, num_outputs: int, num_inputs: int) -> dict[str, Tensor]:
        weight = self._random(num_outputs, num_inputs) * 0.02
        return ScaledFormat(kind, torch.float32).prepare({"weight": weight.float()}) if kind else {"weight": weight}

    def _kv_dtypes(self) -> list[torch.dtype]:
        return [self._dtype, FP8] if self._device.type == "cuda" else [self._dtype]

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device).to(self._dtype)

    def _row(self, params: SamplingParams, seed: int) -> Row:
        opening = Opening(0, 0, 1, replace(params, seed=seed))
        return Row(SamplingState(opening, vocab_size=self._sizes.vocab_size), 3)

    def _judge(self, name: str, found: Tensor, wanted: Tensor, most: float | None = None, where: str = "") -> None:
        error = _error(found, wanted)
        self._results.add("kernels", f"{name}: error", error, "relative")
        self._expect(error < (most or self._most), f"{name}{where} is wrong by {error:.2g}")  # NaN is not below anything

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)

    def _timed(self, name: str, compute: Callable[[], object], num_bytes: int) -> None:
        rate = num_bytes / replayed_s(compute, self._device)
        self._results.add("kernels", name, rate / 1e12, "TB/s", self._ceilings.read_bytes_per_s / 1e12)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _turned(x_TXK: Tensor, rotation: Rotation) -> Tensor:
    """As `Rotation.apply` by no kernel, in float64."""
    first, second = x_TXK.chunk(2, -1)
    cos, sin = rotation.cos_T1F.double(), rotation.sin_T1F.double()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _whole(tensors: dict[str, Tensor], num_inputs: int) -> Tensor:
    """The matrix (N, K) in float64 that a plain or a rounded form stands for."""
    return tensors["weight"].double() if "weight" in tensors else unpack(tensors).double()[:, :num_inputs]


def _as_multiplied(kind: Kind | None, x_TK: Tensor) -> Tensor:
    """Rows in float64 as a product with such a matrix takes them."""
    if kind != "fp8":
        return x_TK.double()
    numbers_TK, scales_T = round_to_fp8(x_TK)
    return numbers_TK.double() * scales_T.double().unsqueeze(-1)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


CHECKS: dict[str, tuple[float, Callable[[Checks], None]]] = {
    "noise": (0.3, Checks._noise),
    "small": (0.3, Checks._small),
    "decode": (0.6, Checks._attention),
    "prefill": (0.4, Checks._prefill),
    "flashinfer": (0.4, Checks._flashinfer),
    "rounded": (0.7, Checks._scaled),
    "experts": (0.6, Checks._experts),
    "routing": (0.3, Checks._routing),
    "sampling": (0.3, Checks._sampling),
    "undecided": (0.3, Checks._undecided),
    "edits": (0.3, Checks._edits),
}
"""With the minutes that each may take, compiling included. Each is a part of its own: one that loses the device loses none of the rest."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
