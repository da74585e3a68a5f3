"""Check norms and the MLP's SwiGLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kernels.checks import Checks, poisoned


def small(checks: Checks) -> None:
    from parallel.cuda.elementwise import add_rms_norm, rms_norm, swiglu

    width = checks.sizes.width
    for rows in checks.sizes.rows:
        x, residual, weight = checks.random(rows, width), checks.random(rows, width), checks.random(width)
        total = x.double() + residual.double()
        with poisoned():
            normed = rms_norm(x, weight, 1e-6)
            stream = residual.clone()
            added = add_rms_norm(x, stream, weight, 1e-6)
            gated = swiglu(wide := checks.random(rows, 2 * checks.sizes.inner))
        checks.judge(f"rms norm of {rows}", normed, _normed(x.double(), weight.double()))
        checks.judge(f"add and norm of {rows}", added, _normed(total, weight.double()))
        checks.judge(f"residual stream of {rows}", stream, total)
        gate, up = wide.double().chunk(2, -1)
        checks.judge(f"swiglu of {rows}", gated, F.silu(gate) * up)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
