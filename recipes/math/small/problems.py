"""Problems for a model of 135M parameters: sums of two or three numbers, and word problems of two steps.

    python recipes/math/small/problems.py FOLDER [--seed 0] [--train 2000] [--held_out 200]

FOLDER gets train.jsonl (both kinds, mixed), and sums.jsonl and two-step.jsonl to measure with: rows `problem` and
`answers`. The sums are reasoning-gym's `chain_sum`; the word problems are made here, in GSM8K's manner, from templates
and numbers. No held-out problem is in train.jsonl; the templates are the same ones.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import reasoning_gym

NAMES = ("Ana", "Ben", "Carla", "Dan", "Eva", "Finn", "Gita", "Hugo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")

Made = tuple[str, int]


def buys_and_gives(who: str, what: str, a: int, b: int, c: int) -> Made:
    given = min(c, a + b)
    return f"{who} has {a} {what}, buys {b} more and gives {given} away. How many {what} are left?", a + b - given


def boxes_and_more(who: str, what: str, a: int, b: int, c: int) -> Made:
    return f"{who} has {b} boxes with {c} {what} each, and {a} more {what}. How many {what} in all?", b * c + a


def loses_and_finds(who: str, what: str, a: int, b: int, c: int) -> Made:
    return f"{who} has {a + b} {what}, loses {b} and finds {c}. How many {what} does {who} have now?", a + c


def bags_and_taken(who: str, what: str, a: int, b: int, c: int) -> Made:
    taken = min(a, b * c)
    return f"{who} fills {b} bags with {c} {what} each and takes {taken} out again. How many are left?", b * c - taken


KINDS: tuple[Callable[[str, str, int, int, int], Made], ...] = (
    buys_and_gives,
    boxes_and_more,
    loses_and_finds,
    bags_and_taken,
)


def two_step(seed: int) -> Iterator[tuple[str, str]]:
    """Endless word problems with answers."""
    draw = random.Random(seed)
    while True:
        kind, who, what = draw.choice(KINDS), draw.choice(NAMES), draw.choice(THINGS)
        problem, answer = kind(who, what, draw.randint(2, 20), draw.randint(2, 9), draw.randint(2, 9))
        yield problem, str(answer)


def sums(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Sums and differences of two or three numbers of one or two digits."""
    size = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    for entry in reasoning_gym.create_dataset("chain_sum", seed=seed, size=count, **size):
        yield entry["question"], entry["answer"]


def different(made: Iterator[tuple[str, str]], count: int, seen: set[str]) -> list[tuple[str, str]]:
    """The first `count` problems that are not among those seen, which they then are."""
    found = []
    for problem, answer in made:
        if problem not in seen:
            seen.add(problem)
            found.append((problem, answer))
            if len(found) == count:
                return found
    raise SystemExit(f"only {len(found)} different problems of {count}: lower --train or --held_out")


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--held_out", type=int, default=200)
    args = parser.parse_args()
    seen: set[str] = set()
    more = 4 * (args.train + args.held_out)
    made = {"sums": sums(args.seed, more), "two-step": two_step(args.seed)}
    files = {name: different(problems, args.held_out, seen) for name, problems in made.items()}
    train = [one for problems in made.values() for one in different(problems, args.train // 2, seen)]
    random.Random(args.seed).shuffle(train)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, problems in {**files, "train": train}.items():
        rows = [json.dumps({"problem": problem, "answers": [answer]}) for problem, answer in problems]
        (args.folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
