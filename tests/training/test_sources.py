"""Mixtures of sources through the real trainer: who is in a group, what they are scored with, what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import (
    END,
    first_token,
    letters_tokenizer,
    naive_logprob,
    offline_groups,
    prompts,
    run,
    settings,
    tiny_model,
)

from gvpo.errors import UserError
from gvpo.group_files import read_groups, write_groups
from gvpo.groups import Completion, Group
from gvpo.training.loop import GVPOTrainer
from gvpo.training.processes import OneProcess

POLICY = {"type": "policy"}


@pytest.fixture
def rollouts(monkeypatch: pytest.MonkeyPatch) -> list[list[Group]]:
    """Every rollout's groups, as they are trained on."""
    seen: list[list[Group]] = []
    refer = GVPOTrainer._refer

    def spy(self: GVPOTrainer, groups: list[Group]) -> None:
        refer(self, groups)
        seen.append(groups)

    monkeypatch.setattr(GVPOTrainer, "_refer", spy)
    return seen


def sources_of(group: Group) -> list[str]:
    return sorted(one.source for one in group.completions)


def few_prompts(count: int = 4) -> list[dict[str, Any]]:
    return [{"prompt_ids": [1 + n], "target": n} for n in range(count)]


def test_history_joins_the_group_of_its_prompt(rollouts: list[list[Group]]) -> None:
    replay = {"type": "replay", "members": 2}
    run(tiny_model(), few_prompts(), first_token, sources=[POLICY, replay], num_generations=5, max_steps=6)
    first, second, third = rollouts
    assert all(sources_of(group) == ["policy"] * 5 for group in first)
    assert all(sources_of(group) == ["policy"] * 3 + ["replay"] * 2 for group in [*second, *third])
    drawn: dict[tuple[int, ...], list[Any]] = {}
    for rollout in rollouts:
        for group in rollout:
            earlier = drawn.get(tuple(group.prompt_ids or []), [])
            for one in group.completions:
                if one.source == "replay":
                    assert (one.token_ids, one.reward) in earlier
        for group in rollout:
            own = [(one.token_ids, one.reward) for one in group.completions if one.source == "policy"]
            drawn.setdefault(tuple(group.prompt_ids or []), []).extend(own)


def test_every_member_is_scored_under_the_current_reference(rollouts: list[list[Group]]) -> None:
    """Replayed members were scored before, under other weights: a kept number would show."""
    model = tiny_model()
    moving = {"sources": [POLICY, {"type": "replay", "members": 1, "groups": 1}], "learning_rate": 0.1, "max_steps": 8}
    checked = []
    refer = GVPOTrainer._refer

    def check(self: GVPOTrainer, groups: list[Group]) -> None:
        refer(self, groups)
        for group in groups:
            for one in group.completions:
                expected = naive_logprob(self.model, group.prompt_ids or [], one.token_ids or [])
                assert one.ref_logprob == pytest.approx(expected, abs=1e-4)
                checked.append(one.source)

    GVPOTrainer._refer, before = check, GVPOTrainer._refer
    try:
        run(model, few_prompts(), first_token, reference="rollout", **moving)
    finally:
        GVPOTrainer._refer = before
    assert checked.count("replay") > 20


def test_whole_groups_come_again_in_every_update(rollouts: list[list[Group]]) -> None:
    replay = {"type": "replay", "groups": 2}
    options = {"groups_per_update": 4, "max_steps": 6, "sources": [POLICY, replay]}
    trainer = run(tiny_model(), prompts(40), first_token, **options)
    whole = [[sources_of(group) == ["replay"] * 3 for group in rollout] for rollout in rollouts]
    assert whole[0] == [False] * 8
    assert all(flags == [True, True, False, False] * 2 for flags in whole[1:])
    # Prompts that were replaced by whole groups come later: none is lost.
    fresh = [group.prompt_ids for rollout in rollouts for group in rollout if "policy" in sources_of(group)]
    assert len(fresh) == 8 + 4 + 4 and len({tuple(ids or []) for ids in fresh}) == 16
    assert trainer.progress.position == 16


def test_rewards_of_replayed_members_are_not_asked_for_again(rollouts: list[list[Group]]) -> None:
    asked: list[int] = []

    def counting(completion_ids: Sequence[Any], **columns: Any) -> list[float]:
        asked.append(len(completion_ids))
        return first_token(completion_ids)

    run(tiny_model(), few_prompts(), counting, sources=[POLICY, {"type": "replay", "members": 1}], max_steps=4)
    assert asked == [12, 8]


