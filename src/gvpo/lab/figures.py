"""The figures of the lab, each from what its module measured; every title says what is to be seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from gvpo.lab import ablations, grpo, pairs
from gvpo.lab.ablations import Ablations
from gvpo.lab.gradient_variance import Moved
from gvpo.lab.grpo import Grpo
from gvpo.lab.iterations import STEPS, Iterations
from gvpo.lab.pairs import Pairs
from gvpo.lab.policies import kl, mean, total_variation
from gvpo.lab.run import Section
from gvpo.lab.sampling import STATEMENTS, Sampling
from gvpo.lab.style import BLUE, GREY, ORANGE, PALE, note, panels, save, styled
from gvpo.lab.uniqueness import STARTS, Uniqueness

FLOOR = 1e-13
"""Total variations below it are rounding."""


def draw(section: Section, folder: Path) -> list[str]:
    """Write the section's figure, if it has one, as PNG and SVG; the names that were written."""
    if section.module not in FIGURES:
        return []
    with styled():
        save(FIGURES[section.module](section.measured), folder, section.module)
    return [section.module]


def draw_uniqueness(measured: dict[str, Uniqueness]) -> Figure:
    """Total variation to pi*, step by step."""
    figure, axes = panels(f"{STARTS} random starts, one minimiser: the closed form π*", 2, sharey=True)
    names = {"softmax": "softmax table, 12 answers", "autoregressive": "autoregressive table, 15 sequences"}
    for panel, (name, result) in zip(axes, measured.items(), strict=True):
        for descent in result.descents:
            distances = [max(total_variation(policy, result.problem.optimum()), FLOOR) for policy in descent.path]
            panel.semilogy(distances, color=BLUE, alpha=0.45, linewidth=1.6)
            panel.plot(len(distances) - 1, distances[-1], "o", color=BLUE, markersize=5)
        panel.axhline(1e-6, color=ORANGE, linestyle=(0, (5, 3)), linewidth=1.6)
        panel.set(title=names[name], xlabel="step of the minimisation", ylim=(FLOOR / 3, 3))
    axes[0].set_ylabel("total variation to π*")
    note(axes[0], "tolerance of the claim", 0, 4e-7, ORANGE, va="top")
    return figure


def draw_sampling(measured: Sampling) -> Figure:
    """Where each sampling law ends; the ones without full support, alone and mended."""
    figure, (panel,) = panels("Any source leads to the same optimum, if it can give every answer", 1)
    optimum_A = measured.problems["softmax"].optimum()
    rows = [(law, [measured.descents["softmax"][law]], BLUE) for law in STATEMENTS]
    for law, limited in measured.limited.items():
        rows += [(f"{law} alone", limited.ends, ORANGE), (f"{law} + 5 % on-policy", limited.mended, BLUE)]
    for place, (_, descents, color) in enumerate(reversed(rows)):
        for descent in descents:
            start, end = (max(total_variation(descent.path[at], optimum_A), FLOOR) for at in (0, -1))
            panel.plot([start, end], [place, place], color=PALE, linewidth=2.2, zorder=1)
            panel.plot(start, place, "o", color="white", markeredgecolor=GREY, markersize=8, zorder=2)
            panel.plot(end, place, "o", color=color, markersize=10, zorder=3)
    panel.axvline(1e-6, color=GREY, linestyle=(0, (5, 3)), linewidth=1.4, zorder=0)
    panel.set_xscale("log")
    panel.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)], color="#22262B")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.set(xlabel="total variation to π* (open: at the start, filled: at the end)", xlim=(FLOOR / 2, 3))
    note(panel, "π*, to the tolerance", 6e-7, len(rows) - 0.45, GREY, ha="right")
    for place, limited in zip((3, 1), measured.limited.values(), strict=True):
        apart = total_variation(*(end.policy for end in limited.ends))
        note(panel, f"two minimisers, {apart:.2f} apart", 0.12, place, ORANGE, ha="right", va="center")
    return figure


