"""Check attention as in a step: rotary embedding, write to the KV cache, then attention.

T rows, H query heads, G KV heads, K head width, L tokens of a context, the last P of them in a step.
"""

import math
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.gpu.kernels.attention_inputs import Heads, attention_case
from benchmarks.gpu.kernels.checks import Checks, error_of, poisoned
from benchmarks.gpu.timing import median_s
from model.rope import Rotation
from parallel.quantisation import FP8

if TYPE_CHECKING:
    from model.attention.cuda import CudaAttention  # triton


def decode(checks: Checks) -> None:
    for heads in checks.sizes.heads:
        for kv_dtype in _kv_dtypes(checks):
            attend(checks, [(length - 1, 1) for length in checks.sizes.contexts], heads, kv_dtype)
    heads = checks.sizes.heads[0]
    for sequences, context in checks.sizes.timed:
        for kv_dtype in _kv_dtypes(checks):
            checks.results.go_on()
            run = attention_case(checks, [(context - 1, 1)] * sequences, heads, kv_dtype).run
            num_bytes = 2 * sequences * context * heads[1] * heads[2] * kv_dtype.itemsize
            checks.timed(f"decode of {sequences} behind {context}, KV in {kv_dtype}", run, num_bytes)


def few(checks: Checks) -> None:
    """A few new tokens after long contexts, as in speculative decoding: KV is read once for all of them, and split into parts."""
    for heads in checks.sizes.heads:
        for kv_dtype in _kv_dtypes(checks):
            attend(checks, list(checks.sizes.few), heads, kv_dtype)
    heads = checks.sizes.heads[0]
    for sequences, context in checks.sizes.timed:
        for kv_dtype in _kv_dtypes(checks):
            checks.results.go_on()
            run = attention_case(checks, [(context - 5, 5)] * sequences, heads, kv_dtype).run
            num_bytes = 2 * sequences * context * heads[1] * heads[2] * kv_dtype.itemsize
            checks.timed(f"5 tokens of {sequences} behind {context}, KV in {kv_dtype}", run, num_bytes)


def prefill(checks: Checks) -> None:
    for heads in checks.sizes.heads:
        for kv_dtype in _kv_dtypes(checks):
            attend(checks, list(checks.sizes.prompts), heads, kv_dtype)
    heads = checks.sizes.heads[0]
    for behind, new in checks.sizes.timed_prompts:
        for kv_dtype in _kv_dtypes(checks):
            checks.results.go_on()
            run = attention_case(checks, [(behind, new)], heads, kv_dtype).run
            rate = 4 * heads[0] * heads[2] * new * (behind + new / 2) / median_s(run, checks.device)
            name = f"prompt of {new} behind {behind}, KV in {kv_dtype}"
            checks.results.add("kernels", name, rate / 1e12, "TFLOP/s", checks.ceilings.flop_per_s / 1e12)


def flashinfer(checks: Checks) -> None:
    """The same checks for FlashInfer, if it is installed, and the speed of both with a long prompt."""
    if checks.device.type != "cuda" or find_spec("flashinfer") is None:
        return
    from model.attention.cuda import CudaAttention
    from model.attention.flashinfer import FlashInferAttention

    for heads in checks.sizes.heads:
        attend(checks, list(checks.sizes.prompts), heads, checks.dtype, FlashInferAttention)
    heads, tokens = checks.sizes.heads[0], 8192
    for name, kind in (("ours", CudaAttention), ("flashinfer", FlashInferAttention)):
        run = attention_case(checks, [(0, tokens)], heads, checks.dtype, kind).run
        rate = 2 * heads[0] * heads[2] * tokens**2 / median_s(run, checks.device)
        checks.results.add("kernels", f"prompt of {tokens}, {name}", rate / 1e12, "TFLOP/s", checks.ceilings.flop_per_s / 1e12)