def test_demonstrations_are_members_with_given_or_computed_rewards(rollouts: list[list[Group]]) -> None:
    rows = [{"prompt": "abc", "answer": "mm"}, {"prompt": "bcd", "answer": None}]
    tokenizer = letters_tokenizer()

    def length(completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    for reward, expected in ((7.5, 7.5), (None, 2.0)):
        rollouts.clear()
        demonstration = {"type": "demonstration", "column": "answer", "reward": reward}
        options = {"tokenizer": tokenizer, "sources": [POLICY, demonstration], "max_steps": 1, "updates_per_rollout": 1}
        history = run(tiny_model(), rows, length, shuffle_dataset=False, **options).history
        with_one, without = rollouts[0]
        assert sources_of(with_one) == ["demonstration", "policy", "policy"] and sources_of(without) == ["policy"] * 3
        (shown,) = [one for one in with_one.completions if one.source == "demonstration"]
        assert (shown.token_ids, shown.reward) == ([12, 12, END], expected)
        assert history[0]["source/demonstration"] == pytest.approx(1 / 6)
        assert history[0]["source/demonstration/reward"] == expected


def test_a_teachers_draws_are_members(rollouts: list[list[Group]], tmp_path: Path) -> None:
    tiny_model(5).save_pretrained(tmp_path / "teacher")
    teacher = {"type": "teacher", "model": str(tmp_path / "teacher"), "members": 2}
    student = tiny_model()
    run(student, prompts(), first_token, sources=[POLICY, teacher], num_generations=4, max_steps=2)
    assert all(sources_of(group) == ["policy"] * 2 + ["teacher"] * 2 for group in rollouts[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_draws_in_the_precision_that_the_policy_draws_in(dtype: str, tmp_path: Path) -> None:
    tiny_model(5).save_pretrained(tmp_path)
    sources = [POLICY, {"type": "teacher", "model": str(tmp_path), "members": 1}]
    config = settings(rollout_dtype=dtype)
    trainer = GVPOTrainer(tiny_model(), prompts(), first_token, config=config, sources=sources)
    members: list[Any] = trainer.sources.members
    assert [source.sampler.dtype for source in members] == [getattr(torch, dtype)] * 2


def test_a_teacher_of_another_tokenizer_gives_text(rollouts: list[list[Group]], tmp_path: Path) -> None:
    tiny_model(5).save_pretrained(tmp_path / "teacher")
    other = letters_tokenizer()
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "teacher")
    teacher = {"type": "teacher", "model": str(tmp_path / "teacher"), "members": 3}
    data = [{"prompt": "abc"}]
    reference = {"reference": "initial", "tokenizer": letters_tokenizer(), "max_steps": 1, "updates_per_rollout": 1}
    run(tiny_model(), data, first_token, sources=teacher, groups_per_update=1, **reference)
    for one in rollouts[0][0].completions:
        assert one.token_ids == [*letters_tokenizer().encode(one.text or ""), *([] if one.truncated else [END])]


def test_files_alone_need_no_dataset(rollouts: list[list[Group]], tmp_path: Path) -> None:
    groups = offline_groups(9)
    for n, group in enumerate(groups):
        group.id = f"g{n}"
    write_groups(groups, tmp_path / "a.jsonl")
    source = {"type": "files", "path": str(tmp_path), "uses": 2}
    trainer = run(tiny_model(), None, sources=source, max_steps=None)
    assert trainer.plan.reference == "initial"
    # 18 uses make 4 rollouts of 4 groups; what is left over makes no rollout.
    assert [[group.id for group in rollout] for rollout in rollouts] == [
        # A rollout's groups are dealt out to its two updates in turn.
        ["g0", "g2", "g1", "g3"],
        ["g4", "g6", "g5", "g7"],
        ["g8", "g1", "g0", "g2"],
        ["g3", "g5", "g4", "g6"],
    ]
    assert trainer.history[-1]["epoch"] == pytest.approx(16 / 9)


def test_all_processes_look_up_while_the_main_one_waits_for_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waited in a single exchange would run into its time limit, and no SIGTERM would reach it."""
    monkeypatch.setattr("gvpo.training.run_sources.LOOK_AGAIN", 0.0)
    files = {"type": "files", "path": str(tmp_path), "follow": True}
    trainer = GVPOTrainer(tiny_model(), None, config=settings(max_steps=2), sources=[files])
    told: list[Any] = []

    class Main(OneProcess):
        def share(self, value: Any) -> Any:
            told.append(value)
            return value

    class Other(OneProcess):
        is_main = False

        def share(self, value: Any) -> Any:
            return told.pop(0)

    looks = iter(range(9))

    def look() -> None:
        if next(looks) == 1:
            write_groups(offline_groups(4), tmp_path / "a.jsonl")

    rows = trainer.sources.whole(0, 0, Main(), print, look)
    assert len(rows) == 4 and told == [True, True, False, rows]
    seen: list[int] = []
    assert trainer.sources.whole(0, 0, Other(), print, lambda: seen.append(1)) == rows
    assert len(seen) == 2 and told == []


def test_files_beside_the_policy(rollouts: list[list[Group]], tmp_path: Path) -> None:
    write_groups(offline_groups(3), tmp_path / "a.jsonl")
    sources = [POLICY, {"type": "files", "path": str(tmp_path), "groups": 1}]
    run(tiny_model(), prompts(40), first_token, sources=sources, max_steps=4)
    kinds = [[sources_of(group)[0] for group in rollout] for rollout in rollouts]
    assert kinds == [["dataset", "policy"] * 2, ["dataset", "policy", "policy", "policy"]]


def test_what_a_file_calls_the_policys_is_told_apart_and_not_called_fresh(tmp_path: Path) -> None:
    groups = offline_groups(4)
    for group in groups:
        group.completions[0].source, group.completions[1].source = "policy", "teacher"
        group.completions[0].meta["update"] = -3
    write_groups(groups, tmp_path / "a.jsonl")
    sources = [POLICY, {"type": "files", "path": str(tmp_path), "groups": 1}]
    row = run(tiny_model(), prompts(), first_token, sources=sources, max_steps=1).history[0]
    assert {name for name in row if name.count("/") == 1 and name.startswith("source/")} == {
        f"source/{name}" for name in ("policy", "files", "teacher", "dataset")
    }
    # Three draws of this run, fresh, and one member of the file's first group.
    assert row["staleness/mean"] == pytest.approx(3 / 4) and row["staleness/max"] == 3


def test_groups_of_files_without_rewards_get_them(tmp_path: Path) -> None:
    groups = offline_groups(4)
    for group in groups[:2]:
        for one in group.completions:
            one.reward = None
    write_groups(groups, tmp_path / "a.jsonl")
    source = {"type": "files", "path": str(tmp_path)}
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: no rewards, and no reward function"):
        run(tiny_model(), None, sources=source, max_steps=2)
    history = run(tiny_model(), None, first_token, sources=source, max_steps=2).history
    assert history[0]["rewards/first_token/mean"] > 0


def test_groups_made_by_another_tokenizer_are_refused(tmp_path: Path) -> None:
    members = [Completion("ab", [0, 1, END], reward=1.0), Completion("cd", [7, 8, END], reward=0.0)]
    write_groups([Group("abc", members, prompt_ids=[0, 1, 2])] * 4, tmp_path / "a.jsonl")
    source = {"type": "files", "path": str(tmp_path)}
    with pytest.raises(UserError, match=r"line 1, field 'completions\[1\].token_ids'.*'cd' as text.*another token"):
        run(tiny_model(), None, sources=source, tokenizer=letters_tokenizer(), max_steps=2)
    members[1].token_ids = [40, END]
    write_groups([Group("abc", members, prompt_ids=[0, 1, 2])] * 4, tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="token id 40 is outside the model's vocabulary of 16"):
        run(tiny_model(), None, sources=source, tokenizer=letters_tokenizer(), max_steps=2)


def test_files_that_end_early_are_one_line(tmp_path: Path) -> None:
    write_groups(offline_groups(5), tmp_path / "a.jsonl")
    source = {"type": "files", "path": str(tmp_path)}
    with pytest.raises(UserError, match="holds 5 groups, enough for 2 updates"):
        GVPOTrainer(tiny_model(), None, config=settings(max_steps=4), sources=source)
    with pytest.raises(UserError, match="config, field 'max_steps': missing; a folder that is followed has no end"):
        GVPOTrainer(tiny_model(), None, config=settings(max_steps=None), sources={**source, "follow": True})


def test_a_followed_folder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = offline_groups(8)
    write_groups(groups[:5], tmp_path / "a.jsonl")
    looks = []

    def arrive(seconds: float) -> None:
        looks.append(seconds)
        write_groups(groups[5 + len(looks) : 6 + len(looks)], tmp_path / f"b-{len(looks)}.jsonl")

    monkeypatch.setattr("gvpo.training.run_sources.time.sleep", arrive)
    source = {"type": "files", "path": str(tmp_path), "follow": True}
    write_groups(groups[5:6], tmp_path / "b-0.jsonl")
    history = run(tiny_model(), None, sources=source, max_steps=4).history
    assert len(history) == 4 and len(looks) == 2


@pytest.mark.parametrize("reference", ["rollout", 2])
def test_a_moving_reference_on_files_has_no_anchor(tmp_path: Path, reference: Any) -> None:
    write_groups(offline_groups(4), tmp_path / "a.jsonl")
    source = {"type": "files", "path": str(tmp_path)}
    with pytest.raises(UserError, match="has no anchor"):
        GVPOTrainer(tiny_model(), None, config=settings(reference=reference), sources=source)


def test_what_metrics_say_of_sources() -> None:
    replay = {"type": "replay", "members": 1}
    history = run(tiny_model(), few_prompts(), first_token, sources=[POLICY, replay], max_steps=4).history
    before, after = history[1], history[2]
    assert before["source/policy"] == 1 and "source/policy/reward" not in before
    assert after["source/policy"] == pytest.approx(2 / 3) and after["source/replay"] == pytest.approx(1 / 3)
    assert after["source/policy/weight"] + after["source/replay/weight"] == pytest.approx(1)
    shares = [after[f"source/{name}"] * after[f"source/{name}/reward"] for name in ("policy", "replay")]
    assert after["reward"] == pytest.approx(sum(shares))
    # Drawn after update 0, used in update 3, that is, when two were done.
    assert after["staleness/max"] == 2 and after["staleness/mean"] == pytest.approx(2 / 3)
    assert before["replay/groups"] == 4 and after["replay/groups"] == 8


def test_generated_tokens_are_those_that_were_drawn(rollouts: list[list[Group]]) -> None:
    replay = {"type": "replay", "members": 1, "groups": 1}
    history = run(tiny_model(), few_prompts(), first_token, sources=[POLICY, replay], max_steps=4).history
    drawn = [
        sum(len(one.token_ids or []) for group in rollout for one in group.completions if one.source == "policy")
        for rollout in rollouts
    ]
    assert [row["generated_tokens"] for row in history] == [drawn[0]] * 2 + [sum(drawn)] * 2


@pytest.mark.parametrize(
    ("data", "sources", "options", "expected"),
    [
        ("prompts", None, {}, False),
        ("prompts", None, {"top_k": 5}, True),
        ("prompts", None, {"temperature": 0.7}, False),
        ("groups", None, {}, True),
        ("prompts", [POLICY, {"type": "replay", "members": 1}], {"top_p": 0.9}, True),
    ],
)
def test_a_mixture_that_cannot_see_everything_says_so(
    data: str, sources: Any, options: dict[str, Any], expected: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = prompts() if data == "prompts" else offline_groups(4)
    options = {"disable_tqdm": False, "max_steps": 1, "sources": sources, **options}
    run(tiny_model(), rows, first_token, **options)
    assert ("warning: support:" in capsys.readouterr().out) == expected


def test_a_demonstration_longer_than_the_limit(tmp_path: Path) -> None:
    rows = [{"prompt": "abc", "answer": "a" * 4}]
    source = [POLICY, {"type": "demonstration", "column": "answer", "reward": 1}]
    with pytest.raises(UserError, match="row 1, field 'answer': a demonstration of 5 tokens is longer than max_compl"):
        run(tiny_model(), rows, first_token, tokenizer=letters_tokenizer(), sources=source)


def test_demonstrations_that_nobody_has_or_nobody_scores() -> None:
    source = [POLICY, {"type": "demonstration", "column": "anwser"}]
    with pytest.raises(UserError, match="field 'anwser': neither this row nor any other has a demonstration there"):
        GVPOTrainer(tiny_model(), few_prompts(), first_token, config=settings(), sources=source)


def test_replayed_groups_reach_the_run_folder(tmp_path: Path) -> None:
    replay = {"type": "replay", "members": 1}
    options = {"output_dir": str(tmp_path), "max_steps": 4, "sources": [POLICY, replay]}
    run(tiny_model(), few_prompts(), first_token, **options)
    again = list(read_groups(tmp_path / "completions" / "rollout-000002.jsonl"))
    assert all(sources_of(group) == ["policy", "policy", "replay"] for group in again)
    assert all(one.meta["update"] == 0 for group in again for one in group.completions if one.source == "replay")
