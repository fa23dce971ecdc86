"""The mathematics: losses and weights on log-probabilities, without a model (torch and the standard library alone)."""

from __future__ import annotations

from gvpo.objective.gvpo import gvpo_components, gvpo_loss, gvpo_weights

OBJECTIVES = {"gvpo": gvpo_loss}
"""By name, what can be minimised: (logps_N, ref_logps_N, rewards_N, group_ids_N, *, beta, denominator) -> scalar."""

__all__ = ["OBJECTIVES", "gvpo_components", "gvpo_loss", "gvpo_weights"]