def attend(
    checks: Checks, works: list[tuple[int, int]], heads: Heads, kv_dtype: torch.dtype, kind: "type[CudaAttention] | None" = None
) -> None:
    """Check keys, values and attention for works (tokens in the cache, new tokens). Expected values are computed from the inputs only, not
    read from where the kernels write. ``kind``: backend; None: our own."""
    one = attention_case(checks, works, heads, kv_dtype, kind)
    num_heads, num_kv_heads, _ = heads
    turned = _turned(one.fused[:, : num_heads + num_kv_heads].double(), one.rotation)
    q_THK, k_TGK = turned[:, :num_heads], turned[:, num_heads:]
    k_TGK, v_TGK = (_as_kept(checks, new, kv_dtype) for new in (k_TGK, one.fused[:, num_heads + num_kv_heads :].double()))
    seen_of = []
    for number, (behind, _) in enumerate(works):
        mine = slice(one.starts[number], one.starts[number + 1])
        kept = [cache[one.tables[number].long()].flatten(0, 1)[:behind].double() for cache in (one.keys, one.values)]
        seen_of.append([torch.cat((old, new[mine])) for old, new in zip(kept, (k_TGK, v_TGK), strict=True)])
    with poisoned():
        found = one.run()
    by = f" by {kind.__name__}" if kind else ""
    name = f"{_kind_of(works)}{by} of {heads}, KV in {kv_dtype}"
    checks.judge(f"{name}: keys", one.keys.flatten(0, 1)[one.slots], k_TGK)
    checks.judge(f"{name}: values", one.values.flatten(0, 1)[one.slots], v_TGK)
    parts = [slice(start, stop) for start, stop in pairwise(one.starts)]
    wanted = torch.cat([_attended(q_THK[mine], *seen) for mine, seen in zip(parts, seen_of, strict=True)])
    errors = [error_of(found[mine], wanted[mine]) for mine in parts]
    worst = max(range(len(works)), key=lambda number: errors[number] if errors[number] == errors[number] else math.inf)
    behind, new = works[worst]
    # Judge each context separately: in one norm over all, a short context with its larger values would hide errors in a long one.
    checks.judge(f"{name}, worst of {len(works)} contexts", found[parts[worst]], wanted[parts[worst]], where=f" at {new} behind {behind}")


def _kind_of(works: list[tuple[int, int]]) -> str:
    most = max(new for _, new in works)
    return "decode" if most == 1 else "few" if most < 10 else "prefill"


def _attended(q_PHK: Tensor, k_LGK: Tensor, v_LGK: Tensor) -> Tensor:
    """Attention of the last P of L tokens, in float64 (P, H, K)."""
    group, behind = q_PHK.shape[1] // k_LGK.shape[1], len(k_LGK) - len(q_PHK)
    k_LHK, v_LHK = k_LGK.repeat_interleave(group, 1), v_LGK.repeat_interleave(group, 1)
    scores = torch.einsum("phk,lhk->hpl", q_PHK, k_LHK) * q_PHK.shape[-1] ** -0.5
    places = torch.arange(len(k_LGK), device=scores.device)
    hidden = places > places[behind:].unsqueeze(1)
    return torch.einsum("hpl,lhk->phk", scores.masked_fill(hidden, -torch.inf).softmax(-1), v_LHK)


def _as_kept(checks: Checks, new: Tensor, kv_dtype: torch.dtype) -> Tensor:
    """The values in float64, rounded to FP8 if the cache is FP8. Other rounding is within the tolerance."""
    return new.to(checks.dtype).to(FP8).double() if kv_dtype == FP8 else new


def _kv_dtypes(checks: Checks) -> list[torch.dtype]:
    return [checks.dtype, FP8] if checks.device.type == "cuda" else [checks.dtype]


def _turned(x_TXK: Tensor, rotation: Rotation) -> Tensor:
    """`Rotation.apply` in float64, without a kernel."""
    first, second = x_TXK.chunk(2, -1)
    cos, sin = rotation.cos_T1F.double(), rotation.sin_T1F.double()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
