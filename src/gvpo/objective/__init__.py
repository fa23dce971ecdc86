"""The mathematics: losses and weights on log-probabilities, without a model (torch and the standard library alone).

`gvpo` is what the library is for. The others are what it is measured against: the same groups, rollouts and scoring,
another formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from gvpo.objective.ablations import gvpo_no_cov_loss, gvpo_no_cov_var_loss, gvpo_no_var_loss
from gvpo.objective.dpo import dpo_loss
from gvpo.objective.dr_grpo import dr_grpo_loss
from gvpo.objective.fit import fit_metrics
from gvpo.objective.grpo import grpo_loss
from gvpo.objective.gvpo import gvpo_components, gvpo_loss, gvpo_weights
from gvpo.objective.ipo import ipo_loss
from gvpo.objective.kimi_pmd import kimi_pmd_loss
from gvpo.objective.rebel import rebel_loss
from gvpo.objective.reinforce import reinforce_loss
from gvpo.objective.rloo import rloo_loss
from gvpo.objective.rows import Rows, row_slopes


class Objective(NamedTuple):
    """What can be minimised, and what it needs.

    loss: on sequences, (logps_N, ref_logps_N, rewards_N, group_ids_N, *, beta, denominator) -> scalar; on tokens,
        (logps_NT, old_logps_NT, ref_logps_NT, mask_NT, rewards_N, group_ids_N, *, beta, denominator) -> scalar.
    per_token: it is on tokens, and needs the log-probs of the policy that sampled.
    takes_zero_beta: beta = 0 leaves something to learn: the KL term is an extra.
    of_ratios: it depends on log-probs through log-ratios alone, so that where these are zero its gradient is known.
    settings: further keyword arguments, by the names of the config's fields.
    """

    loss: Callable[..., Tensor]
    per_token: bool = False
    takes_zero_beta: bool = False
    of_ratios: bool = True
    settings: tuple[str, ...] = ()


OBJECTIVES = {
    "gvpo": Objective(gvpo_loss),
    "gvpo_no_cov": Objective(gvpo_no_cov_loss, of_ratios=False),
    "gvpo_no_var": Objective(gvpo_no_var_loss, of_ratios=False),
    "gvpo_no_cov_var": Objective(gvpo_no_cov_var_loss),
    "reinforce": Objective(reinforce_loss, takes_zero_beta=True),
    "rloo": Objective(rloo_loss, per_token=True, takes_zero_beta=True, settings=("epsilon",)),
    "grpo": Objective(grpo_loss, per_token=True, takes_zero_beta=True, settings=("epsilon",)),
    "dr_grpo": Objective(
        dr_grpo_loss, per_token=True, takes_zero_beta=True, settings=("epsilon", "max_completion_length")
    ),
    "dpo": Objective(dpo_loss),
    "ipo": Objective(ipo_loss),
    "rebel": Objective(rebel_loss),
    "kimi_pmd": Objective(kimi_pmd_loss),
}
"""By name, what can be minimised."""

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Rows",
    "dpo_loss",
    "dr_grpo_loss",
    "fit_metrics",
    "grpo_loss",
    "gvpo_components",
    "gvpo_loss",
    "gvpo_no_cov_loss",
    "gvpo_no_cov_var_loss",
    "gvpo_no_var_loss",
    "gvpo_weights",
    "ipo_loss",
    "kimi_pmd_loss",
    "rebel_loss",
    "reinforce_loss",
    "rloo_loss",
    "row_slopes",
]
