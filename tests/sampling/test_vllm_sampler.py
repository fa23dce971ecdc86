"""vLLM as the sampler, without vLLM: what it is told, in which order, and what comes back; and with it, where it is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from trl.generation import vllm_client

from gvpo.errors import UserError
from gvpo.sampling import Sample, SamplingParams, TorchSampler
from gvpo.sampling.policy_weights import policy_weights
from gvpo.sampling.vllm_sampler import Colocated, Server, VLLMSampler
from gvpo.training.config import GVPOConfig
from gvpo.training.samplers import make_sampler
from models.tiny_models import tiny
from sampling import fake_vllm

END = 0
PROMPTS = [[5, 2, 3], [1], [4, 4, 6, 1, 2, 7], [3, 5]]
GREEDY = SamplingParams(10, temperature=0.0)
MISSING = importlib.util.find_spec("vllm") is None


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in under vLLM's name, on a machine that says it has a GPU."""
    module: Any = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = fake_vllm.LLM, fake_vllm.SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what is set is taken back
        monkeypatch.delenv(name)
    yield module


def adapted(**options: Any) -> Any:
    """A LoRA policy whose adapter matters."""
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj", "down_proj"], **options))
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model


# --- the weights that are sent ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3_next", "gpt2"])
def test_weights_are_those_of_the_saved_model(architecture: str, tmp_path: Path):
    model = tiny(architecture)
    model.save_pretrained(tmp_path)
    sent = list(policy_weights(model))
    saved = load_file(tmp_path / "model.safetensors")
    assert len(sent) == len(saved) and dict(sent).keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent)


def test_tied_weights_are_sent_once():
    names = [name for name, _ in policy_weights(tiny(tie_word_embeddings=True))]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
def test_an_adapter_is_merged_and_the_policy_stays_as_it_is(options: dict[str, Any]):
    model = adapted(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):  # the loop's: merging must not round
        sent = dict(policy_weights(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    merged = model.merge_and_unload().state_dict()
    assert sent.keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in sent.items())


def test_adapters_that_cannot_be_merged_are_refused():
    soft = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    tied = get_peft_model(tiny(tie_word_embeddings=True), LoraConfig(target_modules=["embed_tokens"]))
    for model, message in ((soft, "prompt-learning"), (tied, "tied embeddings")):
        with pytest.raises(UserError, match=message):
            list(policy_weights(model))


# --- an engine in this process ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny, adapted], ids=["full", "lora"])
@pytest.mark.parametrize("sleeps", [True, False])
def test_greedy_is_the_embedded_samplers_after_every_update(vllm: ModuleType, make: Any, sleeps: bool):
    model = make()
    sampler = VLLMSampler(Colocated(model, sleeps=sleeps), {END, 7})
    first = None
    for _ in range(2):
        sampler.sync()
        drawn = sampler.sample(PROMPTS, 2, GREEDY, seeds=range(4))
        assert drawn == TorchSampler(model, {END, 7}).sample(PROMPTS, 2, GREEDY, seeds=range(4))
        assert {sample.truncated for group in drawn for sample in group} == {True, False}
        assert drawn != first, "the update changed nothing"
        first = drawn
        for parameter in model.parameters():
            parameter.data.neg_()


def test_it_draws_with_the_weights_of_the_last_sync(vllm: ModuleType):
    model = tiny()
    sampler = VLLMSampler(Colocated(model), [END])
    sampler.sync()
    before = sampler.sample(PROMPTS, 1, GREEDY, seeds=range(4))
    for parameter in model.parameters():
        parameter.data.neg_()
    assert sampler.sample(PROMPTS, 1, GREEDY, seeds=range(4)) == before
    sampler.sync()
    assert sampler.sample(PROMPTS, 1, GREEDY, seeds=range(4)) != before


def test_every_weight_is_sent_once_a_sync(vllm: ModuleType):
    model = tiny()
    engine = Colocated(model)
    engine.sync()
    assert sorted(engine.llm.engines.received) == sorted(name for name, _ in model.named_parameters())


def test_it_sleeps_but_while_it_draws(vllm: ModuleType):
    sampler = VLLMSampler(engine := Colocated(tiny(), sleeps=True), [END])
    sampler.sync()
    sampler.sample(PROMPTS, 2, SamplingParams(3), seeds=range(4))
    awake = ["wake weights", "load", "reset", "wake kv_cache", "generate 4", "sleep 2"]
    assert engine.llm.calls == ["sleep 2", *awake]
    sampler.sample(PROMPTS[:1], 1, SamplingParams(3), seeds=[0])  # without a sync: what slept must be sent again
    assert engine.llm.calls[7:] == [*awake[:4], "generate 1", "sleep 2"]


def test_members_differ_and_seeds_decide(vllm: ModuleType):
    sampler = VLLMSampler(Colocated(tiny()), [])

    def draw(*seeds: int) -> list[list[list[int]]]:
        groups = sampler.sample([PROMPTS[0]] * len(seeds), 4, SamplingParams(12), seeds=seeds)
        return [[sample.token_ids for sample in group] for group in groups]

    first, second, again = draw(7, 8, 7)
    assert first == again == draw(7)[0], "the other prompts of a call play no part"
    # vLLM adds 1 for each member: were seeds handed on as they are, 8's first would be 7's second.
    assert len({tuple(ids) for ids in first + second}) == 8
    assert draw(2**64 - 1) and draw(-1), "any integer is a seed"


def test_the_engine_is_made_for_a_policy_that_brings_its_weights(vllm: ModuleType):
    model = tiny()
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    config = GVPOConfig(use_vllm=True, vllm_gpu_memory_utilization=0.4, vllm_enable_sleep_mode=True)
    sampler: Any = make_sampler(config, model, None)
    assert torch.equal(torch.rand(3), expected), "an engine must not reseed the run"
    llm = sampler.engine.llm
    assert (llm.load_format, llm.skip_tokenizer_init, llm.dtype) == ("dummy", True, "bfloat16")
    assert (llm.gpu_memory_utilization, llm.enable_sleep_mode) == (0.4, True)
    assert llm.distributed_executor_backend == "external_launcher"


def test_a_weight_that_the_policy_lacks_is_told(vllm: ModuleType):
    engine = Colocated(tiny())
    engine.llm.engines.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="1 weights that the policy does not, the first is extra"):
        engine.sync()


