"""GRPO, Dr. GRPO, RLOO, DPO and IPO against the loss code of TRL's trainers, run on the same numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gvpo.objective import dpo_loss, dr_grpo_loss, grpo_loss, ipo_loss, rloo_loss

K, GROUPS, WIDTH, EPSILON, LONGEST = 5, 3, 6, 0.2, 9
"""K / (K - 1), which TRL's standard deviation has in float32 whatever the rewards are in, is exact."""
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
BETAS = pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL's trainers; imported here, where only these tests wait for them."""
    from trl import DPOTrainer, GRPOTrainer, RLOOTrainer
    from trl.trainer.utils import nanstd

    return SimpleNamespace(DPO=DPOTrainer, GRPO=GRPOTrainer, RLOO=RLOOTrainer, nanstd=nanstd)


def sampled(seed: int, drift: float) -> dict[str, Tensor]:
    """GROUPS of K completions of 1 to WIDTH tokens, `drift` nats a token between the policies."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(K * GROUPS, WIDTH, generator=generator, dtype=torch.float64)

    logps = -normal().abs() - 0.1
    lengths = torch.randint(1, WIDTH + 1, (K * GROUPS, 1), generator=generator)
    return {
        "logps": logps,
        "old": logps + drift * normal(),
        "refs": logps + drift * normal(),
        "mask": torch.arange(WIDTH) < lengths,
        "rewards": torch.rand(K * GROUPS, generator=generator, dtype=torch.float64).round(decimals=1),
        "ids": torch.arange(GROUPS).repeat_interleave(K),
    }


def pretend_trainer(**settings: Any) -> Any:
    """What TRL's losses read of a trainer, without a model: log-probs come from `settings`."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        reduce=lambda values, reduction: values,
        gather=lambda values: values,
        gather_for_metrics=lambda values: values,
        num_processes=1,
    )
    common = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(use_bias_correction_kl=False, delta=None),
        "aux_loss_enabled": False,
        "epsilon_low": EPSILON,
        "epsilon_high": EPSILON,
        "current_gradient_accumulation_steps": 1,
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }
    return SimpleNamespace(**common | settings)


def per_token(logps: Tensor) -> Callable[..., Any]:
    return lambda *args, **kwargs: (logps, torch.zeros_like(logps), None)


def tokens(mask: Tensor) -> dict[str, Tensor]:
    """Ids that no one looks at, and the mask as TRL has it."""
    prompt = torch.zeros(len(mask), 2, dtype=torch.long)
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt + 1,
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
    }


def of_dtype(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: values.to(dtype) if values.is_floating_point() else values for name, values in batch.items()}


def assert_same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], at: Tensor, tol: float) -> None:
    results = []
    for function in (ours, theirs):
        leaf = at.clone().requires_grad_()
        loss = function(leaf)
        results.append((loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()))
    (loss, gradient), (their_loss, their_gradient) = results
    assert their_gradient.abs().max() > 1e-3
    assert torch.allclose(loss, their_loss, rtol=tol, atol=tol)
    assert torch.allclose(gradient, their_gradient, rtol=tol, atol=tol * float(their_gradient.abs().max()))


