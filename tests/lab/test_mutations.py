"""The lab fails when the objective is broken on purpose: each mistake is one that a rewrite could make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gvpo import objective
from gvpo.cli.main import main
from gvpo.objective.members import Groups

LOSS, WEIGHTS, COMPONENTS, DPO = (
    objective.gvpo_loss,
    objective.gvpo_weights,
    objective.gvpo_components,
    objective.dpo_loss,
)


def factor_of_two(*args: Any, **named: Any) -> Tensor:
    return 2 * LOSS(*args, **named)


def no_beta(*args: Any, beta: float, **named: Any) -> Tensor:
    return LOSS(*args, beta=1.0, **named)


def reference_upside_down(logps: Tensor, refs: Tensor, *args: Any, **named: Any) -> Tensor:
    return LOSS(logps, -refs, *args, **named)


def rewards_upside_down(logps: Tensor, refs: Tensor, rewards: Tensor, *args: Any, **named: Any) -> Tensor:
    return LOSS(logps, refs, -rewards, *args, **named)


def forgetful_of_groups(logps: Tensor, refs: Tensor, rewards: Tensor, ids: Tensor, **named: Any) -> Tensor:
    return LOSS(logps, refs, rewards, torch.zeros_like(ids), **named)


def pairs_by_place(logps: Tensor, refs: Tensor, rewards: Tensor, ids: Tensor, **named: Any) -> Tensor:
    return LOSS(logps, refs, rewards, torch.arange(len(ids)) // 2, **named)


def in_single_precision(logps: Tensor, refs: Tensor, *args: Any, **named: Any) -> Tensor:
    return LOSS(logps.float(), refs.float(), *args, **named)


def uncentred(logps: Tensor, refs: Tensor, rewards: Tensor, ids: Tensor, *, beta: float, **_: Any) -> Tensor:
    _, ids, sizes = torch.unique(ids, return_inverse=True, return_counts=True)
    return (((beta * (logps - refs) - rewards) ** 2 / (sizes - 1).clamp(min=1)[ids]).sum() / len(sizes)) / 2


def weights_without_variance(*args: Any, components: Any = (), **named: Any) -> Tensor:
    return WEIGHTS(*args, components=[name for name in components if name != "variance"] or ["reward"], **named)


def weights_without_covariance(*args: Any, components: Any = (), **named: Any) -> Tensor:
    return WEIGHTS(*args, components=[name for name in components if name != "covariance"] or ["reward"], **named)


def switches_ignored(*args: Any, components: Any = (), **named: Any) -> Tensor:
    return WEIGHTS(*args, **named)


def variance_halved(*args: Any, **named: Any) -> dict[str, Tensor]:
    moments = COMPONENTS(*args, **named)
    return moments | {"var": moments["var"] / 2}


def another_constant(*args: Any, **named: Any) -> dict[str, Tensor]:
    moments = COMPONENTS(*args, **named)
    return moments | {"constant": 2 * moments["constant"]}


def dpo_for_the_worse(logps: Tensor, refs: Tensor, rewards: Tensor, *args: Any, **named: Any) -> Tensor:
    return DPO(logps, refs, -rewards, *args, **named)


MUTATIONS: list[tuple[str, Callable[..., Any], str]] = [
    ("gvpo_loss", factor_of_two, "finite-groups"),
    ("gvpo_loss", no_beta, "finite-groups"),
    ("gvpo_loss", no_beta, "uniqueness"),
    ("gvpo_loss", reference_upside_down, "finite-groups"),
    ("gvpo_loss", reference_upside_down, "iterations"),
    ("gvpo_loss", rewards_upside_down, "iterations"),
    ("gvpo_loss", forgetful_of_groups, "finite-groups"),
    ("gvpo_loss", pairs_by_place, "finite-groups"),
    ("gvpo_loss", in_single_precision, "finite-groups"),
    ("gvpo_loss", uncentred, "finite-groups"),
    ("gvpo_loss", uncentred, "sampling"),
    ("gvpo_weights", weights_without_variance, "policy-gradients"),
    ("gvpo_weights", weights_without_covariance, "policy-gradients"),
    ("gvpo_weights", switches_ignored, "ablations"),
    ("gvpo_components", variance_halved, "policy-gradients"),
    ("gvpo_components", another_constant, "policy-gradients"),
    ("dpo_loss", dpo_for_the_worse, "pairs"),
]


def assert_fails(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "--only", family]) == 1
    out = capsys.readouterr().out
    assert "FAILS" in out and " claims hold (" in out


@pytest.mark.parametrize(("name", "broken", "family"), MUTATIONS, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_function_is_found(
    name: str,
    broken: Callable[..., Any],
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(objective, name, broken)
    assert_fails(family, capsys)


def no_bessel(self: Groups, a_N: Tensor, b_N: Tensor, denominator: float | None = None) -> Tensor:
    return (a_N * b_N / self.sizes_P[self.index_N]).sum() / (denominator or self.teaching() or 1)


def mean_over_members(self: Groups, a_N: Tensor, b_N: Tensor, denominator: float | None = None) -> Tensor:
    return (a_N * b_N / (self.sizes_P - 1).clamp(min=1)[self.index_N]).sum() / len(self.index_N)


def centred_over_the_batch(self: Groups, values_N: Tensor) -> Tensor:
    return values_N - values_N.mean()


@pytest.mark.parametrize(
    ("name", "broken"),
    [("mean_covariance", no_bessel), ("mean_covariance", mean_over_members), ("centre", centred_over_the_batch)],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("family", ["finite-groups", "policy-gradients"])
def test_broken_moments_are_found(
    name: str,
    broken: Callable[..., Any],
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Groups, name, broken)
    assert_fails(family, capsys)


def test_nothing_is_found_where_nothing_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "--only", "finite-groups"]) == 0
    assert "FAILS" not in capsys.readouterr().out