def draw_iterations(measured: Iterations) -> Figure:
    """Reward and KL to the start along the path, with the closed form between the steps."""
    figure, axes = panels(f"{STEPS} exact steps follow π₀ exp(tR/β), ever further from the start", 2)
    times = [t / 20 for t in range(20 * STEPS + 1)]
    curve = [_along(measured, t) for t in times]
    rewards_A, start_A = measured.problem.rewards_A, measured.policies[0]
    axes[0].plot(times, [mean(policy.exp(), rewards_A) for policy in curve], color=PALE, linewidth=5)
    axes[0].plot(measured.rewards(), "o", color=BLUE)
    axes[1].plot(times, [kl(policy, start_A) for policy in curve], color=PALE, linewidth=5)
    axes[1].plot(measured.kl_to_start(), "o", color=BLUE)
    axes[0].set(title="mean reward", xlabel="step")
    axes[1].set(title="KL to the start, nats", xlabel="step")
    note(axes[0], "closed form", 2.1, mean(_along(measured, 2.4).exp(), rewards_A), GREY, xytext=(14, -26),
          textcoords="offset points")  # fmt: skip
    note(axes[0], "measured", 1, measured.rewards()[1], BLUE, xytext=(8, -18), textcoords="offset points")
    axes[0].locator_params(axis="y", nbins=5)
    return figure


def draw_variance(measured: dict[str, Moved]) -> Figure:
    """Both tables, with what each variance grows like."""
    figure, axes = panels("Far off-policy, GVPO stays quiet and importance weights explode", 2)
    moves, drifts = measured["sampling moves"], measured["policy drifts"]
    for panel, table in zip(axes, (moves, drifts), strict=True):
        panel.semilogy(table.divergence, table.weighted, "o-", color=ORANGE)
        panel.semilogy(table.divergence, table.gvpo, "o-", color=BLUE)
        panel.set(xlim=(-0.3, 12.3), xticks=range(0, 9, 2))
        note(panel, "importance-\nweighted", 8.8, table.weighted[-1], ORANGE, va="center")
        note(panel, "GVPO", 8.8, table.gvpo[-1], BLUE, va="center")
    axes[1].semilogy(drifts.divergence[1:], drifts.log_ratio[1:], color=BLUE, linestyle=":", linewidth=1.8)
    axes[1].semilogy(drifts.divergence, drifts.second_moment, color=ORANGE, linestyle=":", linewidth=1.8)
    note(axes[1], "E[ratio²]", 8.8, drifts.second_moment[-1], ORANGE, va="center")
    note(axes[1], "Var(β log-ratio)", 2.6, 0.26, BLUE)
    axes[0].set(title="the sampler moves away", xlabel="KL(π || sampler), nats", ylabel="variance of the gradient")
    axes[1].set(title="the policy drifts from its reference", xlabel="KL(π || reference), nats")
    return figure


def draw_ablations(measured: Ablations) -> Figure:
    """The probability of every answer at each end, the worst reward first."""
    figure, axes = panels("What each term is for: where training ends without it", 4, shape=(2, 2), sharey=True)
    problem = measured.problem
    order_A = problem.rewards_A.argsort()
    ends = {
        "all terms: π*": (measured.whole, BLUE),
        "no covariance: the reference is forgotten": (measured.no_covariance["uniform"], ORANGE),
        "no variance: argmax of R + β log π_ref": (measured.no_variance["uniform"].policy, ORANGE),
        "neither: argmax of R": (measured.reward["uniform"].policy, ORANGE),
    }
    places = range(ablations.ANSWERS)
    for number, (panel, (name, (policy, color))) in enumerate(zip(axes, ends.items(), strict=True)):
        panel.bar(places, policy.exp()[order_A].tolist(), color=color, width=0.7)
        if number:
            panel.plot(places, problem.optimum().exp()[order_A].tolist(), "_", color=BLUE, markersize=24, mew=3)
        panel.set_title(name)
        panel.set_xticks([])
        panel.set_ylim(0, 1.05)
    likeliest = int((order_A == problem.optimum().argmax()).nonzero())
    for panel in axes[::2]:
        panel.set_ylabel("probability")
    for panel in axes[2:]:
        panel.set_xlabel("answers, best reward on the right")
    note(axes[1], "π*", likeliest, float(problem.optimum().exp().max()), BLUE, ha="center", xytext=(0, 8),
          textcoords="offset points")  # fmt: skip
    return figure


