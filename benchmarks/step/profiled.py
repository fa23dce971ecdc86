"""Where the time of `main` goes: torch's profiler on one rollout and one update, in seconds by kind of operator.

    python benchmarks/step/profiled.py [--setting bf16]

Rows are the operators' own time, with the profiler's work on small ones in it and without the Python between them; the
last row is the step before, without the profiler.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable

import torch
from cases import MAIN, PLAIN
from forced import force_sampler, make_model, make_prompts
from torch.profiler import ProfilerActivity, profile

from gvpo import Completion, Group
from gvpo.models.scoring import Scorer
from gvpo.objective import OBJECTIVES
from gvpo.sampling.sampler import SamplingParams
from gvpo.sampling.torch_sampler import TorchSampler
from gvpo.training.devices import keep_freed_memory
from gvpo.training.update import group_gradients

KINDS = {
    "matrix products": r"::(mm|addmm|bmm|baddbmm|_linear_pointwise|mkldnn_linear)$",
    "attention, forward and backward": r"scaled_dot_product|flash_attention",
    "putting weights in order": r"reorder",
    "softmax, forward and backward": r"softmax|logsumexp|nll_loss",
    "copies, casts, gathers": r"::(copy_|cat|index|index_put_|_index_put_impl_|index_select|gather|scatter|clone)$",
    "filling with zeros": r"::(fill_|zero_)$",
    "optimizer": r"(?i)adam",
}
"""Operators by name, the first that fits."""
OTHER = "element by element, sums, calls"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=PLAIN, default="bf16")
    setting = parser.parse_args().setting
    draw, update = make_steps(setting)
    (drawing, drawn), (updating, updated) = by_kind(draw), by_kind(update)
    print(f"{setting}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| kind of operator | drawing, s | update, s |\n|---|---|---|")
    for kind in [*KINDS, OTHER]:
        print(f"| {kind} | {drawing[kind]:.2f} | {updating[kind]:.2f} |")
    print(f"| all | {drawing.total():.2f} | {updating.total():.2f} |")
    print(f"| without the profiler | {drawn:.2f} | {updated:.2f} |")


def make_steps(setting: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """One rollout, and one update with its optimizer step, on-policy."""
    keep_freed_memory()
    model, tokenizer = make_model(MAIN)
    _, prompts = make_prompts(MAIN, tokenizer)
    force_sampler(MAIN, prompts)
    sampler = TorchSampler(model, (), dtype=torch.bfloat16 if setting == "bf16" else torch.float32)
    numbers = torch.Generator().manual_seed(0)

    def completion(length: int) -> Completion:
        ids = torch.randint(len(tokenizer), (length,), generator=numbers).tolist()
        return Completion(token_ids=ids, reward=float(torch.rand((), generator=numbers)))

    pairs = zip(prompts, MAIN.lengths, strict=True)
    groups = [Group(None, [completion(n) for n in lengths], prompt_ids=list(ids)) for ids, lengths in pairs]
    scorer, optimizer = Scorer(model), torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def draw() -> None:
        sampler.sample(prompts, MAIN.k, SamplingParams(MAIN.max_tokens), seeds=range(MAIN.prompts))

    def update() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "bf16"):
            group_gradients(
                scorer,
                groups,
                beta=0.1,
                tokenizer=None,
                token_budget=MAIN.token_budget,
                share_prefix=True,
                objective=OBJECTIVES["gvpo"],
                settings={},
                denominator=None,
                own_reference=True,
                own_rollout=True,
            )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return draw, update


def by_kind(step: Callable[[], None]) -> tuple[Counter[str], float]:
    """Seconds of a step in each kind of operator, and those of one without the profiler, after three to warm up."""
    for _ in range(3):
        step()
    start = time.perf_counter()
    step()
    alone = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds: Counter[str] = Counter()
    for operator in profiler.key_averages():
        kind = next((kind for kind, name in KINDS.items() if re.search(name, operator.key)), OTHER)
        seconds[kind] += operator.self_cpu_time_total / 1e6
    return seconds, alone


if __name__ == "__main__":
    main()
