"""Probability ratios to the policy that sampled, clipped: what GRPO, Dr. GRPO and RLOO share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clipped_surrogate(log_ratios: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A), elementwise (PPO, arXiv 1707.06347, equation 7)."""
    # Where a large ratio is clipped it is cut before exp overflows: its gradient would be 0 * inf.
    ratios = torch.where(advantages < 0, log_ratios, log_ratios.clamp(max=math.log1p(epsilon) + 1)).exp()
    return torch.minimum(ratios * advantages, ratios.clamp(1 - epsilon, 1 + epsilon) * advantages)


def kl_estimates(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per token, an estimate of KL(pi || pi_ref) that is never negative: exp(-d) + d - 1, d = l - r."""
    differences = logps - ref_logps
    return torch.expm1(-differences) + differences
