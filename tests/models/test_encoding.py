"""From groups to token ids."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny
from tiny_tokenizer import (
    AB,
    ASSISTANT,
    BOS,
    CHAT,
    EOS,
    EOS_CHAT,
    HELLO,
    PLAIN_CHAT,
    START,
    STOP,
    USER,
    A,
    B,
    words_tokenizer,
)

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.models.encoding import (
    completed,
    encode_groups,
    encode_prompt,
    end_token,
    end_token_ids,
    render_chat,
    turn_end_id,
)
from gvpo.models.scoring import sequence_logprobs

QUESTION = [{"role": "user", "content": "a b"}]


class TestPrompt:
    def test_a_string_gets_the_beginning_that_the_tokenizer_gives_it(self) -> None:
        assert encode_prompt("a b", words_tokenizer()) == [BOS, A, B]
        assert encode_prompt("a b", words_tokenizer(adds="$A")) == [A, B]

    def test_a_string_gets_no_trailing_end_token(self) -> None:
        both = words_tokenizer(adds="<s> $A </s>")
        assert both.encode("a") == [BOS, A, EOS]
        assert encode_prompt("a b", both) == [BOS, A, B]
        assert encode_prompt("a b", words_tokenizer(adds="$A </s>")) == [A, B]

    def test_an_end_token_that_the_text_itself_ends_with_stays(self) -> None:
        assert encode_prompt("a </s>", words_tokenizer()) == [BOS, A, EOS]

    def test_a_lone_token_that_is_beginning_and_end_stays(self) -> None:
        one = words_tokenizer(adds="</s> $A")
        one.bos_token = "</s>"
        assert encode_prompt("", one) == [EOS]
        assert encode_prompt("a", one) == [EOS, A]

    def test_chat_goes_through_the_template_and_has_one_beginning(self) -> None:
        ids = encode_prompt(QUESTION, words_tokenizer(template=CHAT))
        assert ids == [BOS, START, USER, A, B, STOP, START, ASSISTANT]

    def test_chat_whose_template_has_no_beginning_gets_none(self) -> None:
        assert encode_prompt(QUESTION, words_tokenizer(template=PLAIN_CHAT)) == [USER, A, B]

    def test_an_assistant_turn_that_has_begun_goes_on(self) -> None:
        begun = [*QUESTION, {"role": "assistant", "content": "hello a"}]
        ids = encode_prompt(begun, words_tokenizer(template=CHAT))
        assert ids == [BOS, START, USER, A, B, STOP, START, ASSISTANT, HELLO, A]

    def test_chat_without_a_template_is_one_line(self) -> None:
        with pytest.raises(UserError, match=r"^the prompt is a list of chat messages but the tokenizer has no chat"):
            encode_groups([Group(QUESTION, [Completion("a")])], words_tokenizer())

    @pytest.mark.parametrize("content", ["refuse", None, [{"type": "text", "text": "a"}]])
    def test_messages_that_the_template_refuses_are_one_line(self, content: Any) -> None:
        template = "{% if messages[0]['content'] == 'refuse' %}{{ raise_exception('no such role') }}{% endif %}" + CHAT
        with pytest.raises(UserError, match=r"chat template refuses the messages .*content") as caught:
            render_chat([{"role": "user", "content": content}], words_tokenizer(template=template))
        assert "\n" not in str(caught.value)

    def test_no_tokens_at_all_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"^group 1, field 'prompt': no tokens"):
            encode_groups([Group("a", [Completion("b")]), Group("", [Completion("b")])], words_tokenizer(adds="$A"))


class TestCompletions:
    def encoded(self, group: Group, tokenizer: Any | None) -> tuple[list[int], list[list[int]]]:
        (one,) = encode_groups([group], tokenizer)
        return one.prompt_ids, one.completion_ids

    def test_prompt_and_completion_are_tokenized_apart(self) -> None:
        # One text would be the word "ab"; apart they are "a" and "b".
        assert words_tokenizer().encode("ab", add_special_tokens=False) == [AB]
        assert self.encoded(Group("a", [Completion("b")]), words_tokenizer()) == ([BOS, A], [[B, EOS]])

    def test_strings_end_with_the_tokenizers_end_token_unless_truncated(self) -> None:
        group = Group("a", [Completion("b"), Completion("b", truncated=True), Completion("", truncated=True)])
        assert self.encoded(group, words_tokenizer(template=CHAT))[1] == [[B, EOS], [B], []]
        assert self.encoded(Group("a", [Completion("")]), words_tokenizer())[1] == [[EOS]]

    def test_a_completion_gets_no_beginning(self) -> None:
        assert self.encoded(Group("a", [Completion("b")]), words_tokenizer(adds="<s> $A </s>"))[1] == [[B, EOS]]

    @pytest.mark.parametrize(("template", "end"), [(CHAT, STOP), (EOS_CHAT, EOS), (PLAIN_CHAT, EOS)])
    def test_chat_ends_as_the_template_ends_a_turn(self, template: str, end: int) -> None:
        group = Group(QUESTION, [Completion("hello"), Completion("hello", truncated=True)])
        assert self.encoded(group, words_tokenizer(template=template))[1] == [[HELLO, end], [HELLO]]

    def test_given_ids_win_over_text(self) -> None:
        group = Group("a", [Completion("b", [A, A]), Completion("b")], prompt_ids=[HELLO])
        assert self.encoded(group, words_tokenizer()) == ([HELLO], [[A, A], [B, EOS]])

    def test_ids_on_both_need_no_tokenizer(self) -> None:
        group = Group(QUESTION, [Completion("b", [A])], prompt_ids=[HELLO])
        assert self.encoded(group, None) == ([HELLO], [[A]])

    @pytest.mark.parametrize(
        "group", [Group("a", [Completion(token_ids=[A])]), Group(None, [Completion("b")], prompt_ids=[A])]
    )
    def test_text_without_a_tokenizer_is_one_line(self, group: Group) -> None:
        with pytest.raises(UserError, match=r"^group 0 has text without token ids, and there is no tokenizer; pass"):
            encode_groups([group], None)

    def test_text_that_nothing_can_end_is_one_line(self) -> None:
        endless = words_tokenizer(eos=None)
        group = Group("a", [Completion("b", truncated=True), Completion("b")])
        with pytest.raises(UserError, match=r"^group 0, member 1: text that is not truncated gets an end token"):
            encode_groups([group], endless)
        assert self.encoded(Group("a", group.completions[:1]), endless)[1] == [[B]]

    def test_masks_go_along(self) -> None:
        group = Group("a", [Completion(token_ids=[A, B], loss_mask=[True, False]), Completion("b")])
        assert encode_groups([group], words_tokenizer())[0].scored == [[True, False], None]

    def test_tokenized_once_is_tokenized_for_good(self) -> None:
        group = Group("a", [Completion("b", reward=1.0), Completion("b", truncated=True)], id="x", columns={"c": 1})
        done = completed(group, words_tokenizer())
        assert encode_groups([done], None) == encode_groups([group], words_tokenizer())
        assert (done.prompt, done.id, done.columns) == ("a", "x", {"c": 1})
        assert [(c.text, c.reward, c.truncated) for c in done.completions] == [("b", 1.0, False), ("b", None, True)]
        assert group.prompt_ids is None

    def test_the_score_of_text_is_the_score_of_its_ids(self) -> None:
        model, tokenizer = tiny(), words_tokenizer(template=CHAT)
        text = [Group(QUESTION, [Completion("hello"), Completion("a b", truncated=True)])]
        start = [BOS, START, USER, A, B, STOP, START, ASSISTANT]
        ids = [Group(None, [Completion(token_ids=[HELLO, STOP]), Completion(token_ids=[A, B])], prompt_ids=start)]
        assert torch.equal(sequence_logprobs(model, text, tokenizer=tokenizer), sequence_logprobs(model, ids))


class TestEnds:
    @pytest.mark.parametrize(
        ("template", "end"),
        [
            (CHAT, STOP),
            (EOS_CHAT, EOS),
            (PLAIN_CHAT, None),
            (PLAIN_CHAT + " hello", None),  # a word of its own, and no special token
            (CHAT.replace("<|stop|>", "hello <|stop|>"), STOP),
            ("no turns", None),
            (None, None),
        ],
    )
    def test_of_a_turn(self, template: str | None, end: int | None) -> None:
        tokenizer = words_tokenizer(template=template)
        assert turn_end_id(tokenizer) == end
        assert end_token(QUESTION, tokenizer) == (EOS if end is None else end)
        assert end_token("a", tokenizer) == EOS

    def test_of_a_turn_follows_a_changed_template(self) -> None:
        tokenizer = words_tokenizer(template=CHAT)
        assert turn_end_id(tokenizer) == STOP
        tokenizer.chat_template = EOS_CHAT
        assert turn_end_id(tokenizer) == EOS
        tokenizer.chat_template = {"default": CHAT, "rag": EOS_CHAT}  # some tokenizers carry several
        assert turn_end_id(tokenizer) == STOP

    def test_of_sampling(self) -> None:
        def model(generation: Any, config: Any) -> Any:
            named = {"generation_config": SimpleNamespace(eos_token_id=generation)}
            return SimpleNamespace(config=SimpleNamespace(eos_token_id=config), **named)

        assert end_token_ids(model([20, 21], 22), None) == {20, 21}
        assert end_token_ids(model(20, 22), None) == {20}
        assert end_token_ids(model(None, 22), None) == {22}
        assert end_token_ids(model(None, [22, 23]), None) == {22, 23}
        assert end_token_ids(model(None, None), None) == set()
        assert end_token_ids(SimpleNamespace(config=SimpleNamespace(eos_token_id=22)), None) == {22}
        assert end_token_ids(model([20], None), words_tokenizer()) == {20, EOS}
        assert end_token_ids(model(0, None), words_tokenizer(template=CHAT)) == {0, EOS, STOP}
        assert end_token_ids(model(None, None), words_tokenizer(eos=None)) == set()