@pytest.mark.parametrize(
    ("prompts", "k", "seeds", "message"),
    [
        ([[1, 2]], 2, [], "1 prompts but 0 seeds"),
        ([[1, 2]], 0, [0], "num_generations is 0"),
        ([[1], []], 2, [0, 0], "prompt 1 has no tokens"),
        ([[1] * 30], 2, [0], "prompt 0 has 30 tokens, .* makes 33, more than the 32 of the vLLM engine"),
    ],
)
def test_mistakes_are_told(vllm: ModuleType, prompts: list[list[int]], k: int, seeds: list[int], message: str):
    sampler = VLLMSampler(Colocated(tiny(), max_length=32), [END])
    with pytest.raises(UserError, match=message):
        sampler.sample(prompts, k, SamplingParams(3), seeds=seeds)
    assert sampler.sample([], 2, SamplingParams(3), seeds=[]) == []


def test_missing_packages_and_devices_are_told(monkeypatch: pytest.MonkeyPatch, vllm: ModuleType):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        Colocated(tiny())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'vllm package is not installed; pip install "gvpo\[vllm\]"'):
        Colocated(tiny())


# --- a server -----------------------------------------------------------------------------------------------------


class Client:
    """What TRL's client would answer: the seed, the number of the member, and an end token or not."""

    max_model_len = 64

    def __init__(self) -> None:
        self.sent: list[tuple[str, Tensor]] = []
        self.asked: list[dict[str, Any]] = []

    def generate(self, prompts: list[list[int]], **how: Any) -> dict[str, Any]:
        self.asked.append(how | {"prompts": prompts})
        answers = [[prompts[0][0], member, END] for member in range(how["n"])]
        return {"completion_ids": answers, "logprobs": None}

    def update_named_params(self, metadata: Any, named_params: Any) -> None:
        self.sent = list(named_params)
        assert metadata == [(name, "float32", list(tensor.shape)) for name, tensor in self.sent]


@pytest.fixture
def served(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Client]:
    """TRL's client with its own signatures, and what stands behind it."""
    client, spec = Client(), create_autospec(vllm_client.VLLMClient)
    spec.return_value.get_server_info.return_value = {"model_config": {"max_model_len": client.max_model_len}}
    spec.return_value.generate.side_effect = client.generate
    spec.return_value.update_named_params.side_effect = client.update_named_params
    monkeypatch.setattr(vllm_client, "VLLMClient", spec)
    return spec, client


