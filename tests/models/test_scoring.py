"""sequence_logprobs against plain forwards, one sequence at a time, for many architectures and every batch plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    LONGEST,
    SHARING,
    VOCABULARY,
    WITHOUT_SDPA,
    plain_logprobs,
    ragged_groups,
    tiny,
)
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.models import scoring
from gvpo.models.modes import disable_dropout, evaluating, probing
from gvpo.models.scoring import Scorer, as_scorer, sequence_logprobs

BUDGETS = [None, LONGEST, LONGEST + 1, 2 * LONGEST, 40, 63, 1000]


def worst(ours: Tensor, plain: Tensor) -> float:
    return float((ours.detach().double() - plain).abs().max())


class TestAgainstPlainForwards:
    """Sums of up to 170 nats in float32; a wrong position, neighbour, cap or end token is off by a tenth or more."""

    @pytest.mark.parametrize(
        ("architecture", "attention"),
        [(name, "eager") for name in ARCHITECTURES]
        + [(name, "sdpa") for name in ARCHITECTURES if name not in WITHOUT_SDPA],
    )
    def test_every_architecture_and_plan(self, architecture: str, attention: str) -> None:
        model, groups = tiny(architecture, attention=attention), ragged_groups()
        with torch.no_grad():
            plain_N = plain_logprobs(model, groups)
            for share_prefix in (True, False):
                for budget in BUDGETS:
                    ours_N = sequence_logprobs(model, groups, token_budget=budget, share_prefix=share_prefix)
                    assert ours_N.dtype == torch.float32
                    assert worst(ours_N, plain_N) < 1e-4, (share_prefix, budget)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_a_group_is_one_row_only_where_that_is_known_to_be_right(self, architecture: str) -> None:
        assert Scorer(tiny(architecture)).shares_prefix == (architecture in SHARING)

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "mamba"])
    def test_weights_as_small_as_at_birth_hide_nothing(self, architecture: str) -> None:
        # With such weights a leak from one completion into the next moves a log-prob by a hundredth of a nat or less.
        model, groups = tiny(architecture, initializer_range=0.02), ragged_groups()
        with torch.no_grad():
            assert worst(sequence_logprobs(model, groups), plain_logprobs(model, groups)) < 2e-5
        assert Scorer(model).shares_prefix == (architecture in SHARING)

    def test_a_float64_model_gives_float64(self) -> None:
        model, groups = tiny("gpt2").double(), ragged_groups()
        with torch.no_grad():
            ours_N = sequence_logprobs(model, groups)
            assert ours_N.dtype == torch.float64
            assert worst(ours_N, plain_logprobs(model, groups)) < 1e-10

    def test_a_bfloat16_model_gives_float32_sums(self) -> None:
        model, groups = tiny("llama", initializer_range=0.1).bfloat16(), ragged_groups()
        with torch.no_grad():
            ours_N = sequence_logprobs(model, groups)
            assert ours_N.dtype == torch.float32
            assert worst(ours_N, plain_logprobs(model, groups)) < 0.05 * LONGEST

    def test_many_random_groups(self) -> None:
        model = tiny("llama")
        with torch.no_grad():
            for seed in range(1, 6):
                groups = ragged_groups(seed) + ragged_groups(100 + seed)
                ours_N = sequence_logprobs(model, groups, token_budget=30 + seed)
                assert worst(ours_N, plain_logprobs(model, groups)) < 1e-4


class TestWhatIsScored:
    def test_the_end_token_counts_when_the_completion_ended(self) -> None:
        model, end = tiny(), 7
        ended = Group(None, [Completion(token_ids=[3, 4, end])], prompt_ids=[1, 2])
        truncated = Group(None, [Completion(token_ids=[3, 4], truncated=True)], prompt_ids=[1, 2])
        with torch.no_grad():
            ended_N, truncated_N = (sequence_logprobs(model, [group]) for group in (ended, truncated))
            logps_LV = model(torch.tensor([[1, 2, 3, 4]])).logits[0].double().log_softmax(-1)
        words = logps_LV[1, 3] + logps_LV[2, 4]
        assert float(truncated_N) == pytest.approx(float(words), abs=1e-4)
        assert float(ended_N) == pytest.approx(float(words + logps_LV[3, end]), abs=1e-4)

    def test_given_tokens_are_read_and_not_scored(self) -> None:
        model, tokens = tiny(), [3, 9, 4, 5]
        masks = [None, [True, False, False, True], [False] * 4]
        groups = [Group(None, [Completion(token_ids=tokens, loss_mask=mask) for mask in masks], prompt_ids=[1, 2])]
        for share_prefix in (True, False):
            with torch.no_grad():
                logps_N = sequence_logprobs(model, groups, share_prefix=share_prefix)
                logps_LV = model(torch.tensor([[1, 2, *tokens]])).logits[0].double().log_softmax(-1)
            token_logps = [float(logps_LV[1 + place, token]) for place, token in enumerate(tokens)]
            expected = [sum(token_logps), token_logps[0] + token_logps[3], 0.0]
            assert logps_N.tolist() == pytest.approx(expected, abs=1e-4)

    def test_an_empty_truncated_completion_scores_zero(self) -> None:
        model = tiny()
        empty = Completion(token_ids=[], truncated=True)
        for members in ([empty], [empty, empty], [empty, Completion(token_ids=[4])]):
            for share_prefix in (True, False):
                logps_N = sequence_logprobs(model, [Group(None, members, prompt_ids=[1])], share_prefix=share_prefix)
                assert logps_N[0] == 0.0
                assert len(logps_N) == len(members)
                logps_N.sum().backward()

    def test_no_groups_give_no_scores(self) -> None:
        for budget in (None, 10):
            assert sequence_logprobs(tiny(), [], token_budget=budget).shape == (0,)

    def test_groups_of_one_are_scored_in_order(self) -> None:
        model = tiny()
        groups = [
            Group(None, [Completion(token_ids=[token] * n)], prompt_ids=[token]) for token, n in enumerate([1, 5, 2, 9])
        ]
        with torch.no_grad():
            plain_N = plain_logprobs(model, groups)
            for budget in (None, 10, 12, 20):
                assert worst(sequence_logprobs(model, groups, token_budget=budget), plain_N) < 1e-4
        assert len(set(plain_N.tolist())) == 4

    def test_never_above_zero(self) -> None:
        model = tiny()
        with torch.no_grad():
            model.lm_head.weight.mul_(50.0)  # one token takes all, and rounding must not lift it above 0
            best = [int(model(torch.tensor([[token]])).logits[0, -1].argmax()) for token in range(VOCABULARY)]
            groups = [Group(None, [Completion(token_ids=[token])], prompt_ids=[n]) for n, token in enumerate(best)]
            logps_N = sequence_logprobs(model, groups)
        assert (logps_N <= 0).all()
        assert (logps_N > -1e-6).any()

    def test_token_ids_win_over_text(self) -> None:
        with_text = Group("words", [Completion("more words", [3, 4])], prompt_ids=[1])
        without = Group(None, [Completion(token_ids=[3, 4])], prompt_ids=[1])
        assert torch.equal(sequence_logprobs(tiny(), [with_text]), sequence_logprobs(tiny(), [without]))


class TestSharedPrompts:
    def test_a_shared_prompt_is_read_once(self) -> None:
        model, read = tiny(), []
        group = Group(None, [Completion(token_ids=[4, 5, 6]) for _ in range(4)], prompt_ids=[1] * 9)
        assert Scorer(model).shares_prefix  # measured here
        model.get_input_embeddings().register_forward_hook(lambda _module, args, _output: read.append(args[0].numel()))
        sequence_logprobs(model, [group], share_prefix=True)
        sequence_logprobs(model, [group], share_prefix=False)
        # The last token of a completion is predicted, never read.
        assert read == [9 + 4 * 2, 4 * (9 + 2)]

    @pytest.mark.parametrize("architecture", ["gpt2", "opt"])
    def test_rows_longer_than_the_learned_positions(self, architecture: str) -> None:
        # Four completions behind one prompt are 8 + 4 * 7 columns, at positions 0 to 14 of 16; padding has none beyond.
        model = tiny(architecture, **{"n_positions" if architecture == "gpt2" else "max_position_embeddings": 16})
        long = Group(None, [Completion(token_ids=[n] * 8) for n in range(4)], prompt_ids=list(range(8)))
        groups = [long, Group(None, [Completion(token_ids=[3, 4])] * 2, prompt_ids=[1])]
        assert Scorer(model).shares_prefix
        with torch.no_grad():
            assert worst(sequence_logprobs(model, groups), plain_logprobs(model, groups)) < 1e-4

    @pytest.mark.parametrize(
        ("architecture", "window"),
        [
            ("mistral", {"sliding_window": 10}),
            ("gemma2", {"sliding_window": 10}),
            ("llama4", {"attention_chunk_size": 10}),
            ("gpt_neo", {"window_size": 10}),
        ],
    )
    def test_a_window_that_no_short_probe_would_notice(self, architecture: str, window: dict[str, int]) -> None:
        model, groups = tiny(architecture, **window), ragged_groups()
        assert LONGEST > 10
        with torch.no_grad():
            assert worst(sequence_logprobs(model, groups), plain_logprobs(model, groups)) < 1e-4
        assert not Scorer(model).shares_prefix

    def test_an_attention_that_takes_no_mask_of_ours(self) -> None:
        scorer = Scorer(tiny())
        scorer.attention = "flash_attention_2"
        assert not scorer.shares_prefix

    def test_a_model_that_ignores_the_mask_is_found_out(self) -> None:
        class Unmasked(LlamaForCausalLM):
            def get_output_embeddings(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
                """No head to fit, so that the forward below is what is scored."""

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **{**kwargs, "attention_mask": None})

        model, groups = Unmasked(tiny().config).eval(), ragged_groups()
        assert not Scorer(model).shares_prefix
        with torch.no_grad():
            assert worst(sequence_logprobs(model, groups), plain_logprobs(model, groups)) < 1e-4

    def test_the_choice_is_measured_without_dropout_autocast_or_graph(self) -> None:
        model = tiny("gpt2", resid_pdrop=0.5).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scorer = Scorer(model)
            with probing(model):
                assert not torch.is_autocast_enabled("cpu")
                assert not torch.is_grad_enabled()
        assert scorer.shares_prefix
        assert scorer.head is not None

    def test_it_is_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, calls = tiny(), []
        measure = scoring._sharing_is_exact
        monkeypatch.setattr(scoring, "_sharing_is_exact", lambda scorer: calls.append(1) or measure(scorer))
        for _ in range(3):
            sequence_logprobs(model, ragged_groups())
        assert len(calls) == 1


class TestTheModelIsLeftAlone:
    def test_differentiable_and_the_same_gradient_for_every_plan(self) -> None:
        groups, gradients = ragged_groups(), []
        for options in ({}, {"share_prefix": False}, {"token_budget": LONGEST}):
            model = tiny()
            sequence_logprobs(model, groups, **options).sum().backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        model = tiny()
        plain_logprobs(model, groups).sum().backward()
        plain = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        for gradient in gradients:
            assert float((gradient - plain).norm() / plain.norm()) < 1e-5

    def test_modes_are_left_as_they_are(self) -> None:
        model = tiny()
        model.train()
        model.model.layers[1].eval()
        modes = [module.training for module in model.modules()]
        sequence_logprobs(model, ragged_groups())
        assert [module.training for module in model.modules()] == modes
        assert True in modes and False in modes

    def test_evaluating_restores_the_flags_after_an_error(self) -> None:
        model = nn.Sequential(nn.Dropout(), nn.Dropout())
        model[1].eval()
        with pytest.raises(RuntimeError), evaluating(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError
        assert [module.training for module in model.modules()] == [True, True, False]

    def test_evaluating_runs_compiled_layers_as_they_were_written(self) -> None:
        def forbidden(graph: Any, inputs: Any) -> Any:
            raise AssertionError("compiled")

        model = tiny("llama")
        model.model.layers[1].compile(backend=forbidden)
        ids = torch.ones(1, 2, dtype=torch.long)
        with evaluating(model):
            model(ids)
        with pytest.raises(Exception, match="compiled"):
            model(ids)

    def test_dropout_in_train_mode_is_the_models_own_and_can_be_switched_off(self) -> None:
        groups = ragged_groups()
        model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
        still = sequence_logprobs(model, groups)
        model.train()
        assert not torch.equal(sequence_logprobs(model, groups), sequence_logprobs(model, groups))
        disable_dropout(model)
        assert model.training
        assert torch.equal(sequence_logprobs(model, groups), still)
        llama = tiny("llama", attention_dropout=0.5)
        still = sequence_logprobs(llama, groups)
        llama.train()
        disable_dropout(llama)
        assert torch.equal(sequence_logprobs(llama, groups), still)
        assert llama.config.attention_dropout == 0.5

    def test_a_scorer_scores_as_its_model_does(self) -> None:
        model, groups = tiny(), ragged_groups()
        scorer = Scorer(model)
        assert as_scorer(scorer) is scorer
        wrapped = nn.Module()
        wrapped.module = scorer  # as data-parallel wrappers keep it
        assert as_scorer(wrapped) is wrapped
        with pytest.raises(UserError, match=r"give DataParallel\(gvpo.Scorer\(model\)\)"):
            as_scorer(nn.DataParallel(tiny()))
        assert torch.equal(sequence_logprobs(scorer, groups), sequence_logprobs(model, groups))

    def test_changed_weights_change_the_score(self) -> None:
        model, groups = tiny(), ragged_groups()
        sequence_logprobs(model, groups)
        with torch.no_grad():
            model.lm_head.weight.copy_(tiny(seed=1).lm_head.weight)
            assert worst(sequence_logprobs(model, groups), plain_logprobs(model, groups)) < 1e-4


class TestRefused:
    """One line each, naming group and member."""

    def refused(self, model: Any, groups: list[Group], **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            sequence_logprobs(model, groups, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_budget_one_too_small(self) -> None:
        groups = ragged_groups()
        for share_prefix in (True, False):
            line = self.refused(tiny(), groups, token_budget=LONGEST - 1, share_prefix=share_prefix)
            assert "group 2, member 1" in line
            assert "13 tokens" in line

    def test_an_id_outside_the_vocabulary(self) -> None:
        groups = ragged_groups()
        groups[3].completions[1].token_ids = [1, VOCABULARY]
        assert f"group 3, member 1: token id {VOCABULARY}" in self.refused(tiny(), groups)
        groups[3].completions[1].token_ids = [1]
        groups[1].prompt_ids = [99]
        assert "group 1, member 0: token id 99" in self.refused(tiny(), groups)

    def test_more_tokens_than_the_model_has_positions(self) -> None:
        model = tiny("gpt2", n_positions=LONGEST - 1)
        line = self.refused(model, ragged_groups())
        assert "group 2, member 1" in line
        assert "context of 12" in line
        sequence_logprobs(tiny("gpt2", n_positions=LONGEST), ragged_groups())

    def test_a_context_of_minus_one_is_no_limit(self) -> None:
        scorer = Scorer(tiny())
        scorer.context = -1
        assert len(sequence_logprobs(scorer, ragged_groups())) == 10

    def test_text_without_a_tokenizer(self) -> None:
        groups = [*ragged_groups(), Group("prompt", [Completion("text")])]
        assert "group 4 has text without token ids" in self.refused(tiny(), groups)

    def test_a_model_that_looks_ahead(self) -> None:
        small: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
        config = BertConfig(num_hidden_layers=1, intermediate_size=32, is_decoder=False, **small)
        assert "not causal" in self.refused(BertLMHeadModel(config).eval(), ragged_groups())
        config = copy.deepcopy(config)
        config.is_decoder = True
        model = BertLMHeadModel(config).eval()
        with torch.no_grad():
            assert worst(sequence_logprobs(model, ragged_groups()), plain_logprobs(model, ragged_groups())) < 1e-4

    def test_an_encoder_decoder(self) -> None:
        config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        assert "encoder-decoder" in self.refused(T5ForConditionalGeneration(config).eval(), ragged_groups())
