"""Seconds from SIGTERM to the exit of `gvpo train` on the embedded model, at random moments.

    python benchmarks/resume/sigterm.py [--tries 5] [--seed 0] [--threads 2]

Prints one row a try: when the signal came, seconds until the process was gone, its exit code, the checkpoint's size,
and the longest update until then, which bounds the seconds together with the write of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {"reward_funcs": "last_number", "max_steps": 100, "max_completion_length": 12, "disable_tqdm": "true"}

LATEST = 60.0
"""Seconds after the first update, at most, that the signal is sent at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    rng = random.Random(options.seed)
    print("| signal, s after update 1 | s to exit | exit code | longest update, s | checkpoint, MB |")
    print("|---|---|---|---|---|")
    for _ in range(options.tries):
        with tempfile.TemporaryDirectory() as folder:
            print(measure(Path(folder), rng.uniform(0, LATEST), options.threads), flush=True)


def measure(folder: Path, delay: float, threads: int) -> str:
    """One run that is told to stop, as a row."""
    rows = [
        {"prompt": [{"role": "user", "content": f"Pick the larger number: {a}, {b}"}], "answer": str(max(a, b))}
        for a in range(10, 30)
        for b in range(50, 60)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [part for name, value in CONFIG.items() for part in (f"--{name}", str(value))]
    flags += ["--train_dataset", str(folder / "train.jsonl"), "--output_dir", str(folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    output = (folder / "output.txt").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "gvpo", "train", *flags], env=environment, stdout=output, stderr=subprocess.STDOUT
    )
    timings = folder / "run" / "timings.jsonl"
    while not timings.exists():
        if process.poll() is not None:
            sys.exit((folder / "output.txt").read_text()[-2000:])
        time.sleep(0.1)
    time.sleep(delay)
    start = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    seconds = time.perf_counter() - start
    longest = max(json.loads(line)["seconds/update"] for line in timings.read_text().splitlines())
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / 1e6
    return f"| {delay:.0f} | {seconds:.1f} | {code} | {longest:.1f} | {size:.0f} |"


if __name__ == "__main__":
    main()