def test_a_server_is_asked_prompt_by_prompt(served: tuple[Any, Client]):
    _, client = served
    sampler = VLLMSampler(Server(tiny(), "http://here:8000"), [END, 9])
    drawn = sampler.sample(PROMPTS, 2, SamplingParams(4, 0.7, 0.9, 5), seeds=[1, 2, 1, 2**64 - 1])
    assert drawn == [[Sample([prompt[0], member, END], False) for member in range(2)] for prompt in PROMPTS]
    asked = {tuple(one["prompts"][0]): one for one in client.asked}
    first = asked[tuple(PROMPTS[0])]
    extra = first.pop("generation_kwargs")
    assert first == {
        "prompts": [PROMPTS[0]],
        "n": 2,
        "logprobs": None,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 4,
    }
    seeds = [asked[tuple(prompt)].get("generation_kwargs", extra)["seed"] for prompt in PROMPTS]
    assert extra == {"seed": seeds[0], "stop_token_ids": [END, 9], "ignore_eos": True}
    assert seeds[0] == seeds[2] and len(set(seeds)) == 3 and all(0 <= seed < 2**62 for seed in seeds)
    client.asked.clear()
    greedy = sampler.sample(PROMPTS[:1], 3, SamplingParams(3, temperature=0), seeds=[1])
    assert client.asked[0]["n"] == 1 and greedy == [[Sample([5, 0, END], False)] * 3]
    with pytest.raises(UserError, match=r"61 tokens.* 65, more than the 64"):
        sampler.sample([[1] * 61], 1, SamplingParams(4), seeds=[0])


def test_one_process_sends_the_weights_and_all_wait(served: tuple[Any, Client]):
    spec, client = served
    model, order = tiny(), []
    spec.return_value.update_named_params.side_effect = lambda *sent: (
        order.append("send"),
        client.sent.extend(sent[1]),
    )
    spec.return_value.reset_prefix_cache.side_effect = lambda: order.append("reset")
    Server(model, "http://here:8000", is_main=False, wait=lambda: order.append("wait")).sync()
    assert order == ["wait", "wait"] and not spec.return_value.init_communicator.called
    order.clear()
    Server(model, "http://here:8000", wait=lambda: order.append("wait")).sync()
    assert order == ["wait", "send", "reset", "wait"]
    spec.return_value.init_communicator.assert_called_once_with(device=torch.device("cpu"))
    assert [name for name, _ in client.sent] == [name for name, _ in model.named_parameters()]


def test_a_server_that_is_not_there_or_ends_by_itself_is_told(served: tuple[Any, Client]):
    spec, _ = served
    sampler = VLLMSampler(Server(tiny(), "http://here:8000"), [9])
    with pytest.raises(UserError, match=r"after 3 of 8 tokens.*--generation-config vllm"):
        sampler.sample(PROMPTS, 1, SamplingParams(8), seeds=range(4))
    spec.side_effect = OSError("The vLLM server can't be reached\nand more")
    with pytest.raises(UserError, match=r"^vllm_server_base_url 'http://here:8000': The vLLM server can't be reached$"):
        Server(tiny(), "http://here:8000")


# --- vLLM itself, where it is -------------------------------------------------------------------------------------


@pytest.mark.skipif(MISSING or not torch.cuda.is_available(), reason="needs vLLM and a CUDA device")
@pytest.mark.parametrize("sleeps", [False, True])
def test_vllm_answers_greedily_as_the_embedded_sampler_does(sleeps: bool):
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, initializer_range=0.2, bos_token_id=None, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).cuda().eval()
    engine = Colocated(model, memory=0.2, sleeps=sleeps, dtype="float32")
    sampler = VLLMSampler(engine, range(8))
    for _ in range(2):
        sampler.sync()
        drawn = sampler.sample(PROMPTS, 2, SamplingParams(24, temperature=0), seeds=range(4))
        assert drawn == TorchSampler(model, range(8)).sample(PROMPTS, 2, SamplingParams(24, 0.0), seeds=range(4))
        for parameter in model.parameters():
            parameter.data.neg_()
    groups = sampler.sample(PROMPTS[:1], 4, SamplingParams(24), seeds=[3])
    assert len({tuple(sample.token_ids) for sample in groups[0]}) == 4
    assert sampler.sample(PROMPTS[:1], 4, SamplingParams(24), seeds=[3]) == groups
