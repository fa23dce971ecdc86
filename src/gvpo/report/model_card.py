"""The README.md that goes with a trained model: a Hugging Face model card."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

SETTINGS = (
    "objective",
    "beta",
    "epsilon",
    "reference",
    "num_generations",
    "groups_per_update",
    "updates_per_rollout",
    "epochs_per_rollout",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "temperature",
    "top_p",
    "top_k",
    "max_completion_length",
    "bf16",
    "seed",
)
"""What somebody who wants to repeat the run, or to judge it, looks for first."""

EMBEDDED_HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""The hub's name for what load_model finds in an installed package."""


def model_card(
    *, base_model: str, dataset: str | None, settings: Mapping[str, Any], history: Sequence[dict[str, Any]]
) -> str:
    """A model card: YAML front matter, how the model was trained, its rewards, how to use it, what to cite.

    base_model: what load_model was given, "" if not known. dataset: path or hub id, None if not known. settings: the
    run's, by name. history: one row per update, as in metrics.jsonl. The front matter names base model and dataset only
    by what can be a hub id.
    """
    return "\n\n".join(
        [
            f"---\n{_front_matter(base_model, dataset)}---",
            f"# Model trained with {_method(settings)}",
            _summary(base_model, history, dataset, settings),
            "## Training",
            _table(["setting", "value"], [(f"`{name}`", _setting(settings[name])) for name in SETTINGS]),
            *_results(history),
            "## Use",
            _USE,
            *_cited(settings),
        ]
    )


def _method(settings: Mapping[str, Any]) -> str:
    is_gvpo = settings["objective"] == "gvpo"
    return "Group Variance Policy Optimization" if is_gvpo else f"the objective {_code(settings['objective'])}"


def _cited(settings: Mapping[str, Any]) -> list[str]:
    if settings["objective"] != "gvpo":
        return []
    return ["## Citation", f"The method: [arXiv 2504.19599](https://arxiv.org/abs/2504.19599).\n\n{_CITATION}\n"]


def hub_id(name: str | None) -> str | None:
    """The hub id ("owner/name") that a model or dataset name can be; None for paths, files, and what is on disk."""
    name = EMBEDDED_HUB_IDS.get(name or "", name or "")
    plausible = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) and len(name) <= 96
    is_file = name.endswith((".gguf", ".jsonl", ".parquet")) or Path(name).exists()
    return name if plausible and not is_file and ".." not in name and "--" not in name else None


def _front_matter(base_model: str, dataset: str | None) -> str:
    data_id = hub_id((dataset or "").partition(":")[0])
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gvpo", "reinforcement-learning", "text-generation"],
    }
    if base := hub_id(base_model):
        fields["base_model"] = base
    if data_id:
        fields["datasets"] = [data_id]
    return yaml.safe_dump(fields, sort_keys=False)


def _summary(
    base_model: str, history: Sequence[dict[str, Any]], dataset: str | None, settings: Mapping[str, Any]
) -> str:
    model = _code(base_model) if base_model else "A causal language model"
    data = f" on {_code(dataset)}" if dataset else ""
    updates = f" in {max(row.get('update', 0) for row in history)} updates" if history else ""
    trained = f"{model}, trained with gvpo {importlib.metadata.version('gvpo')}{data}{updates}"
    if settings["objective"] != "gvpo":
        return f"{trained}, with another objective than GVPO: {_code(settings['objective'])}."
    return (
        f"{trained}. The policy's implicit rewards `beta * log(pi / pi_ref)`, centred over each group of completions, "
        "are fitted to the real rewards, centred likewise; the optimum is `pi_ref * exp(reward / beta)`, normalised."
    )


def _results(history: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for name, meaning in (("reward", "training completions"), ("eval/reward", "held-out prompts")):
        values = [(row.get("update"), row[name]) for row in history if row.get(name) is not None]
        if values:
            (first, start), (last, end) = values[0], values[-1]
            ends = [f"{start:.4g} (update {first})", f"{end:.4g} (update {last})"]
            rows.append([f"`{name}`, mean over {meaning}", *ends])
    return ["## Rewards", _table(["metric", "first", "last"], rows)] if rows else []


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _setting(value: Any) -> str:
    return "default" if value is None else _code(value)


def _code(value: Any) -> str:
    """A value as code in a Markdown table: nothing in it ends the code, the cell or the line."""
    text = " ".join(str(value).replace("`", "'").replace("|", "/").split())
    return f"`{text}`"


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "path/to/this/model"
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)  # for string prompts: tokenizer("...", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""

_CITATION = """```bibtex
@misc{gvpo2025,
  title = {{GVPO}: Group Variance Policy Optimization for Large Language Model Post-Training},
  author = {Zhang, Kaichen and Hong, Yuzhong and Bao, Junwei and Jiang, Hongfei and Song, Yang and Hong, Dingqian and
            Xiong, Hui},
  year = {2025},
  eprint = {2504.19599},
  archivePrefix = {arXiv}
}
```"""
