"""What is wrong with a run, by name, with the one knob to turn: a pure function of its metrics so far.

Every test looks at a window of updates: single updates of few groups show anything by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gvpo.rewards.outputs import CAUSES
from gvpo.training.config import GVPOConfig

Rows = Sequence[Mapping[str, Any]]

GROUPS = 40
"""Groups that fit and signal are judged by at least, in longer windows where updates are small. Were one group in ten
to have signal, 40 without would come up once in 70 (0.9 ** 40); 40 groups of two give a variance to about a quarter."""

FIT_UPDATES = 20
"""Updates over which a fit is judged. Adam's first steps are of full size whatever the gradient's: runs that end at the
optimum overshoot for 5 to 10 updates, then come back."""

WORSE_THAN_REFERENCE = 2.0
"""Residual variance over reward variance. A policy that is its reference has 1: there the loss is half the rewards'
variance. At 2 doing nothing would have halved the loss; between them lies what few completions leave to chance."""

SIGNAL_UPDATES = 10
"""Updates in a row that have to be without signal."""

SOLVED = 0.05
"""Distance of the mean reward from the best one seen, over the range of rewards seen, up to which groups of equal
rewards are success: nothing is left to tell apart."""

CUT_OFF, CUT_OFF_WINDOW = 0.9, 10
"""Share of truncated completions, and updates. Above it the rewards judge beginnings; below, an update of 8 groups of 8
still has several whole completions to compare with."""

UNSCORED_WINDOW = 3
"""Updates without a group to train on, or all from the start: later on, one may be bad luck with the rewards."""

FAILED = "rewards/failed/"
"""How the metrics begin that count completions without an answer from a reward function."""

RETURN_AFTER = 50
"""Updates without a warning before the same one is news again. More than any window here: one case makes one note."""


@dataclass(frozen=True, slots=True)
class Symptom:
    """name: as in the metric `warning/NAME`; text: what is seen, over how many updates, and the knob, in one line."""

    name: str
    text: str


def symptoms(history: Rows, config: GVPOConfig) -> list[Symptom]:
    """What is wrong after the last row of a run's history, which holds evaluations before the start as update 0."""
    rows = [row for row in history if row["update"] > 0]
    checks = [_no_groups, _no_signal, _truncation, _failing_rewards]
    # What follows from the fit holds where implicit rewards are what is fitted.
    if config.objective == "gvpo":
        checks += [_divergence, _reference_drift]
    return [found for check in checks if (found := check(rows, config)) is not None]


def mark(history: Sequence[dict[str, Any]], config: GVPOConfig) -> list[Symptom]:
    """Put `warning/NAME` 1.0 into the last row for each symptom. Returns those that are news."""
    *before, row = history
    found = symptoms(history, config) if row["update"] > 0 else []
    recent = before[-RETURN_AFTER:]
    row |= {_key(one.name): 1.0 for one in found}
    return [one for one in found if not any(_key(one.name) in earlier for earlier in recent)]


def names_seen(history: Rows) -> list[str]:
    """The names of all warnings in a run's history, sorted."""
    prefix = _key("")
    return sorted({name.removeprefix(prefix) for row in history for name in row if name.startswith(prefix)})


def _key(name: str) -> str:
    return f"warning/{name}"


def _no_groups(rows: Rows, config: GVPOConfig) -> Symptom | None:
    window = rows[-UNSCORED_WINDOW:]
    if not window or any("reward" in row for row in window):
        return None
    return Symptom(
        "no_groups",
        f"no group has two rewarded completions, over {len(window)} update(s), which changed nothing: "
        "have reward_funcs return numbers, not None",
    )


