"""A tokenizer of ten words, and chat templates for it."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, START, STOP, USER, ASSISTANT, A, B, AB, HELLO = range(10)
WORDS = ["<s>", "</s>", "<|start|>", "<|stop|>", "user", "assistant", "a", "b", "ab", "hello"]
CHAT = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|start|>' + m['role'] + ' ' + m['content'] + ' <|stop|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant ' }}{% endif %}"
)
PLAIN_CHAT = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
EOS_CHAT = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"


def words_tokenizer(*, template: str | None = None, adds: str = "<s> $A", eos: str | None = "</s>") -> Any:
    """A word a token; `adds` is what encoding puts around a text."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="hello"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, chat_template=template)
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    return fast
