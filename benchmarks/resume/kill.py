"""The proof that a killed run goes on as if nothing had been: kill -9 at random moments, resume, compare every bit.

    python benchmarks/resume/kill.py [--kills 50] [--processes 1] [--seed 0] [--work FOLDER]

A tiny model is trained by `gvpo train`, once without interruption. Then the same command is given again and again:
each time a phase of the run is chosen at random, and a moment within it; there every process is killed, and the next
command goes on from the newest checkpoint, or from the start where there is none yet. A run that comes to its end must
equal the uninterrupted one: model/, the last checkpoint's weights, moments and reference, metrics.jsonl, completions/.
Prints one row a phase; the exit code is 1 if anything differed, or could not be resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from gvpo.training.run_folder import checkpoints, leftovers

HERE = Path(__file__).parent

SOURCES: list[dict[str, Any]] | None = [
    {"type": "policy"},
    {"type": "replay", "members": 1, "groups": 1, "capacity": 24, "priority": "recency"},
]
"""The run's `sources`; None is the policy alone."""

CONFIG = {
    "reward_funcs": "rewards:noisy",
    "max_steps": 40,
    "groups_per_update": 3,
    "num_generations": 4,
    "max_completion_length": 8,
    "updates_per_rollout": 2,
    "epochs_per_rollout": 2,
    "reference": 2,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_steps": 5,
    "eval_on_start": True,
    "disable_tqdm": True,
    "output_dir": "run",
    "sources": SOURCES,
}

AIMED_AT = ("sampling", "reward", "reference", "spill", "update", "evaluation", "checkpoint", "resume", "end")
"""Phases that a kill is aimed at, in turn; it may hit the one after."""

PER_START = 3
"""A command is killed within the first third of what a whole run would be, so that a run is killed several times."""

LETTERS = "abcdefghijklmnopqrstuvwxyz "


@dataclass
class Story:
    """What a command told until it ended. entered, lasted: by phase, turns and seconds; inside: the phase it was in."""

    code: int = 0
    output: str = ""
    inside: str | None = None
    updated: int = 0
    entered: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    lasted: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    killed: bool = False


@dataclass
class Aim:
    """Kill `delay` seconds into that turn (from 1) of the phase."""

    phase: str
    turn: int
    delay: float