def draw_grpo(measured: Grpo) -> Figure:
    """Probability by reward: pi*, and where GRPO ends."""
    figure, axes = panels("Dividing by the spread, GRPO stops too sharp or collapses", 2)
    for panel, (beta, end) in zip(axes, measured.ends.items(), strict=True):
        order_A = end.problem.rewards_A.argsort()
        rewards = end.problem.rewards_A[order_A].tolist()
        for policy, color in ((end.policy, ORANGE), (end.problem.optimum(), BLUE)):
            panel.plot(rewards, policy.exp()[order_A].tolist(), "o-", color=color, markersize=5, linewidth=1.6)
        panel.set(xlabel="reward of the answer")
        distance = total_variation(end.policy, end.problem.optimum())
        panel.set_title(f"β = {beta:g}: total variation to π* {distance:.2f}")
        panel.set_ylim(0)
    axes[0].set_ylabel("probability")
    stopped, collapsed = (measured.ends[beta] for beta in (grpo.STOPS, grpo.COLLAPSES))
    note(
        axes[0],
        f"GRPO: tilt {stopped.tilts[-1]:.1f} R",
        0.86,
        float(stopped.policy.exp().max()) * 0.6,
        ORANGE,
        ha="right",
    )
    note(axes[0], "π*: tilt 1 R", 0.05, 0.0185, BLUE)
    note(axes[1], "GRPO: all on\nthe best answer", 0.9, 0.93, ORANGE, ha="right", va="top")
    note(axes[1], "π*", 0.5, float(collapsed.problem.optimum().exp().max()) * 1.1, BLUE)
    return figure


def draw_pairs(measured: Pairs) -> Figure:
    """Hard labels on a chain: DPO's logits step by step, GVPO's minimiser."""
    figure, (panel,) = panels("Hard labels: DPO's logits never stop growing, GVPO's do", 1)
    panel.semilogx(pairs.MARKS, measured.dpo_spreads, "o-", color=ORANGE, base=2)
    panel.set_xticks(pairs.MARKS, [str(mark) for mark in pairs.MARKS])
    panel.minorticks_off()
    finite = float(measured.gvpo_hard.max() - measured.gvpo_hard.min())
    panel.axhline(finite, color=BLUE)
    panel.set(xlabel="gradient steps", ylabel="spread of the logits, nats", ylim=(0, None), yticks=range(0, 25, 5))
    note(panel, "DPO: the same growth with every doubling", 400, measured.dpo_spreads[2], ORANGE, xytext=(0, -34),
          textcoords="offset points")  # fmt: skip
    note(panel, "GVPO: exact fit of rewards 1 and 0", 400, finite, BLUE, xytext=(0, 10), textcoords="offset points")
    return figure


FIGURES: dict[str, Callable[[Any], Figure]] = {
    "uniqueness": draw_uniqueness,
    "sampling": draw_sampling,
    "iterations": draw_iterations,
    "pairs": draw_pairs,
    "grpo": draw_grpo,
    "gradient_variance": draw_variance,
    "ablations": draw_ablations,
}
"""By the module that measured; the file has its name."""


def _along(measured: Iterations, time: float) -> Tensor:
    """log of pi_0 exp(tR/beta) / Z, for any t."""
    return (measured.policies[0] + time * measured.problem.rewards_A / measured.problem.beta).log_softmax(0)
