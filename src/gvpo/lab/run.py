"""All claims, in order: each family measures, then judges what it measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from gvpo.errors import UserError, nearest
from gvpo.lab import (
    ablations,
    finite_groups,
    gradient_variance,
    grpo,
    iterations,
    pairs,
    policy_gradients,
    sampling,
    uniqueness,
)
from gvpo.lab.claim import Claim

FAMILIES: dict[str, tuple[ModuleType, ...]] = {
    "uniqueness": (uniqueness,),
    "sampling": (sampling,),
    "finite-groups": (finite_groups,),
    "iterations": (iterations,),
    "pairs": (pairs,),
    "policy-gradients": (policy_gradients, grpo, gradient_variance),
    "ablations": (ablations,),
}
"""By name, the modules whose `measure` and `claims` make a family."""


class Section(NamedTuple):
    """What one module found: its name, its claims, and the measurements that figures are drawn from."""

    module: str
    claims: list[Claim]
    measured: Any


def check_families(names: Sequence[str]) -> None:
    """Raises UserError for a name that is no family's."""
    for name in names:
        if name not in FAMILIES:
            raise UserError(f"{name!r} is no family of claims; {nearest(name, FAMILIES)}")


def run_families(names: Sequence[str]) -> Iterator[Section]:
    """The sections of these families, in the order of FAMILIES, each as soon as it is measured."""
    for family, modules in FAMILIES.items():
        for module in modules if family in names else ():
            measured = module.measure()
            yield Section(module.__name__.rpartition(".")[2], module.claims(measured), measured)
