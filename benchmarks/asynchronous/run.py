"""Two samplers and a trainer side by side, killed and restarted at random: no group is lost, none is used twice.

    python benchmarks/asynchronous/run.py [--kills 30] [--model smollm2-135m] [--folder runs/asynchronous]

The samplers follow the weights that the trainer publishes and drop files of groups into a folder; the trainer follows
the folder. Every few seconds one of the three is killed (SIGKILL) and started again, the trainer from its last
checkpoint. When the trainer is done, every group that it took must have been trained on exactly once. Exit code 1
otherwise. Seeded, but for what the machine adds. Without --model: a random model of a few thousand parameters, to spend
the time on kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GROUPS_PER_UPDATE, SAVE_STEPS = 4, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--updates", type=int, default=300, help="of the trainer; kills stop when they are made")
    parser.add_argument("--model", help="what samplers and trainer start from; default: a tiny random model")
    parser.add_argument("--folder", type=Path, default=Path("runs/asynchronous"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    prepare(options.folder, options.model, options.updates)
    jobs = {"trainer": trainer_command, **{f"sampler {n}": sampler_command(n) for n in (1, 2)}}
    kills = disturb(options.folder, jobs, random.Random(options.seed), options.kills)
    return report(options.folder, kills)


def prepare(folder: Path, model: str | None, updates: int) -> None:
    """Model, prompts, reward and config, in the folder that all commands run in."""
    (folder / "groups").mkdir(parents=True)
    if model is None:
        make_tiny_model(folder / "tiny")
    words = [f"{first}{second}" for first in "abcdefgh" for second in "abcdefgh"]
    rows = [{"prompt": f"Say {word}." if model else word} for word in words]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(
        "def brevity(*, completion_ids, **columns):\n    return [1 / len(ids) for ids in completion_ids]\n"
    )
    config: dict[str, Any] = {
        "model": model or "tiny",
        "reward_funcs": "rewards:brevity",
        "sources": [{"type": "files", "path": "groups", "follow": True, "max_staleness": 100}],
        "groups_per_update": GROUPS_PER_UPDATE,
        "updates_per_rollout": 2,
        "max_steps": updates,
        "max_completion_length": 8,
        "publish_steps": 2,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "output_dir": "run",
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def make_tiny_model(folder: Path) -> None:
    """A random model whose tokens are letters."""
    vocabulary = {letter: place for place, letter in enumerate("abcdefghijklmno~")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="o"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=16, eos_token_id=15, bos_token_id=None, pad_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def trainer_command(folder: Path) -> list[str]:
    """Goes on from the last checkpoint; a run that has none begins anew."""
    if any((folder / "run" / "checkpoints").glob("step-*")):
        return ["train", "--config", "config.yaml", "--resume_from_checkpoint", "latest"]
    shutil.rmtree(folder / "run", ignore_errors=True)
    return ["train", "--config", "config.yaml"]


def sampler_command(seed: int) -> Any:
    """Follows the trainer's policy for ever; the same command, whenever it is started."""
    fixed = ["--prompts", "prompts.jsonl", "--epochs", "0", "--shuffle", "--batch", "8", "-k", "4"]
    model = ["--model", "run/policy", "--follow", "--max-completion-length", "8"]
    return lambda folder: ["sample", *model, *fixed, "--seed", str(seed), "--out", "groups/"]


def start(folder: Path, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = [sys.executable, "-m", "gvpo", *command]
        return subprocess.Popen(run, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)


def disturb(folder: Path, jobs: dict[str, Any], draw: random.Random, kills: int) -> Counter[str]:
    """Run the jobs until the trainer is done; kill and restart one of them now and then. Returns the kills by job."""
    running = {name: start(folder, name, command(folder)) for name, command in jobs.items()}
    made: Counter[str] = Counter()
    try:
        while (code := running["trainer"].poll()) is None:
            if made.total() < kills:
                time.sleep(draw.uniform(2, 25))
                victim = draw.choice(list(jobs))
                if running["trainer"].poll() is not None:
                    continue
                os.killpg(running[victim].pid, signal.SIGKILL)
                running[victim].wait()
                made[victim] += 1
                running[victim] = start(folder, victim, jobs[victim](folder))
            else:
                time.sleep(1)
            for name, process in running.items():
                if name != "trainer" and process.poll() is not None:
                    raise SystemExit(f"{name} ended by itself: see {folder / name}.log")
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if code != 0:
        raise SystemExit(f"the trainer ended with {code}: see {folder / 'trainer.log'}")
    return made


def report(folder: Path, kills: Counter[str]) -> int:
    """Compare what was drawn with what was trained on. Returns the exit code."""
    drawn = {file.name: ids_of(file) for file in sorted((folder / "groups").glob("*.jsonl"))}
    used = Counter(name for file in (folder / "run" / "completions").glob("rollout-*.jsonl") for name in ids_of(file))
    (last,) = sorted((folder / "run" / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))[-1:]
    state = json.loads((last / "sources" / "files" / "files.json").read_text())
    taken = [name for file, (_, count) in state["files"].items() for name in drawn[file][:count]]
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    twice = sum(count > 1 for count in used.values())
    lost = len(set(taken) - used.keys()) - state["stale"]
    alike = sum(len(ids) for ids in drawn.values()) - len({name for ids in drawn.values() for name in ids})
    facts = {
        "kills": ", ".join(f"{name} {count}" for name, count in sorted(kills.items())),
        "groups drawn, in files": f"{sum(map(len, drawn.values()))} in {len(drawn)}",
        "ids that were drawn twice": alike,
        "updates": len(rows),
        "groups trained on": sum(used.values()),
        "groups trained on twice": twice,
        "groups taken and lost": lost,
        "groups left out as stale": state["stale"],
        "staleness in updates, mean and largest": "{:.1f}, {:.0f}".format(
            fmean(row["staleness/mean"] for row in rows), max(row["staleness/max"] for row in rows)
        ),
    }
    for name, value in facts.items():
        print(f"| {name} | {value} |")
    return int(bool(twice or lost or alike))


def ids_of(file: Path) -> list[str]:
    """The ids of a file's groups."""
    return [json.loads(line)["id"] for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
