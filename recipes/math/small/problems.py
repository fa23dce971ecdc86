"""Problems for a model of 135M parameters: sums of two or three numbers, and word problems of two steps.

    python recipes/math/small/problems.py FOLDER [--seed 0] [--train 2000] [--held_out 200]

FOLDER gets train.jsonl (both kinds, mixed), and sums.jsonl and two-step.jsonl to measure with: rows `problem`,
`answers` and `solution`, a line that a demonstration can be. The sums are reasoning-gym's `chain_sum`; the word
problems are made here, in GSM8K's manner, from templates and numbers. No held-out problem is in train.jsonl; the
templates are the same ones.
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

Made = tuple[str, list[str]]
"""A problem, and the steps to its answer: "12 + 7 = 19", "19 - 4 = 15"."""


def steps(first: int, *rest: tuple[str, int]) -> list[str]:
    """One equation an operation, from left to right."""
    done, total = [], first
    for sign, number in rest:
        result = {"+": total + number, "-": total - number, "*": total * number}[sign]
        done.append(f"{total} {sign} {number} = {result}")
        total = result
    return done


def buys_and_gives(who: str, what: str, a: int, b: int, c: int) -> Made:
    given = min(c, a + b)
    problem = f"{who} has {a} {what}, buys {b} more and gives {given} away. How many {what} are left?"
    return problem, steps(a, ("+", b), ("-", given))


def boxes_and_more(who: str, what: str, a: int, b: int, c: int) -> Made:
    problem = f"{who} has {b} boxes with {c} {what} each, and {a} more {what}. How many {what} in all?"
    return problem, steps(b, ("*", c), ("+", a))


def loses_and_finds(who: str, what: str, a: int, b: int, c: int) -> Made:
    problem = f"{who} has {a + b} {what}, loses {b} and finds {c}. How many {what} does {who} have now?"
    return problem, steps(a + b, ("-", b), ("+", c))


def bags_and_taken(who: str, what: str, a: int, b: int, c: int) -> Made:
    taken = min(a, b * c)
    problem = f"{who} fills {b} bags with {c} {what} each and takes {taken} out again. How many are left?"
    return problem, steps(b, ("*", c), ("-", taken))


KINDS: tuple[Callable[[str, str, int, int, int], Made], ...] = (
    buys_and_gives,
    boxes_and_more,
    loses_and_finds,
    bags_and_taken,
)


def two_step(seed: int, count: int) -> Iterator[Made]:
    """Word problems, some of them more than once."""
    draw = random.Random(seed)
    for _ in range(count):
        kind, who, what = draw.choice(KINDS), draw.choice(NAMES), draw.choice(THINGS)
        yield kind(who, what, draw.randint(2, 20), draw.randint(2, 9), draw.randint(2, 9))


def sums(seed: int, count: int) -> Iterator[Made]:
    """Sums and differences of two or three numbers of one or two digits."""
    size = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    for entry in reasoning_gym.create_dataset("chain_sum", seed=seed, size=count, **size):
        first, *rest = entry["metadata"]["expression"].split()
        yield entry["question"], steps(int(first), *zip(rest[::2], map(int, rest[1::2]), strict=True))


def row(problem: str, done: list[str]) -> dict[str, str | list[str]]:
    """What a line of the files holds."""
    answer = done[-1].rpartition(" = ")[2]
    return {"problem": problem, "answers": [answer], "solution": f"{', '.join(done)}. \\boxed{{{answer}}}"}


def different(made: Iterator[Made], count: int, seen: set[str]) -> list[Made]:
    """The first `count` problems that are not among those seen, which they then are."""
    found = []
    for problem, done in made:
        if problem not in seen:
            seen.add(problem)
            found.append((problem, done))
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
    made = {"sums": sums(args.seed, more), "two-step": two_step(args.seed, more)}
    files = {name: different(problems, args.held_out, seen) for name, problems in made.items()}
    train = [one for problems in made.values() for one in different(problems, args.train // 2, seen)]
    random.Random(args.seed).shuffle(train)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, problems in {**files, "train": train}.items():
        rows = [json.dumps(row(*one)) for one in problems]
        (args.folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
