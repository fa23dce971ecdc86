"""Another model's completions as members of the group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gvpo.groups import Completion
from gvpo.models.encoding import encode_prompt
from gvpo.models.loading import load_model
from gvpo.sampling.sampler import Sample, Sampler, SamplingParams
from gvpo.sampling.torch_sampler import make_torch_sampler
from gvpo.sources.dataset import Row
from gvpo.sources.policy import draw, draw_seed
from gvpo.sources.source import prompt_ids
from gvpo.sources.specs import TeacherSpec


@dataclass(frozen=True)
class TeacherSource:
    """Draws of another model. With the policy's own vocabulary its token ids are kept; else its text is, and is read
    by the policy's tokenizer.

    tokenizer: the policy's; teacher_tokenizer: the other model's, None where it reads the policy's ids.
    """

    spec: TeacherSpec
    sampler: Sampler
    params: SamplingParams
    tokenizer: Any | None
    teacher_tokenizer: Any | None

    def fill(self, rows: Sequence[Row], wanted: Sequence[int], seeds: Sequence[int]) -> list[list[Completion]]:
        """spec.members and wanted[i] draws at most for row i."""
        prompts = [self._prompt(row) for row in rows]
        counts = [min(self.spec.members, count) for count in wanted]
        drawn: list[list[Sample]] = [[] for _ in rows]
        own_seeds = [draw_seed(seed, 1) for seed in seeds]
        draw(self.sampler, prompts, counts, self.params, own_seeds, drawn.__setitem__)
        return [[self._completion(one.token_ids, one.truncated) for one in samples] for samples in drawn]

    def _prompt(self, row: Row) -> list[int]:
        if self.teacher_tokenizer is None:
            return prompt_ids(row, self.tokenizer)
        assert row.prompt is not None, "checked when the run began"
        return encode_prompt(row.prompt, self.teacher_tokenizer)

    def _completion(self, token_ids: list[int], truncated: bool) -> Completion:
        if self.teacher_tokenizer is None:
            return Completion(None, token_ids, source="teacher", truncated=truncated)
        text = self.teacher_tokenizer.decode(token_ids, skip_special_tokens=True)
        return Completion(text, source="teacher", truncated=truncated)


def load_teacher(
    spec: TeacherSpec, tokenizer: Any | None, device: Any, max_new_tokens: int, rollout_dtype: str
) -> TeacherSource:
    """The source that a config names, its model loaded, frozen, on `device`.

    max_new_tokens, rollout_dtype: the run's max_completion_length and rollout_dtype.
    Raises UserError as load_model does.
    """
    model, own = load_model(spec.model, device=device)
    model.requires_grad_(False).eval()
    params = SamplingParams(max_new_tokens, spec.temperature, spec.top_p, spec.top_k)
    same = tokenizer is None or own is None or own.get_vocab() == tokenizer.get_vocab()
    sampler = make_torch_sampler(model, own, rollout_dtype)
    return TeacherSource(spec, sampler, params, tokenizer, None if same else own)
