"""The tables and figures of a set of results: medians over steps, their range over repeats, ratios to TRL's best."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from cases import GROWTH, LONG, MAIN, OURS, TRL, Case
from measure import Shape, operations

from gvpo.lab.style import BLUE, GREY, ORANGE, PALE, panels, save, styled

Row = dict[str, Any]
AXES = {
    "k": "completions per prompt",
    "prompt": "prompt tokens",
    "completion": "most completion tokens",
    "groups": "prompts (groups)",
    "vocabulary": "vocabulary",
    "budget": "token_budget",
}


def write_report(rows: list[Row], figures: Path) -> None:
    """Print every table that there are results for, and draw the growth."""
    if not rows:
        print("no results yet")
        return
    print(machine(rows))
    for case in (MAIN, LONG):
        show(f"`{case.name}`: TRL's settings, tried", tries_table(rows, case))
        show(f"`{case.name}`: {describe(case)}", compared_table(rows, case))
    show("The sampler alone, on the work of `main`", sampler_table(rows))
    for series, cases in GROWTH.items():
        show(f"Growth: {series}", growth_table(rows, cases))
    if any(of(rows, case.name, "gvpo") for series in AXES for case in GROWTH[series]):
        figures.mkdir(parents=True, exist_ok=True)
        draw_growth(rows, figures)


def show(title: str, lines: list[str]) -> None:
    """A table below its heading; nothing where it has no rows."""
    if len(lines) > 2:
        print(f"\n### {title}\n\n" + "\n".join(lines))


def machine(rows: list[Row]) -> str:
    """What was measured on: processor, threads, versions, matrix-product peaks of SmolLM2-135M's shapes."""
    names = {f"{r['processor']}, torch {r['torch']}, transformers {r['transformers']}, TRL {r['trl']}" for r in rows}
    threads = max(row["threads"] for row in rows)
    peaks = [
        f"{setting} {spread([row['operations_per_second'] / 1e9 for row in found], '.0f')} GFLOP/s"
        for setting in ("float32", "bf16")
        if (found := of(rows, MAIN.name, "peak", setting))
    ]
    return f"{'; '.join(sorted(names))}; {threads} threads. Matrix products: {', '.join(peaks) or 'not measured yet'}."


def describe(case: Case) -> str:
    """The case in words."""
    lengths = list(chain(*case.lengths))
    return (
        f"{case.prompts} prompts of {case.prompt_tokens} tokens, {case.k} completions each, {min(lengths)} to "
        f"{max(lengths)} tokens ({sum(lengths) / len(lengths):.1f} on average)"
    )


def of(rows: list[Row], case: str, system: str, setting: str | None = None, stage: str = "measured") -> list[Row]:
    """The rows of all repeats."""
    key = {"case": case, "system": system, "stage": stage} | ({} if setting is None else {"setting": setting})
    return [row for row in rows if key.items() <= row.items()]


def seconds(rows: list[Row], part: str = "whole") -> list[float]:
    """Each repeat's median over its steps."""
    return [median(step[part] for step in row["steps"]) for row in rows]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and the range where there are several."""
    middle = f"{median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def table(columns: list[str], lines: list[list[str]]) -> list[str]:
    """Markdown."""
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return head + [f"| {' | '.join(line)} |" for line in lines]


def tries_table(rows: list[Row], case: Case) -> list[str]:
    """Every setting of TRL that was tried, fastest first within its precision."""
    found = sorted(of(rows, case.name, "trl", stage="try"), key=lambda r: (TRL[r["setting"]].precision, seconds([r])))
    lines = [
        [r["setting"], *(f"{seconds([r], part)[0]:.1f}" for part in ("sampling", "update", "whole")), gigabytes([r])]
        for r in found
    ]
    return table(["setting, micro-batch", "sampling, s", "update, s", "step, s", "peak memory, GB"], lines)


def compared_table(rows: list[Row], case: Case) -> list[str]:
    """A line for every system and setting."""
    theirs = {one: seconds(found) for one in TRL if (found := of(rows, case.name, "trl", one))}
    lines = []
    settings = [("gvpo", one) for one in OURS] + [("trl", one) for one in theirs]
    for system, setting in [*settings, ("plain", "float32"), ("plain", "bf16")]:
        found = of(rows, case.name, system, setting)
        if not found:
            continue
        whole, precision = seconds(found), precision_of(system, setting)
        best = min((median(one) for name, one in theirs.items() if TRL[name].precision == precision), default=None)
        counted = setting if system == "gvpo" else precision
        limits = [limit_seconds(rows, case, counted, row["repeat"]) for row in found]
        times = [step / limit for step, limit in zip(whole, limits, strict=True) if limit]
        lines.append(
            [
                {"gvpo": "this trainer", "trl": "TRL", "plain": "plain loop"}[system],
                setting,
                *(f"{median(seconds(found, part)):.2f}" for part in ("sampling", "scoring", "update")),
                spread(whole),
                f"{case.completion_tokens / median(whole):.1f}",
                gigabytes(found),
                f"{best / median(whole):.2f}" if best else "",
                spread(times) if times else "",
                f"{1 / median(times):.0%}" if times else "",
            ]
        )
    columns = ["system", "setting", "sampling, s", "scoring, s", "update, s", "step, s", "completion tokens/s"]
    columns += ["peak memory, GB", "times TRL's best", "step / limit", "share of the limit"]
    return table(columns, lines)


def precision_of(system: str, setting: str) -> str:
    """What TRL's best is compared in. Rollouts alone in bf16 count as float32: weights and gradients are."""
    if system == "trl":
        return TRL[setting].precision
    return "bf16" if setting.split(",")[0] == "bf16" else "float32"