@DTYPES
@BETAS
@pytest.mark.parametrize("drift", [0.0, 0.2, 2.0])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_grpo(trl: Any, kind: str, drift: float, beta: float, dtype: torch.dtype, tolerance: float) -> None:
    batch = of_dtype(sampled(1, drift), dtype)
    rewards = batch["rewards"].view(GROUPS, K)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if kind == "grpo":  # scale_rewards="group", else "none"
        advantages = advantages / (trl.nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    inputs = {"advantages": advantages.flatten(), "old_per_token_logps": batch["old"]}
    inputs |= {"ref_per_token_logps": batch["refs"], **tokens(batch["mask"])}
    if drift == 2.0:
        ratios = (batch["logps"] - batch["old"]).exp()[batch["mask"]]
        assert (ratios > 1 + EPSILON).any() and (ratios < 1 - EPSILON).any()

    def theirs(logps: Tensor) -> Tensor:
        trainer = pretend_trainer(
            _get_per_token_logps_and_entropies=per_token(logps),
            beta=beta,
            loss_type=kind,
            max_completion_length=LONGEST,
            importance_sampling_level="token",
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            _entropy_bonus_enabled=False,
        )
        return trl.GRPO._compute_loss(trainer, None, inputs)

    def ours(logps: Tensor) -> Tensor:
        columns = (logps, batch["old"], batch["refs"], batch["mask"], batch["rewards"], batch["ids"])
        if kind == "grpo":
            return grpo_loss(*columns, beta=beta, epsilon=EPSILON)
        return dr_grpo_loss(*columns, beta=beta, epsilon=EPSILON, max_completion_length=LONGEST)

    assert_same(ours, theirs, batch["logps"], tolerance)


@DTYPES
@BETAS
@pytest.mark.parametrize("drift", [0.0, 0.1, 1.0])
def test_rloo(trl: Any, drift: float, beta: float, dtype: torch.dtype, tolerance: float) -> None:
    batch = of_dtype(sampled(2, drift), dtype)
    mask = batch["mask"]
    # As in TRL: the KL to the reference, estimated on the sampling policy's log-probs, comes off the reward.
    rewards = batch["rewards"] - beta * ((batch["old"] - batch["refs"]) * mask).sum(-1)
    grouped = rewards.view(GROUPS, K)
    baselines = (grouped.sum(1, keepdim=True) - grouped) / (K - 1)
    inputs = {"advantages": rewards - baselines.flatten(), "old_logps": (batch["old"] * mask).sum(1), **tokens(mask)}

    def theirs(logps: Tensor) -> Tensor:
        trainer = pretend_trainer(_get_per_token_logps_and_entropies=per_token(logps))
        return trl.RLOO._compute_loss(trainer, None, inputs)

    def ours(logps: Tensor) -> Tensor:
        columns = (logps, batch["old"], batch["refs"], mask, batch["rewards"], batch["ids"])
        return rloo_loss(*columns, beta=beta, epsilon=EPSILON)

    assert_same(ours, theirs, batch["logps"], tolerance)


@DTYPES
@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_preferences(trl: Any, kind: str, beta: float, dtype: torch.dtype, tolerance: float) -> None:
    batch = of_dtype(sampled(3, 2.0), dtype)
    # One token a completion: TRL divides IPO's log-ratios by the length, the paper does not.
    logps_N, refs_N, ids_N = batch["logps"][:, 0], batch["refs"][:, 0], batch["ids"]
    # No ties: every group has K(K - 1)/2 pairs, and the mean over pairs is the mean over groups.
    order = torch.tensor([2, 0, 3, 1, 4, 0, 1, 4, 2, 3, 4, 3, 1, 0, 2])
    everyone = range(len(order))
    pairs = [(i, j) for i in everyone for j in everyone if ids_N[i] == ids_N[j] and order[i] > order[j]]
    winners, losers = torch.tensor(pairs).unbind(1)

    def in_pairs(values_N: Tensor) -> Tensor:
        """TRL's batch: the chosen ones, then the rejected, each a prompt's place and a completion's."""
        return torch.cat([values_N[winners], values_N[losers]])[:, None]

    def outputs(logps_N: Tensor) -> Any:
        flat = torch.zeros(2 * len(pairs), 1, dtype=logps_N.dtype)
        return SimpleNamespace(log_probs=in_pairs(logps_N), entropy=flat, mean_logits=flat, is_top1=flat > 0)

    ones = torch.ones(2 * len(pairs), 2, dtype=torch.long)
    prompt = torch.tensor([[0, 1]]).expand(len(ones), 2)
    reference = in_pairs(refs_N).squeeze(1).chunk(2)

    def theirs(logps_N: Tensor) -> Tensor:
        trainer = pretend_trainer(
            beta=beta,
            loss_types=[kind],
            loss_weights=[1.0],
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            use_weighting=False,
            _total_train_tokens=0,
            _tp_size=1,
        )
        inputs = {"input_ids": ones, "attention_mask": ones, "completion_mask": prompt}
        inputs |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
        return trl.DPO._compute_loss(trainer, lambda **kwargs: outputs(logps_N), inputs, False)

    def ours(logps_N: Tensor) -> Tensor:
        return (dpo_loss if kind == "sigmoid" else ipo_loss)(logps_N, refs_N, order, ids_N, beta=beta)

    assert_same(ours, theirs, logps_N, tolerance)
