"""`gvpo demo`: the embedded model learns a small task while you watch, through the same trainer as `gvpo train`."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gvpo.errors import UserError

UPDATES = 30
HELD_OUT = 200
SHOWN = 5
FULL_MARKS = "exact_match"
RUN_NAME = "gvpo-demo"
"""How the demo knows a folder of its own: what carries another name is never removed."""


def demo(
    seed: Annotated[int, typer.Option(help="Seeds the task, the order and every draw.", show_default=True)] = 0,
    output_dir: Annotated[str, typer.Option(help="Run folder; the demo replaces its own.")] = "runs/demo",
    updates: Annotated[int, typer.Option(min=1, help="Updates of the policy.", show_default=True)] = UPDATES,
) -> None:
    """Teach the embedded model to pick the larger of two numbers, and to answer with the number alone."""
    from rich.console import Console

    from gvpo.report.terminal import plot
    from gvpo.training.loop import GVPOTrainer

    train, held_out = make_task(seed)
    config = demo_config(seed, output_dir, updates)
    _clear(Path(output_dir))
    console = Console()
    console.print(
        f"Loading SmolLM2-135M-Instruct. {len(train)} prompts to train on, {HELD_OUT} held out; such as:\n"
        f"  {train[0]['prompt'][-1]['content']}\n"
        f"Reward: 0.8 for exactly the number, 0.2 times the share of the answer that it makes up. beta {config.beta}.",
        highlight=False,
    )
    trainer = GVPOTrainer("smollm2-135m", train, [FULL_MARKS, brevity], config=config, eval_dataset=held_out)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start

    before, after = (_accuracy(trainer.history[place]) for place in (0, -1))
    folder = Path(output_dir)
    _show_answers(console, folder, trainer.total_updates)
    rewards = [row["reward"] for row in trainer.history if "reward" in row]
    console.print(plot(rewards, title="mean reward, update by update"), markup=False, highlight=False)
    console.print(
        f"Right on {HELD_OUT} held-out prompts, answered greedily: {before:.1%} before, {after:.1%} after "
        f"{trainer.total_updates} updates, {seconds:.0f} s.",
        highlight=False,
    )
    console.print(f"The run's files are in {folder}; the model is in {folder / 'model'}.", highlight=False)
    summary = {
        "before": before,
        "after": after,
        "seconds": round(seconds, 1),
        "seed": seed,
        "updates": trainer.total_updates,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def demo_config(seed: int, output_dir: str | None, updates: int = UPDATES) -> Any:
    """The demo's settings."""
    from gvpo.training.config import GVPOConfig

    return GVPOConfig(
        max_steps=updates,
        learning_rate=3e-5,
        num_generations=8,
        groups_per_update=8,
        updates_per_rollout=1,
        max_completion_length=10,
        reward_weights=[0.8, 0.2],
        eval_on_start=True,
        seed=seed,
        run_name=RUN_NAME,
        output_dir=output_dir,
    )


def brevity(*, completions: list[Any], answer: list[str], **columns: Any) -> list[float | None]:
    """How much of the completion is the right number: 1 for "63", 2/3 for "63.", 1/12 for "The larger number is 63"."""
    from gvpo.rewards.ready import completion_text, last_number

    right = last_number(completions=completions, answer=answer)
    texts = [completion_text(completion).strip() for completion in completions]
    return [mark and len(number) / len(text) for mark, number, text in zip(right, answer, texts, strict=True)]


def make_task(seed: int, train: int = 2000) -> tuple[list[dict], list[dict]]:
    """Rows `prompt`, `answer`: pairs of different numbers from 10 to 99, none in both sets, not even turned round."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a + 1, 100)]
    rng = random.Random(seed)
    rng.shuffle(pairs)
    rows = [_row(*(pair if rng.random() < 0.5 else pair[::-1])) for pair in pairs[: train + HELD_OUT]]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def _row(a: int, b: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": "You answer with one number. No words."}]
    messages.append({"role": "user", "content": f"Pick the larger number: {a}, {b}"})
    return {"prompt": messages, "answer": str(max(a, b))}


def _accuracy(row: dict[str, Any]) -> float:
    return row[f"eval/rewards/{FULL_MARKS}/mean"]


def _clear(folder: Path) -> None:
    """Remove an earlier demo, finished or not; anything else in the way is refused."""
    from gvpo.training.config import load_config

    config = folder / "config.yaml"
    if config.is_file() and load_config(config).get("run_name") == RUN_NAME:
        shutil.rmtree(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output-dir {str(folder)!r}: holds files that are not a demo's; choose another folder")


def _show_answers(console: Any, folder: Path, updates: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from gvpo.group_files import read_groups
    from gvpo.report.terminal import plain, shorten

    before, after = (list(read_groups(folder / "completions" / f"eval-{n:06d}.jsonl")) for n in (0, updates))
    table = Table("question", "before", "after", title="Held-out prompts")
    for old, new in list(zip(before, after, strict=True))[:SHOWN]:
        question = old.prompt[-1]["content"] if isinstance(old.prompt, list) else str(old.prompt)
        answers = [shorten(plain(group.completions[0].text or ""), 60) for group in (old, new)]
        table.add_row(Text(question), *map(Text, answers))
    console.print(table)
