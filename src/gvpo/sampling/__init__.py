"""Drawing completions from the policy: the `Sampler` protocol and the embedded torch sampler."""

from __future__ import annotations

from gvpo.sampling.sampler import Sample, Sampler, SamplingParams
from gvpo.sampling.torch_sampler import TorchSampler

__all__ = ["Sample", "Sampler", "SamplingParams", "TorchSampler"]