def _no_signal(rows: Rows, config: GVPOConfig) -> Symptom | None:
    updates = _updates(SIGNAL_UPDATES, config)
    window = _window(rows, updates, "frac_reward_zero_std", "reward")
    if window is None or min(window["frac_reward_zero_std"]) < 1:
        return None
    reward = fmean(window["reward"])
    seen = f"all rewards were equal in every group of the last {updates} updates, {reward:.3g} on average"
    if not any(row.get("frac_reward_zero_std", 1) < 1 for row in rows):
        if any("source/policy" in row for row in rows[-updates:]):
            return Symptom("no_signal", f"{seen}: raise num_generations (now {config.num_generations})")
        return Symptom("no_signal", f"{seen}: give train_dataset groups whose rewards differ")
    best, span = max(_values(rows, "reward_max"), default=reward), _reward_range(rows)
    if best - reward <= SOLVED * span:
        return None
    return Symptom(
        "collapse", f"{seen} where {best:.3g} was seen before: lower learning_rate (now {config.learning_rate:g})"
    )


def _truncation(rows: Rows, config: GVPOConfig) -> Symptom | None:
    window = _window(rows, CUT_OFF_WINDOW, "completions/truncated", "source/policy")
    if window is None or (share := fmean(window["completions/truncated"])) < CUT_OFF:
        return None
    return Symptom(
        "truncation",
        f"{share:.0%} of the completions of the last {CUT_OFF_WINDOW} updates were cut off: "
        f"raise max_completion_length (now {config.max_completion_length})",
    )


def _failing_rewards(rows: Rows, config: GVPOConfig) -> Symptom | None:
    failed = {name.removeprefix(FAILED): value for name, value in (rows[-1] if rows else {}).items() if FAILED in name}
    if not (total := sum(value for name, value in failed.items() if name in CAUSES)):
        return None
    causes = ", ".join(f"{value:.0f} {name}" for name, value in failed.items() if name in CAUSES)
    return Symptom(
        "failing_rewards",
        f"a reward function gave {total:.0f} completions of the last rollout no answer ({causes}), which have no "
        "reward: see reward_failures in completions/, mend the function, or raise its limit "
        f"(reward_timeout {config.reward_timeout:g} s, reward_memory {config.reward_memory:g} GiB)",
    )


def _divergence(rows: Rows, config: GVPOConfig) -> Symptom | None:
    updates = _updates(FIT_UPDATES, config)
    window = _window(rows, updates, "residual_var", "reward_var")
    if window is None:
        return None
    # Rewards that have become alike explain little and ask for little: the run's own spread stays the measure.
    spread = max(fmean(window["reward_var"]), fmean(_values(rows, "reward_var")))
    residual = fmean(window["residual_var"])
    if spread == 0 or residual <= WORSE_THAN_REFERENCE * spread:
        return None
    return Symptom(
        "divergence",
        f"residual_var was {residual / spread:.3g} times the rewards' variance over the last {updates} updates, a "
        f"worse fit than the reference's own: lower learning_rate (now {config.learning_rate:g})",
    )


def _reference_drift(rows: Rows, config: GVPOConfig) -> Symptom | None:
    window = _window(rows, FIT_UPDATES, "log_ratio/mean")
    # The optimum's log-ratio is R / beta - log Z, and log Z is a mean of such terms: no completion's is farther from 0
    # than range(R) / beta. Centring hides this level from the loss, which may be small all the while.
    furthest = _reward_range(rows) / config.beta if config.beta > 0 else 0
    if window is None or furthest == 0 or abs(mean := fmean(window["log_ratio/mean"])) <= furthest:
        return None
    return Symptom(
        "reference_drift",
        f"log_ratio/mean was {mean:.3g} nats over the last {FIT_UPDATES} updates, beyond the {furthest:.3g} that the "
        f"rewards' range over beta allows: lower learning_rate (now {config.learning_rate:g})",
    )


def _updates(least: int, config: GVPOConfig) -> int:
    return max(least, -(-GROUPS // config.groups_per_update))


def _window(rows: Rows, updates: int, *names: str) -> dict[str, list[float]] | None:
    """The last values by name; None if the run is shorter, or one of these updates lacks one."""
    last = rows[-updates:]
    if len(last) < updates or not all(name in row for row in last for name in names):
        return None
    return {name: _values(last, name) for name in names}


def _values(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def _reward_range(rows: Rows) -> float:
    return max(_values(rows, "reward_max"), default=0.0) - min(_values(rows, "reward_min"), default=0.0)
