"""`gvpo export-verl`: what it writes is known to verl, and runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from verl_run import steps_of

from gvpo.cli.main import main


def test_an_exported_run_is_known_to_verl_and_runs(environment, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": [{"role": "user", "content": f"{n}+{n}="}], "answer": str(n)} for n in range(5)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("judges.py").write_text(
        "def digits(completions, answer, **columns):\n"
        "    texts = [messages[-1]['content'] for messages in completions]\n"
        "    return [None if a == '3' else sum(map(str.isdigit, t)) / 6 for t, a in zip(texts, answer)]\n"
    )
    Path("config.yaml").write_text(
        f"model: {folder}\ntrain_dataset: rows.jsonl\nreward_funcs: judges:digits\nmax_completion_length: 8\n"
        "num_generations: 4\ngroups_per_update: 4\nupdates_per_rollout: 2\nmax_steps: 4\nlearning_rate: 1e-2\n"
        "reference: initial\nshuffle_dataset: false\n"
    )
    assert main(["export-verl", "config.yaml", "--gpus", "2"]) is None
    run = tmp_path / "verl-run" / "run.sh"
    named = environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    checked = subprocess.run([run, "--dry-run"], env=named, capture_output=True, text=True, timeout=200)
    assert checked.returncode == 0, checked.stderr[-2000:]

    steps = steps_of([run, "+ray_kwargs.ray_init.num_gpus=2", "trainer.resume_mode=disable"], named, tmp_path)

    assert [step["training/global_step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["gvpo/members_per_group"] == 4
        assert step["gvpo/split_groups"] == 0
        # Of eight prompts of five, one or two are the one that the reward has no opinion of: they leave.
        assert 3 <= step["gvpo/groups"] < 4
    assert steps[1]["gvpo/log_ratio/max"] > 0
    assert (tmp_path / "verl-run" / "checkpoints" / "global_step_2" / "actor").is_dir()
