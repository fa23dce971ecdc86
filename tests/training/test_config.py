"""GVPOConfig and config files: defaults, refusals in one line, and YAML there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gvpo.errors import UserError
from gvpo.training.config import GVPOConfig, RunConfig, dump_config, load_config, parse_value


def refusal(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        GVPOConfig(**values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_contracts_defaults() -> None:
    config = GVPOConfig()
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.999)
    assert config.weight_decay == 0
    assert config.warmup_steps == 0
    assert config.lr_scheduler_type == "linear"
    assert config.max_grad_norm == 1
    assert config.report_to == "none" and config.trackers == []
    assert config.objective == "gvpo"
    assert config.reference is None and config.allow_unanchored is False
    assert config.max_steps is None and config.output_dir is None
    assert config.temperature == 1 and config.top_p == 1 and config.top_k == 0


def test_a_config_cannot_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        GVPOConfig().beta = 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("num_generation", "num_generations"),
        ("epochs_per_rolout", "epochs_per_rollout"),
        ("tokenbudget", "token_budget"),
    ],
)
def test_an_unknown_name_is_met_with_the_nearest(wrong: str, nearest: str) -> None:
    assert refusal(**{wrong: 1}) == f"config, field {wrong!r}: unknown; did you mean {nearest!r}?"


def test_a_name_near_to_none_points_at_the_list() -> None:
    assert "--help" in refusal(zzzzzz=1)


def test_names_of_a_run_config_are_unknown_to_the_trainers() -> None:
    assert "'model'" in refusal(model="x")
    named: dict[str, Any] = {"model": "x"}
    assert RunConfig(**named).model == "x"


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("beta", 0, 1e-9),
        ("num_generations", 1, 2),
        ("max_completion_length", 0, 1),
        ("temperature", 0, 0.01),
        ("top_p", 0, 1),
        ("top_p", 1.01, 1),
        ("top_k", -1, 0),
        ("groups_per_update", 0, 1),
        ("updates_per_rollout", 0, 1),
        ("epochs_per_rollout", 0, 1),
        ("learning_rate", -1e-9, 0),
        ("adam_beta1", 1, 0),
        ("adam_beta2", 1, 0),
        ("adam_epsilon", 0, 1e-12),
        ("weight_decay", -0.1, 0),
        ("max_grad_norm", -1, 0),
        ("warmup_steps", -1, 0),
        ("max_steps", 0, 1),
        ("num_train_epochs", 0, 0.5),
        ("token_budget", 0, None),
        ("seed", -1, 0),
        ("logging_steps", 0, 1),
        ("eval_steps", 0, 1),
        ("save_steps", 0, 1),
        ("save_total_limit", 0, 1),
        ("prompt_column", "", "p"),
        ("reference", 0, 1),
        ("reference", " ", "initial"),
        ("reference", True, "rollout"),
        ("reference", 1.5, 3),
        ("objective", "gvop", "gvpo"),
        ("lr_scheduler_type", "slow", "cosine"),
        ("max_steps", 1.5, 2.0),
        ("learning_rate", "fast", "1e-6"),
    ],
)
def test_bounds(name: str, bad: Any, good: Any) -> None:
    assert f"field {name!r}" in refusal(**{name: bad})
    GVPOConfig(**{name: good})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["beta", "learning_rate", "temperature", "max_grad_norm", "num_train_epochs"])
def test_numbers_are_finite(name: str, value: float) -> None:
    assert f"field {name!r}" in refusal(**{name: value})


def test_reward_weights_are_finite() -> None:
    assert "reward_weights" in refusal(reward_weights=[1.0, float("nan")])


def test_combinations_that_cannot_be() -> None:
    assert "warmup_steps=11" in refusal(warmup_steps=11, max_steps=10)
    GVPOConfig(warmup_steps=10, max_steps=10)
    assert "polynomial" in refusal(lr_scheduler_type="polynomial", learning_rate=1e-7)
    GVPOConfig(lr_scheduler_type="linear", learning_rate=1e-7)


def test_vllm_settings_that_cannot_be() -> None:
    url = "http://localhost:8000"
    assert "vllm serve --tensor-parallel-size" in refusal(vllm_tensor_parallel_size=2)
    assert "field 'vllm_server_base_url': must name the server" in refusal(use_vllm=True, vllm_mode="server")
    assert "'vllm_server_base_url': is for vllm_mode='server'" in refusal(use_vllm=True, vllm_server_base_url=url)
    served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}
    for name, value in (("vllm_gpu_memory_utilization", 0.5), ("vllm_enable_sleep_mode", True)):
        assert f"field {name!r}: is for vllm_mode='colocate'" in refusal(**served, **{name: value})
        GVPOConfig(use_vllm=True, **{name: value})
    GVPOConfig(**served)


@pytest.mark.parametrize(("value", "meant"), [("intial", "initial"), ("rollouts", "rollout"), ("Initial", "initial")])
def test_a_misspelt_reference_is_no_path(value: str, meant: str) -> None:
    assert f"did you mean {meant!r}" in refusal(reference=value)
    assert GVPOConfig(reference=f"./{value}").reference == f"./{value}"


def test_paths_are_taken_as_paths() -> None:
    config = GVPOConfig(output_dir=Path("runs/x"), reference=Path("models/y"))  # pyright: ignore[reportArgumentType]
    assert (config.output_dir, config.reference) == (str(Path("runs/x")), str(Path("models/y")))


def test_groups_per_rollout() -> None:
    assert GVPOConfig(groups_per_update=3, updates_per_rollout=4).groups_per_rollout == 12


def test_trackers_leave_none_out() -> None:
    assert GVPOConfig(report_to="wandb").trackers == ["wandb"]
    assert GVPOConfig(report_to=["none", "tensorboard"]).trackers == ["tensorboard"]


# YAML


def loaded(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E+6", 1e6),
        ("-2e3", -2000.0),
        ("1.5e6", 1.5e6),
        (".5e3", 500.0),
        ("5.e-3", 0.005),
        ("1.0e-06", 1e-6),
        ("0.1", 0.1),
        ("7", 7),
        ("null", None),
        ("~", None),
        ("true", True),
        ("e6", "e6"),
        ("1e", "1e"),
        ("1e6x", "1e6x"),
        ('"1e-6"', "1e-6"),
        ("[1e-3, 2]", [1e-3, 2]),
        ("none", "none"),
    ],
)
def test_yaml_values(tmp_path: Path, text: str, value: Any) -> None:
    read = loaded(tmp_path, f"name: {text}\n")["name"]
    assert read == value and type(read) is type(value)
    from_flag = parse_value(text)
    assert from_flag == value and type(from_flag) is type(value)


def test_a_file_becomes_a_config(tmp_path: Path) -> None:
    text = "learning_rate: 1e-6\nmax_steps: 1e3\nreward_weights: [1, 0.5]\nreference: null\n# a comment\nseed: 3\n"
    config = GVPOConfig(**loaded(tmp_path, text))
    assert (config.learning_rate, config.max_steps, config.seed) == (1e-6, 1000, 3)
    assert config.reward_weights == [1.0, 0.5] and config.reference is None


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert loaded(tmp_path, "") == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"beta: [1\nseed: 2\n", "line 2"),
        (b"- beta\n", "mapping"),
        (b"just words\n", "mapping"),
        (b"beta: \xff\n", "UTF-8"),
        (b"beta: \x00\n", "not YAML"),
    ],
)
def test_what_is_no_config_file(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_config(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    values: dict[str, Any] = {"learning_rate": 1e-6, "reference": 3, "reward_weights": [0.1, 2], "model": "é"}
    config = RunConfig(**values, **{"token_budget": None, "report_to": ["tensorboard"]})
    assert RunConfig(**loaded(tmp_path, dump_config(config))) == config


WORDS = st.one_of(
    st.sampled_from(["1e5", "2E-3", ".5e3", "null", "true", "007", "~", "1_000", "- a", "a: b", "0x10", "12:30:45"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
)


@given(name=WORDS, folder=WORDS, rate=st.floats(1e-300, 1e300), weights=st.lists(st.floats(-1e9, 1e9)))
def test_any_config_survives_its_file(name: str, folder: str, rate: float, weights: list[float]) -> None:
    config = GVPOConfig(run_name=name, output_dir=folder, learning_rate=rate, reward_weights=weights)
    assert GVPOConfig(**parse_value(dump_config(config))) == config
