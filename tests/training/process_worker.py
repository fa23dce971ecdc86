"""Runs that are made by one process (by the test) and by two (by torchrun), to be compared.

torchrun --nproc_per_node 2 process_worker.py FOLDER leaves in FOLDER, for every scenario, its weights and its story.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from interruptions import POINTS, strike, trainer_in
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from training_helpers import first_token, offline_groups, prompts, same_weights, settings, tiny_model, weights

from gvpo.group_files import write_groups
from gvpo.groups import Group
from gvpo.models.scoring import Scorer
from gvpo.training import update
from gvpo.training.loop import GVPOTrainer
from gvpo.training.preemption import Stopped
from gvpo.training.processes import OneProcess
from gvpo.training.reference import score_groups
from gvpo.training.update import accumulate_gradients


def some_without(groups: list[Group]) -> list[Group]:
    """Ragged groups, some of whose members have no reward; of one, none but a single one has."""
    groups[1].completions[0].reward = None
    groups[4].completions[1].reward = None
    for completion in groups[5].completions[1:]:
        completion.reward = None
    return groups


def opinionated(
    completion_ids: Sequence[Sequence[int]], target: list[int], log_metric: Any, **kwargs: Any
) -> list[Any]:
    """No opinion on some members, and none on the whole of some groups."""
    log_metric("mean_length", sum(map(len, completion_ids)) / len(completion_ids))
    return [
        None if ids[0] % 5 == 0 or where == 3 else reward
        for ids, where, reward in zip(completion_ids, target, first_token(completion_ids), strict=True)
    ]


def stale(folder: Path) -> GVPOTrainer:
    """Log-ratios of many nats, small batches, 3 groups an update: shares of 2 and 1."""
    data = some_without(offline_groups(9, sizes=(3, 2, 5, 1, 4)))
    config = settings(groups_per_update=3, max_steps=7, learning_rate=3e-2, beta=0.02, token_budget=20)
    return GVPOTrainer(tiny_model().double(), data, config=config)


def split_groups(folder: Path) -> GVPOTrainer:
    """No group fits one forward."""
    data = some_without(offline_groups(9, sizes=(5, 4)))
    config = settings(max_steps=5, learning_rate=3e-2, token_budget=12, share_prefix=False, epochs_per_rollout=2)
    return GVPOTrainer(tiny_model().double(), data, config=config)


def sampled(folder: Path) -> GVPOTrainer:
    """Draws, rewards, evaluation, a moving reference."""
    config = settings(groups_per_update=3, max_steps=6, reference=2, eval_steps=2, eval_on_start=True)
    model = tiny_model().double()
    return GVPOTrainer(model, prompts(13), opinionated, config=config, eval_dataset=prompts(5))


def elsewhere(folder: Path) -> GVPOTrainer:
    """Rewards from processes that crash: each of the run's has its own."""
    config = settings(groups_per_update=3, max_steps=4)
    return GVPOTrainer(tiny_model().double(), prompts(7), "crashing_reward:first_or_crash", config=config)


def mixed(folder: Path) -> GVPOTrainer:
    """History, whole groups that are replayed, and groups from files, stale all of them."""
    write_groups(offline_groups(5), folder / "groups.jsonl")
    files = {"type": "files", "path": str(folder / "groups.jsonl"), "groups": 1, "uses": 3}
    replay = {"type": "replay", "members": 1, "groups": 1, "capacity": 7}
    config = settings(groups_per_update=5, max_steps=10, learning_rate=3e-2, num_generations=4, reference="initial")
    sources = [{"type": "policy"}, replay, files]
    return GVPOTrainer(tiny_model().double(), prompts(3), opinionated, config=config, sources=sources)


def idle(folder: Path) -> GVPOTrainer:
    """One group an update: the other process has nothing to do; an update on a group without rewards is empty."""
    config = settings(groups_per_update=1, max_steps=6, reference="initial", shuffle_dataset=False)
    return GVPOTrainer(tiny_model().double(), prompts(5), opinionated, config=config)


def saving(folder: Path) -> GVPOTrainer:
    """A run folder, with checkpoints within a rollout."""
    output = folder / "run"
    config = settings(
        groups_per_update=3,
        max_steps=6,
        reference="initial",
        save_steps=3,
        output_dir=str(output),
        report_to="tensorboard",
    )
    return GVPOTrainer(tiny_model().double(), prompts(7), first_token, config=config)


