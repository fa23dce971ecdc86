"""What is set in verl's own configuration."""

from __future__ import annotations

from dataclasses import dataclass

from verl.workers.config import PolicyLossConfig

LOSS = "gvpo"
"""`policy_loss.loss_mode` of all this."""

REFERENCES = {"old": "old_log_probs", "ref": "ref_log_prob"}
"""gvpo_reference: the field of a batch that holds its log-probs."""

NO_BETA = (
    "loss_mode=gvpo needs its own settings: set actor_rollout_ref.actor.policy_loss._target_="
    "gvpo.integrations.verl.GVPOPolicyLossConfig and +actor_rollout_ref.actor.policy_loss.gvpo_beta=0.1"
)


@dataclass
class GVPOPolicyLossConfig(PolicyLossConfig):
    """verl's `actor_rollout_ref.actor.policy_loss`, with GVPO's numbers beside the others.

    gvpo_beta: strength of the pull towards the reference, reward per nat, > 0. gvpo_reference: "old" = the policy as it
    was when verl scored the batch (`old_log_probs`; in bypass mode the rollout engine's), "ref" = verl's reference
    model (`ref_log_prob`, which verl computes under `actor.use_kl_loss`; its coefficient may be 0).

    Raises ValueError for a value out of range.
    """

    gvpo_beta: float = 0.1
    gvpo_reference: str = "old"

    def __post_init__(self) -> None:
        if not isinstance(self.gvpo_beta, int | float) or not 0 < self.gvpo_beta < float("inf"):
            raise ValueError(f"policy_loss.gvpo_beta is {self.gvpo_beta}: it must be a number above 0")
        if self.gvpo_reference not in REFERENCES:
            raise ValueError(
                f"policy_loss.gvpo_reference is {self.gvpo_reference!r}: it must be one of {[*REFERENCES]}"
            )
