"""Rotary position embedding: each head's first and second half are rotated into each other by an angle that grows with the
position (RoFormer, arXiv 2104.09864), optionally stretched to longer contexts (YaRN, arXiv 2309.00071).

T tokens, X any heads, K head width, F = K / 2 frequencies.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import RopeConfig, YarnConfig
from parallel.elementwise_kernels import elementwise_kernels_for


@dataclass(frozen=True)
class Rotation:
    """The rotation of one step's queries and keys by their positions. The same for all layers."""

    cos_T1F: Tensor
    sin_T1F: Tensor

    def apply(self, x_TXK: Tensor) -> Tensor:
        kernels = elementwise_kernels_for(x_TXK)
        if kernels is not None:
            return kernels.apply_rope(x_TXK, self.cos_T1F, self.sin_T1F)
        first, second = x_TXK.chunk(2, dim=-1)
        cos, sin = self.cos_T1F, self.sin_T1F
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Rope:
    """The frequencies of one model on one device."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        period_F = config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        frequency_F = 1.0 / period_F
        self.scale = 1.0
        if config.yarn is not None:
            frequency_F = _yarn_frequencies(period_F, config.yarn, config.theta)
            self.scale = yarn_scale(config.yarn)
        self.frequency_F = frequency_F.to(device)

    def rotation(self, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
        """Angles are computed in float32: bfloat16 cannot distinguish positions 256 and 257."""
        angles_TF = positions_T.float().unsqueeze(1) * self.frequency_F
        cos, sin = angles_TF.cos() * self.scale, angles_TF.sin() * self.scale
        return Rotation(cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1))


def yarn_scale(yarn: YarnConfig) -> float:
    """The factor by which queries and keys are lengthened, which makes the softmax sharper (section 3.4: 0.1 ln(s) + 1)."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return 1.0 if yarn.factor <= 1 else 0.1 * math.log(yarn.factor) + 1.0


def _yarn_frequencies(period_F: Tensor, yarn: YarnConfig, theta: float) -> Tensor:
    """Interpolated frequencies, "NTK by parts" in the paper (section 3.2): fast ones are kept, slow ones divided by the factor, with a ramp
    in between.

    The ramp runs between the frequencies that turn ``beta_fast`` and ``beta_slow`` times within the original context.
    """
    half = period_F.numel()

    def frequency_that_turns(times: float) -> float:
        return half * math.log(yarn.original_max_tokens / (times * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(frequency_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(frequency_that_turns(yarn.beta_slow)), 2 * half - 1)
    width = last - first if last != first else 0.001
    fast_F = 1 - ((torch.arange(half, dtype=torch.float32) - first) / width).clamp(0, 1)
    # In transformers' order of operations: at position 100,000 another rounding changes the angle by about 0.01 rad.
    return 1.0 / (yarn.factor * period_F) * (1 - fast_F) + 1.0 / period_F * fast_F