def going_on(folder: Path) -> GVPOTrainer:
    """The run of `saving`, from within its first rollout."""
    config = settings(groups_per_update=3, max_steps=6, reference="initial")
    trainer = GVPOTrainer(tiny_model(8).double(), prompts(7), first_token, config=config)
    checkpoint = folder / "run" / "checkpoints" / "step-3"
    trainer.train = partial(trainer.train, checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
    return trainer


def adapter(folder: Path) -> GVPOTrainer:
    """Switched off, and on again, under the wrapper that exchanges its gradients."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).double()
    config = settings(groups_per_update=3, max_steps=7, learning_rate=0.1, reference="initial", token_budget=20)
    return GVPOTrainer(model, some_without(offline_groups(9, sizes=(3, 2, 5, 1, 4))), config=config)


def on_disk(folder: Path) -> GVPOTrainer:
    """A snapshot in a file for each process."""
    options = {"reference": 2, "reference_storage": "disk", "output_dir": str(folder / "disk")}
    config = settings(groups_per_update=3, max_steps=8, **options)
    return GVPOTrainer(tiny_model().double(), prompts(13), first_token, config=config)


def trusted(folder: Path) -> GVPOTrainer:
    """Half of the batches bring their reference log-probs; of the others one process's share does, or some of it."""
    groups = offline_groups(12, sizes=(3, 2, 4))
    how = {"token_budget": None, "share_prefix": True, "processes": OneProcess()}
    scores = iter(score_groups(Scorer(tiny_model().double()), groups, **how).tolist())
    for number, group in enumerate(groups):
        for place, completion in enumerate(group.completions):
            score = next(scores)
            if number not in (3, 10) or place:
                completion.ref_logprob = score + 5e-4
    options = {"trust_ref_logprobs": True, "shuffle_dataset": False, "learning_rate": 3e-2}
    config = settings(groups_per_update=3, max_steps=8, **options)
    return GVPOTrainer(tiny_model().double(), groups, config=config)


def single_precision(folder: Path) -> GVPOTrainer:
    """As anybody would run it."""
    config = settings(groups_per_update=3, max_steps=4, learning_rate=1e-3)
    return GVPOTrainer(tiny_model(), prompts(13), first_token, config=config)


SCENARIOS: dict[str, Callable[[Path], GVPOTrainer]] = {
    scenario.__name__: scenario
    for scenario in (
        stale,
        split_groups,
        sampled,
        elsewhere,
        mixed,
        idle,
        saving,
        going_on,
        adapter,
        on_disk,
        trusted,
        single_precision,
    )
}


def story(trainer: GVPOTrainer) -> dict[str, Any]:
    """Train, and tell: the rows of metrics, the completions of every rollout, each process's number of batches."""
    rollouts: list[Any] = []
    batches: list[int] = []
    keep, plan = trainer._keep, update.plan_scoring

    def keeping(report: Any, groups: list[Group]) -> None:
        everyones = trainer.processes.interleave(groups)
        rollouts.append([[group.prompt_ids, [c.token_ids for c in group.completions]] for group in everyones])
        keep(report, groups)

    def planning(*args: Any) -> Any:
        made = plan(*args)
        batches.append(len(made))
        return made

    trainer._keep = keeping  # pyright: ignore[reportAttributeAccessIssue]
    update.plan_scoring = planning
    try:
        trainer.train()
    finally:
        update.plan_scoring = plan
    return {
        "world_size": trainer.processes.count,
        "history": trainer.history,
        "rollouts": rollouts,
        "batches": gather_object([batches]),
    }


def wrapped_gradient(rank: int | None) -> torch.Tensor:
    """The gradient of ragged groups through DistributedDataParallel, or (rank None) of all of them in one process.

    The second process has one group and one batch, the first has four groups, some in several batches.
    """
    groups = offline_groups(5, sizes=(3, 2, 5, 4))
    for number, completion in enumerate(completion for group in groups for completion in group.completions):
        completion.ref_logprob = -20.0 + 3 * (number % 7)
    model = tiny_model().double()
    options = {"beta": 0.1, "token_budget": 14, "share_prefix": False}
    if rank is None:
        accumulate_gradients(model, groups, **options)
    else:
        wrapped = DistributedDataParallel(Scorer(model))
        mine = groups[4:] if rank else groups[:4]
        accumulate_gradients(wrapped, mine, denominator=len(groups) / 2, **options)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Killed(BaseException):
    """Stands in for a kill, in all processes at once."""


def interrupted(folder: Path) -> dict[str, Any]:
    """The run `two-whole`, and two that were interrupted and gone on with: `two-killed`, and `two-stopped` by SIGTERM.

    Every process draws its own noise. The run that is told to stop is told in the second process alone, while it draws
    its rewards for the second rollout. Returns what each process says of it.
    """
    rank, options = torch.distributed.get_rank(), {"save_steps": 3}
    trainer_in(folder / "two-whole", process=rank, **options).train()

    trainer = trainer_in(folder / "two-killed", process=rank, **options)

    def die() -> None:
        raise Killed

    undo = strike(POINTS["backward"](trainer), 5, die)
    with suppress(Killed):
        trainer.train()
    undo()

    trainer = trainer_in(folder / "two-stopped", process=rank, **options)
    undo = (lambda: None) if rank == 0 else strike(POINTS["reward"](trainer), 10, terminate)
    told = {"updates": [], "codes": []}
    try:
        trainer.train()
    except Stopped as stopped:
        told = {"updates": gather_object([stopped.update]), "codes": gather_object([stopped.code])}
    undo()

    for name in ("two-killed", "two-stopped"):
        trainer_in(folder / name, seed=5, process=rank, **options).train(resume_from_checkpoint=True)
    return told


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    """Every scenario, in all processes of this launch."""
    for name, scenario in SCENARIOS.items():
        trainer = scenario(folder)
        told = story(trainer)
        mine = weights(trainer.model)
        everyones = gather_object([mine])
        assert torch.distributed.get_world_size() == told["world_size"]
        told["in_step"] = all(same_weights(mine, other) for other in everyones)
        if trainer.processes.is_main:
            save_file(mine, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(told))
    rank = torch.distributed.get_rank()
    told = interrupted(folder)
    if rank == 0:
        (folder / "stopped.json").write_text(json.dumps(told))
    save_file({"gradient": wrapped_gradient(rank)}, folder / f"gradient-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Wrappers in reference cycles hold the group: one that outlives it is torn down at exit, with its threads running.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
