"""Post-training of language models by regression onto rewards (Group Variance Policy Optimization, arXiv 2504.19599).

Everything public is here, one line per name; nothing heavy is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gvpo.errors import UserError as UserError
    from gvpo.group_files import append_groups as append_groups
    from gvpo.group_files import read_groups as read_groups
    from gvpo.group_files import write_groups as write_groups
    from gvpo.groups import Completion as Completion
    from gvpo.groups import Group as Group
    from gvpo.models.encoding import encode_prompt as encode_prompt
    from gvpo.models.encoding import end_token_ids as end_token_ids
    from gvpo.models.loading import load_model as load_model
    from gvpo.models.scoring import Scorer as Scorer
    from gvpo.models.scoring import sequence_logprobs as sequence_logprobs
    from gvpo.objective import gvpo_components as gvpo_components
    from gvpo.objective import gvpo_loss as gvpo_loss
    from gvpo.objective import gvpo_weights as gvpo_weights
    from gvpo.sampling import Sample as Sample
    from gvpo.sampling import Sampler as Sampler
    from gvpo.sampling import SamplingParams as SamplingParams
    from gvpo.sampling import TorchSampler as TorchSampler
    from gvpo.training.config import GVPOConfig as GVPOConfig
    from gvpo.training.loop import GVPOTrainer as GVPOTrainer
    from gvpo.training.update import accumulate_gradients as accumulate_gradients

__version__ = "0.1.0"

_HOME = {
    "Completion": "gvpo.groups",
    "GVPOConfig": "gvpo.training.config",
    "GVPOTrainer": "gvpo.training.loop",
    "Group": "gvpo.groups",
    "Sample": "gvpo.sampling",
    "Sampler": "gvpo.sampling",
    "SamplingParams": "gvpo.sampling",
    "Scorer": "gvpo.models.scoring",
    "TorchSampler": "gvpo.sampling",
    "UserError": "gvpo.errors",
    "accumulate_gradients": "gvpo.training.update",
    "append_groups": "gvpo.group_files",
    "encode_prompt": "gvpo.models.encoding",
    "end_token_ids": "gvpo.models.encoding",
    "gvpo_components": "gvpo.objective",
    "gvpo_loss": "gvpo.objective",
    "gvpo_weights": "gvpo.objective",
    "load_model": "gvpo.models.loading",
    "read_groups": "gvpo.group_files",
    "sequence_logprobs": "gvpo.models.scoring",
    "write_groups": "gvpo.group_files",
}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gvpo' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