def limit_seconds(rows: list[Row], case: Case, setting: str, repeat: int = 0) -> float | None:
    """Seconds of a step's operations at the peaks of this repeat; None where these were not measured."""
    updates = precision_of("gvpo", setting)
    rollouts = "bf16" if "bf16" in setting else "float32"
    where = case.name if of(rows, case.name, "peak") else MAIN.name
    peaks = {row["setting"]: row for row in of(rows, where, "peak") if row["repeat"] == repeat}
    if not {rollouts, updates} <= peaks.keys():
        return None
    work = operations(Shape(**peaks[updates]["shape"]), case)
    at = {precision: row["operations_per_second"] for precision, row in peaks.items()}
    return work["generation"] / at[rollouts] + work["training"] / at[updates]


def sampler_table(rows: list[Row]) -> list[str]:
    """Tokens a second of both samplers."""
    lines = []
    for setting in ("float32", "bf16"):
        pair = [of(rows, MAIN.name, system, setting) for system in ("sampler", "generate")]
        if all(pair):
            ours, theirs = ([MAIN.completion_tokens / one for one in seconds(found)] for found in pair)
            lines.append([setting, spread(ours, ".0f"), spread(theirs, ".0f"), f"{median(ours) / median(theirs):.2f}"])
    return table(["weights", "this sampler, tokens/s", "`model.generate`, tokens/s", "times"], lines)


def growth_table(rows: list[Row], cases: list[Case]) -> list[str]:
    """A line for every point of a series."""
    lines = []
    for case in cases:
        for system in ("gvpo", "trl"):
            found = of(rows, case.name, system)
            if not found:
                continue
            limit = limit_seconds(rows, case, "bf16")
            lines.append(
                [
                    case.name,
                    {"gvpo": "this trainer", "trl": "TRL"}[system] + f", {found[0]['setting']}",
                    str(case.completion_tokens),
                    *(f"{median(seconds(found, part)):.2f}" for part in ("sampling", "update", "whole")),
                    f"{limit / median(seconds(found)):.0%}" if limit and case.processes == 1 else "",
                    gigabytes(found),
                ]
            )
    columns = ["", "system", "completion tokens", "sampling, s", "update, s", "step, s", "share of the limit"]
    return table([*columns, "peak memory, GB"], lines)


def gigabytes(rows: list[Row]) -> str:
    """Peak memory; of several processes, of each."""
    peaks = [median(row["peak_bytes"][process] for row in rows) / 1e9 for process in range(len(rows[0]["peak_bytes"]))]
    return " + ".join(f"{value:.1f}" for value in peaks)


def draw_growth(rows: list[Row], folder: Path) -> None:
    """Seconds of this trainer's steps, and its memory, against what each series varies."""
    with styled():
        figure, axes = panels("Seconds of a step as its work grows", 6, shape=(2, 3))
        for axis, (series, label) in zip(axes, AXES.items(), strict=True):
            points = [(case, found) for case in GROWTH[series] if (found := of(rows, case.name, "gvpo"))]
            x = [case.value for case, _ in points]
            for part, colour in (("whole", BLUE), ("update", ORANGE), ("sampling", GREY)):
                y = [median(seconds(found, part)) for _, found in points]
                axis.plot(x, y, marker="o", markersize=5, color=colour, label="step" if part == "whole" else part)
            limits = [(case.value, limit) for case, _ in points if (limit := limit_seconds(rows, case, "bf16"))]
            axis.plot(*zip(*limits, strict=True), color=PALE, label="operations at the peak") if limits else None
            theirs = [(case.value, found) for case, _ in points if (found := of(rows, case.name, "trl"))]
            if theirs:
                axis.plot(
                    [n for n, _ in theirs], [median(seconds(f)) for _, f in theirs], "k:", marker="s", label="TRL"
                )
            logarithmic(axis, x)
            axis.set(xlabel=label)
        axes[0].set_ylabel("seconds a step")
        axes[3].set_ylabel("seconds a step")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=12)
        save(figure, folder, "step-growth")
        figure, axes = panels("Peak memory of a step as its work grows", 3, sharey=True)
        for axis, series in zip(axes, ("groups", "k", "budget"), strict=True):
            points = [(case, found) for case in GROWTH[series] if (found := of(rows, case.name, "gvpo"))]
            x = [case.value for case, _ in points]
            axis.plot(x, [found[0]["peak_bytes"][0] / 1e9 for _, found in points], marker="o", color=BLUE)
            axis.set(xlabel=AXES[series], ylim=(0, None))
            if not x:
                continue
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [str(number) for number in x])
        axes[0].set_ylabel("peak memory, GB")
        save(figure, folder, "step-memory")


def logarithmic(axis: Any, x: list[int]) -> None:
    """Both axes by powers of two, marked where there are points."""
    if not x:
        return
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(x, [f"{number // 1024}k" if number % 1024 == 0 else str(number) for number in x])
    axis.tick_params(labelsize=11)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
