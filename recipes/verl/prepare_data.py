"""GSM8K and MATH as verl reads them: FOLDER/gsm8k/{train,test}.parquet and FOLDER/math/{train,test}.parquet.

    python recipes/verl/prepare_data.py --gsm8k --math data
    python recipes/verl/prepare_data.py --math data --train mine.jsonl --test held_out.jsonl

From the hub (openai/gsm8k, DigitalLearningGmbH/MATH-lighteval), or from JSONL with a problem (`problem` or `question`)
and its answer (`answer`, or `answers`, of which the first is taken) a row. Prompts are those of verl's own examples;
rewards are verl's rules for the two.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo.errors import UserError


class Task(NamedTuple):
    """hub: repository and configuration; source: what verl chooses the rule by; solution: the hub's column with the
    answer in it, after `mark`."""

    hub: tuple[str, str]
    source: str
    instruction: str
    solution: str


TASKS = {
    "gsm8k": Task(
        ("openai/gsm8k", "main"),
        "openai/gsm8k",
        'Let\'s think step by step and output the final answer after "####".',
        "answer",
    ),
    "math": Task(
        ("DigitalLearningGmbH/MATH-lighteval", "default"),
        "DigitalLearningGmbH/MATH-lighteval",
        "Let's think step by step and output the final answer within \\boxed{}.",
        "solution",
    ),
}


def final_answer(solution: str) -> str:
    """What stands after the last `####` (GSM8K), or in the last `\\boxed{}` or `\\boxed 2` (MATH).

    Raises ValueError where there is neither.
    """
    if "####" in solution:
        return solution.rsplit("####", 1)[1].strip().replace(",", "")
    boxed = solution.rpartition("\\boxed")[2] if "\\boxed" in solution else ""
    if boxed.startswith(" ") and (bare := boxed.split("$", 1)[0].strip()):
        return bare
    depth = 0
    for place, char in enumerate(boxed):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            if place:
                return boxed[1:place]
            break
    raise ValueError("has no answer: neither #### nor \\boxed{...}")


def verl_row(task: Task, problem: str, answer: str, index: int) -> dict[str, Any]:
    """A row in verl's form; its rule for GSM8K compares numbers without their commas."""
    answer = answer.replace(",", "") if task.source == "openai/gsm8k" else answer
    return {
        "data_source": task.source,
        "prompt": [{"role": "user", "content": f"{problem} {task.instruction}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": index},
    }


def from_hub(task: Task, split: str) -> Iterator[tuple[str, str]]:
    """Problems and answers of a data set on the hub.

    Raises UserError where it cannot be reached, and for a row without an answer.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(*task.hub, split=split)
    except Exception as error:
        raise UserError(f"{task.hub[0]}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    for number, row in enumerate(rows):
        try:
            yield row.get("problem") or row["question"], final_answer(row[task.solution])
        except ValueError as error:
            raise UserError(f"{task.hub[0]}, {split}, row {number} (from 0): {error}") from error


def from_file(path: str) -> Iterator[tuple[str, str]]:
    """Problems and answers of a JSONL file.

    Raises UserError naming file, line and field.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        problem = row.get("problem", row.get("question")) if isinstance(row, dict) else None
        if not isinstance(problem, str) or not problem.strip():
            raise UserError(f"{where}: has no problem; give it as the string `problem` or `question`")
        answers = row.get("answers", [row.get("answer")])
        answer = answers[0] if isinstance(answers, list) and answers else None
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise UserError(f"{where}: has no answer; give it as `answer`, or a list as `answers`")
        yield problem, final_answer(str(answer)) if "####" in str(answer) else str(answer)


def read(task: Task, pairs: Iterable[tuple[str, str]], where: str) -> list[dict[str, Any]]:
    """Rows in verl's form."""
    rows = [verl_row(task, problem, answer, index) for index, (problem, answer) in enumerate(pairs)]
    if not rows:
        raise UserError(f"{where}: has no rows")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in TASKS:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--train", metavar="FILE.jsonl")
    parser.add_argument("--test", metavar="FILE.jsonl")
    given = parser.parse_args()
    chosen = [name for name in TASKS if getattr(given, name)]
    if not chosen or (len(chosen) > 1 and (given.train or given.test)):
        parser.error("name --gsm8k, --math or both; with --train or --test, one of them")
    made: dict[Path, list[dict[str, Any]]] = {}
    try:
        for name in chosen:
            for split, file in (("train", given.train), ("test", given.test)):
                if file is not None or not (given.train or given.test):
                    pairs = from_hub(TASKS[name], split) if file is None else from_file(file)
                    made[given.folder / name / f"{split}.parquet"] = read(
                        TASKS[name], pairs, file or TASKS[name].hub[0]
                    )
        for path, rows in made.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
            print(f"{path}: {len(rows)} row{'s' * (len(rows) != 1)}")
    except UserError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare_data: {given.folder}: cannot be written ({error})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