@dataclass
class Tally:
    """Kills in one phase, and what became of them."""

    kills: int = 0
    resumed: int = 0
    from_scratch: int = 0
    lost: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1, help="as torchrun starts them")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the run is always the same one")
    parser.add_argument("--work", type=Path, default=None, help="folder to work in; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        prepare(work)
        start = time.perf_counter()
        whole = command(work / "whole", options.processes)
        if whole.code != 0:
            print(whole.output[-4000:])
            return 1
        tallies, runs, problems = kill_and_resume(work, whole, options)
        print(table(tallies))
        print(
            f"\n{sum(one.kills for one in tallies.values())} kills in {runs} complete runs of {whole.updated} updates, "
            f"{options.processes} process(es), seed {options.seed}, {time.perf_counter() - start:.0f} s: "
            + ("every run equals the uninterrupted one, bit for bit" if not problems else "; ".join(problems))
        )
        return 1 if problems else 0


def kill_and_resume(work: Path, whole: Story, options: argparse.Namespace) -> tuple[dict[str, Tally], int, list[str]]:
    """Until all kills are made, and the run that the last was made in is at its end: (by phase, runs, problems)."""
    rng = random.Random(options.seed)
    tallies: dict[str, Tally] = defaultdict(Tally)
    folder, runs, problems, kills = work / "parts" / "run", 0, [], 0
    aims = aim_at_each(rng, whole)
    last: Tally | None = None
    while True:
        found = checkpoints(folder)
        if not found:
            shutil.rmtree(folder.parent, ignore_errors=True)
        resume = ["--resume-from-checkpoint", "latest"] if found else []
        story = command(folder.parent, options.processes, *resume, aim=next(aims) if kills < options.kills else None)
        if not story.killed and story.code != 0:
            return tallies, runs, [*problems, f"a command failed ({story.code}): {story.output[-2000:]}"]
        if last is not None:
            last.resumed += bool(found)
            last.from_scratch += not found
            last = None
        if story.killed:
            kills += 1
            last = tallies[story.inside or "between"]
            last.kills += 1
            newest = int(checkpoints(folder)[-1].name.rpartition("-")[2]) if checkpoints(folder) else 0
            # A command that was killed before its first update lost nothing that an earlier one had not.
            last.lost = max(last.lost, story.updated - newest)
            print(f"kill {kills}: in {story.inside or 'between phases'}, after update {story.updated}", flush=True)
            continue
        runs += 1
        problems += [f"run {runs}: {one} differs" for one in differences(work / "whole" / "run", folder)]
        problems += [f"run {runs}: {one.name} is left" for one in leftovers(folder)]
        shutil.rmtree(folder.parent)
        if kills >= options.kills:
            return tallies, runs, problems


def aim_at_each(rng: random.Random, whole: Story) -> Iterator[Aim]:
    """Where to kill: every phase in turn, shuffled, at a random moment of a random turn near the command's start."""
    while True:
        phases = list(AIMED_AT)
        rng.shuffle(phases)
        for phase in phases:
            turns = math.ceil(whole.entered[phase] / PER_START)
            delay = rng.uniform(0, median(whole.lasted[phase]))
            yield Aim(phase, rng.randint(1, turns), delay)


def command(folder: Path, processes: int, *arguments: str, aim: Aim | None = None) -> Story:
    """`gvpo train` in this folder, killed where `aim` says."""
    folder.mkdir(parents=True, exist_ok=True)
    fifo = folder / "phases"
    fifo.unlink(missing_ok=True)
    os.mkfifo(fifo)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "WATCH": str(fifo), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*launcher, str(HERE / "watched.py"), "train", "--config", "../config.yaml", *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        story = listen(fifo, process, aim)
    story.output = (folder / "output.txt").read_text(errors="replace")
    return story


def listen(fifo: Path, process: subprocess.Popen[bytes], aim: Aim | None) -> Story:
    """Take in what a command tells, and kill it at its moment."""
    story, pids, entered = Story(), [process.pid], {}
    # Opened for writing too: else there is nothing to wait on before the first process has opened it.
    reading = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    rest = b""
    while True:
        with suppress(BlockingIOError):
            rest += os.read(reading, 65536)
            *lines, rest = rest.split(b"\n")
            for line in lines:
                word, *values = line.decode().split()
                take_in(story, word, values, entered, pids)
                if aim and word == "enter" and values[0] == aim.phase and story.entered[aim.phase] == aim.turn:
                    time.sleep(aim.delay)
                    kill(pids)
                    story.killed, aim = True, None
            continue
        if process.poll() is not None and all(gone(pid) for pid in pids[1:]):
            break
        time.sleep(0.0002)
    os.close(reading)
    story.code = process.returncode
    return story


def take_in(story: Story, word: str, values: list[str], entered: dict[str, float], pids: list[int]) -> None:
    match word:
        case "pid":
            pids.append(int(values[0]))
        case "updated":
            story.updated = int(values[0])
        case "enter":
            story.inside = values[0]
            story.entered[values[0]] += 1
            entered[values[0]] = float(values[1])
        case "leave":
            story.inside = None
            story.lasted[values[0]].append(float(values[1]) - entered[values[0]])


def kill(pids: list[int]) -> None:
    """Kill these at once, the launcher last: it would end the others in its own way."""
    for pid in reversed(pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def differences(one: Path, other: Path) -> list[str]:
    """The files that two complete runs do not have alike, byte for byte."""
    last = checkpoints(one)[-1].relative_to(one)
    names = {"metrics.jsonl", *(str(last / f"{name}.safetensors") for name in ("parameters", "optimizer", "reference"))}
    for folder in (one, other):
        for place in ("model", "completions"):
            names |= {str(file.relative_to(folder)) for file in (folder / place).rglob("*") if file.is_file()}
    return [name for name in sorted(names) if content(one / name) != content(other / name)]


def content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def prepare(work: Path) -> None:
    """A tiny model with a tokenizer, prompts, and the config, in a folder without any earlier run."""
    for name in ("whole", "parts"):
        shutil.rmtree(work / name, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    save_model(work / "model")
    rows = [{"prompt": f"{a}{b}", "answer": b} for a in LETTERS[:4] for b in LETTERS[4:7]]
    for name, some in (("train", rows), ("held_out", rows[::4])):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    places = {"model": "model", "train_dataset": "train.jsonl", "eval_dataset": "held_out.jsonl"}
    config = {**CONFIG, **{name: str(work / place) for name, place in places.items()}}
    (work / "config.yaml").write_text(yaml.safe_dump(config))


def save_model(folder: Path) -> None:
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    end = len(LETTERS)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=end,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(LETTERS)} | {"~": end}, "~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~", unk_token="~").save_pretrained(folder)


def table(tallies: dict[str, Tally]) -> str:
    """Markdown: one row a phase."""
    rows = ["| phase | kills | resumed | from the start | updates lost, at most |", "|---|---|---|---|---|"]
    for phase in sorted(tallies, key=lambda name: (*AIMED_AT, name).index(name)):
        one = tallies[phase]
        rows.append(f"| {phase} | {one.kills} | {one.resumed} | {one.from_scratch} | {one.lost} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
