"""The training loop: prompts -> sources -> rewards -> reference log-probs -> updates -> metrics, checkpoints."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.evaluation.evaluator import answer_greedily, evaluation_metrics
from gvpo.groups import Group, teaching
from gvpo.models.loading import load_model
from gvpo.models.modes import compiled_layers, disable_dropout, enable_checkpointing
from gvpo.models.score_checks import score_checks, tolerance
from gvpo.models.scoring import Scorer, unwrapped
from gvpo.report.model_card import model_card
from gvpo.sources.dataset import PromptOrder, Row
from gvpo.sources.fill import fill_groups, unrewarded
from gvpo.sources.mixture import arrange
from gvpo.sources.policy import draw_seed
from gvpo.training.checkpoint import Progress, TrainingState, find_checkpoint, is_of_run, prune_checkpoints
from gvpo.training.config import GVPOConfig, dump_config
from gvpo.training.data_checks import check_prompts
from gvpo.training.devices import start_accelerate
from gvpo.training.health import names_seen
from gvpo.training.metrics import members_of, update_metrics
from gvpo.training.optimizer import make_optimizer, make_schedule
from gvpo.training.plan import RewardFuncs, plan_run, support_gap
from gvpo.training.preemption import Sigterm, StopNow, Stopped
from gvpo.training.processes import current_processes
from gvpo.training.refer import Trust, refer
from gvpo.training.reference import Reference, score_groups
from gvpo.training.reporter import Reporter, Stopwatch
from gvpo.training.run_folder import RunFolder, checkpoints, disk, new_folder, remove_folder
from gvpo.training.run_rewards import RolloutRewards, RunRewards
from gvpo.training.run_sources import RunSources, drawn_tokens
from gvpo.training.same_run import RunIdentity
from gvpo.training.samplers import make_sampler
from gvpo.training.update import find_objective, group_gradients


class GVPOTrainer:
    """Trains a causal language model by regression onto rewards (arXiv 2504.19599, Algorithm 1).

    model: a module (trained in place) or anything load_model takes.
    train_dataset: a datasets.Dataset, a list of rows, a list of Groups, or a path; never changed.
    reward_funcs: callables as TRL calls them, "module:function", ready-made names, or a list of these; may be None
        where every row brings its rewards.
    config: a GVPOConfig; the default learns.
    tokenizer: of a model that is given as a module; None where all rows carry token ids.
    eval_dataset: held-out prompts, answered greedily.
    sources: where completions come from: a list of sources as in a config ({"type": "replay", "members": 4}) and of
        objects with `fill(rows, wanted, seeds)` (gvpo.sources.source.Source), or one of them; default the policy.

    After `.train()`: `.model` (the trained module, unwrapped), `.tokenizer`, `.history` (one row per update, as in
    metrics.jsonl), `.save_model(path)`. With one update per rollout and the default reference the log-ratio is always
    zero: beta then only scales the gradient, which Adam undoes, and nothing ties the run to its start.

    Raises UserError, one line, for every mistake of the user's, before weights load where that can be known.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        train_dataset: Any,
        reward_funcs: RewardFuncs = None,
        *,
        config: GVPOConfig | None = None,
        tokenizer: Any | None = None,
        eval_dataset: Any | None = None,
        sources: Any = None,
    ) -> None:
        self.config = config = GVPOConfig() if config is None else config
        if not isinstance(config, GVPOConfig):
            raise UserError(f"config is a {type(config).__name__}; give a GVPOConfig(...)")
        if isinstance(tokenizer, str | Path):
            raise UserError("tokenizer is a path; give the tokenizer itself (AutoTokenizer.from_pretrained(...))")
        self.plan = plan = plan_run(config, model, train_dataset, reward_funcs, eval_dataset, sources)
        self.dataset_name = str(train_dataset) if isinstance(train_dataset, str | Path) else None

        self.accelerator = start_accelerate(config)
        self.processes = current_processes()
        # Files may have grown between two processes' looks at them.
        self.total_updates = self.processes.share(plan.updates)
        self.model: Any = model
        self.tokenizer = tokenizer
        if not isinstance(model, nn.Module):
            self.model, own_tokenizer = load_model(model)
            self.tokenizer = own_tokenizer if tokenizer is None else tokenizer
        checked = (self.tokenizer, self.model, config, plan.mixture.demonstrations)
        check_prompts(plan.rows, plan.eval_rows, *checked, from_file=self.dataset_name is not None)
        if config.disable_dropout:
            disable_dropout(self.model)
        if config.gradient_checkpointing:
            enable_checkpointing(self.model)

        scorer = Scorer(self.model)
        self.scorer, self.optimizer = self.accelerator.prepare(scorer, make_optimizer(scorer, config))
        self.scheduler = make_schedule(self.optimizer.optimizer, config, self.total_updates)
        where: dict[str, Any] = {"storage": config.reference_storage, "folder": config.output_dir}
        self.reference = Reference(plan.reference, self.scorer, **where)
        self.objective = find_objective(config.objective)
        limit = tolerance(scorer, half=config.bf16)
        self.trust = Trust(config.trust_ref_logprobs, self.objective.per_token, limit, self.processes)
        # With one update per rollout the policy is still the one that drew the groups, and its own reference: the
        # log-ratio is zero, nothing needs scoring.
        fresh = config.updates_per_rollout * config.epochs_per_rollout == 1
        self.own_reference = fresh and plan.reference == "rollout"
        earlier = plan.mixture.replay is not None or plan.files is not None
        brought = any(one.old_token_logprobs for row in plan.rows for one in row.completions)
        self.own_rollout = fresh and not earlier and not brought
        self.order = PromptOrder(plan.rows, config.seed, shuffle=config.shuffle_dataset)
        self.sampler = make_sampler(config, self.model, self.tokenizer)
        self.rewards = RunRewards(plan, config, self.processes, self.total_updates)
        self.sources = RunSources(plan, config, self.sampler, self.tokenizer, self.model)
        run = RunIdentity(config, plan.reference, plan.mixture.described(), plan.rows)
        state = (scorer, self.optimizer.optimizer, self.scheduler, self.reference, run, self.sources.stateful)
        self.state = TrainingState(*state)
        self.sigterm = Sigterm()
        self.history: list[dict[str, Any]] = []
        self.stopwatch = Stopwatch()
        self._checked = False

    @property
    def progress(self) -> Progress:
        """Where the run is."""
        return self.state.progress

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, Any]:
        """Run to the last update and save the model. Returns the summary; the model is left in evaluation mode.

        resume_from_checkpoint: True = the newest checkpoint in output_dir, or a checkpoint's folder.
        With an output_dir, in the main thread, SIGTERM has it save a checkpoint and raise Stopped, a SystemExit with
        code 143: gvpo.training.preemption says within which time.
        Raises UserError if the run folder holds another run, a reward function fails, or the disk is full.
        """
        config, started = self.config, time.perf_counter()
        self.sigterm = Sigterm(config.output_dir is not None, at_once=self.processes.count == 1)
        with self.sigterm, compiled_layers(self.model, enabled=config.torch_compile):
            folder, changed = self._open_folder(resume_from_checkpoint)
            self.scorer.train()
            self.optimizer.zero_grad(set_to_none=True)
            span = {"total": self.total_updates, "start": self.progress.update}
            with Reporter(config, folder, self.accelerator, self.history, self.stopwatch, **span) as report:
                if changed:
                    report.note(f"resumed with {'; '.join(changed)} (was -> is)")
                with suppress(StopNow):
                    self._run(report, folder)
                    self.model.eval()
                    return self._finish(folder, time.perf_counter() - started)
                # What StopNow came through is gone by now, and whatever it held with it.
                self.state.roll_back()
                raise Stopped(self.progress.update, self._save_checkpoint(folder))

    def _run(self, report: Reporter, folder: RunFolder) -> None:
        """Update after update, from where the run is to its last."""
        config = self.config
        self.state.set_mark()
        if config.publish_steps:
            # Samplers that follow wait for a first one, and the run for them.
            self._publish(folder)
        if self.progress.update == 0:
            self._say_what_it_cannot_see(report)
        if config.eval_on_start and not self.history:
            report.row({"update": 0, **self._evaluate(report)})
            self.state.set_mark()
        if self.progress.update >= self.total_updates and self.progress.row is None:
            report.note(f"nothing to train: {self.progress.update} of {self.total_updates} updates are done")
        while self.progress.update < self.total_updates or self.progress.row is not None:
            # A row that waits is one of an update whose evaluation was interrupted.
            if self.progress.row is None:
                if self.progress.batch == 0:
                    with self.sigterm.interruptible():
                        rewards = self.rewards.begin(self.progress.update, self._epoch())
                        rows, groups = self._draw(report, rewards)
                        self._reward(unrewarded(rows, groups), rewards)
                    self._keep(report, groups)
                    self._refer(groups)
                    self._remember(rows, groups)
                self._check_scores_once(report)
                self.progress.row = self._update()
                self.state.set_mark()
            self._tell(report, folder, self.progress.row)

    def _tell(self, report: Reporter, folder: RunFolder, row: dict[str, Any]) -> None:
        """An update's row -> evaluation, metrics, checkpoint, published policy, where they are due."""
        config, last = self.config, self.progress.update == self.total_updates
        if self._due(config.eval_steps) or last:
            self.sigterm.look_together(self.processes)
            row = row | self._evaluate(report)
        report.row(row)
        self.progress.row = None
        self.state.set_mark()
        if self._due(config.save_steps):
            self._save_checkpoint(folder)
        if self._due(config.publish_steps):
            self._publish(folder)
        if not last:
            self.sigterm.look_together(self.processes)

    def evaluate(self) -> dict[str, float]:
        """Answer eval_dataset greedily, score it, and return the metrics (eval/...); empty without a dataset."""
        return self._evaluate(None)

    def save_model(self, path: str | Path) -> None:
        """Save the model in safetensors, with tokenizer and model card, as from_pretrained and vLLM load it."""
        if not self.processes.is_main:
            return
        target = Path(path)
        with disk(target):
            self.model.save_pretrained(target)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(target)
            card = model_card(
                base_model=str(getattr(self.model.config, "_name_or_path", "") or ""),
                dataset=self.dataset_name,
                settings=self.config.model_dump(),
                history=self.history,
            )
            (target / "README.md").write_text(card, encoding="utf-8")

    # The arrows of one step, in order.

    def _draw(self, report: Reporter, rewards: RolloutRewards) -> tuple[list[Row], list[Group]]:
        """prompts -> sources -> groups: this process's share of the next rollout, and the rows it was made for.

        Reward functions that run elsewhere begin with a group while the next are drawn.
        """
        config, progress = self.config, self.progress
        self.reference.before_rollout(progress.rollout)
        self.sources.begin(progress.rollout, progress.update)
        with self.stopwatch("rollout"), self._autocast():
            place = (progress.rollout, progress.update)
            whole = self.sources.whole(
                *place, self.processes, report.note, lambda: self.sigterm.look_together(self.processes)
            )
            fresh = self.order.take(progress.position, config.groups_per_rollout - len(whole))
            if self.plan.mixture.draws and not all(row.offline for row in fresh):
                self.sampler.sync()
            rows = self.processes.mine(arrange(whole, fresh, config.updates_per_rollout))
            seeds = [draw_seed(config.seed, progress.rollout, n) for n in range(config.groups_per_rollout)]
            members = (self.sources.members, config.num_generations, self.processes.mine(seeds))
            progress.groups = fill_groups(rows, *members, self.tokenizer, rewards.start)
        progress.position += len(fresh)
        progress.rollout += 1
        progress.generated_tokens += self.processes.total(drawn_tokens(rows, progress.groups))
        return rows, progress.groups

    def _reward(self, groups: list[Group], rewards: RolloutRewards) -> None:
        """groups -> rewards, in place."""
        with self.stopwatch("reward"):
            self.progress.reward_metrics = rewards.fill(groups)

    def _refer(self, groups: list[Group]) -> None:
        """groups -> reference log-probs of every member that is trained on, in place; ratios need the policy's as well.

        Update by update, in the batches that the update will use: equal weights then give log-ratios of exactly zero.
        """
        config, per_token = self.config, self.objective.per_token
        if self.own_reference and (self.own_rollout or not per_token):
            return
        how: dict[str, Any] = {"token_budget": config.token_budget, "share_prefix": config.share_prefix}
        how |= {"processes": self.processes, "per_token": per_token}

        def score(scorer: nn.Module, groups: list[Group]) -> Tensor:
            self.sigterm.look()
            return score_groups(scorer, groups, **how)

        policy = self.scorer if per_token and not self.own_rollout else None
        batches = [self._batch(update) for update in range(config.updates_per_rollout)]
        with self.stopwatch("reference"), self._autocast():
            refer(batches, self.reference, score, self.trust, policy)

    def _remember(self, rows: list[Row], groups: list[Group]) -> None:
        """groups -> replay, those that were made for a prompt of the dataset in this rollout."""
        if self.sources.replay is not None:
            made = [None if row.offline else group for row, group in zip(rows, groups, strict=True)]
            everyones = [group for group in self.processes.interleave(made) if group is not None]
            self.sources.replay.add(everyones)

    def _update(self) -> dict[str, Any]:
        """groups -> score -> weights -> backward -> optimizer. Returns the update's metrics."""
        config, progress = self.config, self.progress
        batch = self._batch(progress.batch)
        learning_rate = self.scheduler.get_last_lr()[0]
        with self.stopwatch("update"):
            gradients = group_gradients(
                self.scorer,
                batch.groups,
                beta=config.beta,
                tokenizer=None,
                token_budget=config.token_budget,
                share_prefix=config.share_prefix,
                objective=self.objective,
                settings={name: getattr(config, name) for name in self.objective.settings},
                # Data-parallel wrappers average gradients over processes: a denominator smaller by their number sums.
                denominator=self.processes.total(len(batch.groups)) / self.processes.count,
                own_reference=self.own_reference,
                own_rollout=self.own_rollout,
                processes=self.processes,
            )
            grad_norm = self._step()
        progress.update += 1
        progress.batch += 1
        if progress.batch == config.updates_per_rollout * config.epochs_per_rollout:
            progress.batch, progress.groups = 0, []
        members = self.processes.interleave(
            members_of(
                batch.groups,
                batch.numbers,
                gradients.logps_N.tolist(),
                gradients.ref_logps_N.tolist(),
                update=progress.update - 1,
            )
        )
        losses = self.processes.interleave([float(gradients.loss)])
        row = {
            "update": progress.update,
            "rollout": progress.rollout,
            "epoch": self._epoch(),
            "learning_rate": learning_rate,
            "generated_tokens": progress.generated_tokens,
            "loss": sum(losses) / len(losses),
            "grad_norm": grad_norm,
            **update_metrics(members, config.beta, self.processes.total(batch.members) - len(members)),
            **self.sources.metrics(),
        }
        if clash := row.keys() & progress.reward_metrics.keys():
            raise UserError(
                f"a reward function's log_metric({min(clash)!r}, ...): the run logs that name itself; rename it"
            )
        return row | progress.reward_metrics

    def _batch(self, number: int) -> Batch:
        """This process's groups of the rollout's update `number` (from 0; epochs repeat them)."""
        config, progress = self.config, self.progress
        start = number % config.updates_per_rollout * config.groups_per_update
        first = (progress.rollout - 1) * config.groups_per_rollout
        mine = self.processes.mine(range(config.groups_per_rollout))
        chosen = [
            (first + n, group)
            for n, group in zip(mine, progress.groups, strict=True)
            if start <= n < start + config.groups_per_update
        ]
        taught = [(n, kept) for n, group in chosen if (kept := teaching(group)) is not None]
        members = sum(group.k for _, group in chosen)
        return Batch([group for _, group in taught], [n for n, _ in taught], members)

    def _step(self) -> float:
        """One optimizer step over the gradients. Returns their norm before clipping.

        After an update without a group there are none: AdamW then leaves weights and moments as they are.
        """
        parameters = [p for p in self.scorer.parameters() if p.requires_grad]
        limit = self.config.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(parameters, limit))  # pyright: ignore[reportArgumentType]
        if not math.isfinite(norm):
            raise UserError(
                f"update {self.progress.update + 1}: the gradient is not finite ({norm}); "
                "lower learning_rate, and check the rewards' scale against beta"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return norm

    # What stands around them.

    def _evaluate(self, report: Reporter | None) -> dict[str, float]:
        if not self.plan.eval_rows:
            return {}
        mine, limit = self.processes.mine(self.plan.eval_rows), self.config.max_completion_length
        with self.sigterm.interruptible():
            with self.stopwatch("evaluation"), self._autocast():
                self.sampler.sync()
                answers = answer_greedily(mine, self.sampler, self.tokenizer, limit)
            logged = self.rewards.begin(self.progress.update, self._epoch()).fill(answers)
        logged = {f"eval/{name}": value for name, value in logged.items()}
        answers = self.processes.interleave(answers)
        if report is not None:
            report.completions(f"eval-{self.progress.update:06d}", answers)
        return logged | evaluation_metrics(answers)

    def _epoch(self) -> float:
        """Passes over the dataset so far; over the files' groups where there is none."""
        if self.plan.rows:
            return self.progress.position / len(self.plan.rows)
        held = self.processes.share(self.sources.files.held if self.sources.files is not None else 0)
        return self.progress.rollout * self.config.groups_per_rollout / max(1, held)

    def _keep(self, report: Reporter, groups: list[Group]) -> None:
        everyones = self.processes.interleave(groups)
        report.completions(f"rollout-{self.progress.rollout:06d}", everyones, show=self.config.num_completions_to_print)

    def _check_scores_once(self, report: Reporter) -> None:
        """Before the first update: refuse a score that differs from itself, and warn of one that depends on the way.

        Two members of one group show what a whole group would, in a forward that fits.
        """
        if self._checked:
            return
        groups = [kept for group in self.progress.groups if (kept := teaching(group)) is not None][:1]
        groups = [replace(group, completions=group.completions[:2]) for group in groups]
        with self._autocast():
            half, share_prefix = self.config.bf16, self.config.share_prefix
            checks = score_checks(unwrapped(self.scorer), groups, half=half, share_prefix=share_prefix)
        self._checked = bool(checks)
        for number, check in enumerate(checks):
            if check.holds:
                continue
            if number == 0:
                raise UserError(
                    f"scoring the same group twice gives log-probs {check.detail}; switch off what is random in the "
                    "model's forward (disable_dropout=True sets dropout rates to 0), or use deterministic kernels"
                )
            report.note(f"warning: {check.name}: {check.detail}")

    def _open_folder(self, resume: bool | str | Path | None) -> tuple[RunFolder, list[str]]:
        """The run's folder, and what has changed in the config since the checkpoint that is gone on from."""
        config, changed = self.config, []
        checkpoint = find_checkpoint(resume, config.output_dir) if resume else None
        goes_on = is_of_run(checkpoint, config.output_dir)
        folder = RunFolder(config.output_dir if self.processes.is_main else None, resume=goes_on)
        self.processes.wait()
        self.reference.start()
        if checkpoint is not None:
            (process,) = self.processes.mine(range(self.processes.count))
            self.history, changed = self.state.load(checkpoint, process)
            self.progress.groups = self.processes.mine(self.progress.groups)
            # What others still read is not to be cut.
            self.processes.wait()
            folder.cut_back(self.progress.update, self.progress.rollout, self.history)
        folder.create(dump_config(config))
        return folder, changed

    def _save_checkpoint(self, folder: RunFolder) -> Path:
        mark = self.state.mark
        groups = self.processes.interleave(mark.progress.groups)
        generators = self.processes.interleave([mark.random])
        target = Path(str(self.config.output_dir)) / "checkpoints" / f"step-{mark.progress.update}"
        if folder.path is not None:
            folder.sync_completions()
            self.state.save(target, groups, generators, self.history)
            prune_checkpoints(checkpoints(folder.path), self.config.save_total_limit)
        self.processes.wait()
        return target

    def _publish(self, folder: RunFolder) -> None:
        """A whole copy of the model for samplers that follow the run; those before the last two go."""
        if folder.path is None:
            return
        with new_folder(folder.path / "policy" / f"update-{self.progress.update:06d}") as model_folder:
            self.save_model(model_folder)
        for old in sorted((folder.path / "policy").glob("update-*"))[:-2]:
            remove_folder(old)

    def _say_what_it_cannot_see(self, report: Reporter) -> None:
        if gap := support_gap(self.config, self.plan.rows, self.plan.mixture):
            report.note(
                f"warning: support: {gap}: the optimum is not unique where the reference can give completions that are "
                "never seen; add a source that draws from all of them, such as {type: policy}"
            )

    def _finish(self, folder: RunFolder, seconds: float) -> dict[str, Any]:
        summary = {"updates": self.progress.update, "seconds": round(seconds, 3), "seed": self.config.seed}
        last = self.history[-1] if self.history else {}
        summary |= {name: last[name] for name in ("reward", "loss", "eval/reward") if name in last}
        summary["warnings"] = names_seen(self.history)
        if folder.path is not None:
            with new_folder(folder.path / "model") as model_folder:
                self.save_model(model_folder)
            folder.write_summary(summary)
        self.processes.wait()
        return summary

    def _due(self, steps: int | None) -> bool:
        return steps is not None and self.progress.update % steps == 0

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.bf16)


@dataclass(frozen=True, slots=True)
class Batch:
    """One update's groups with two rewarded members or more, their numbers in the run, and all members drawn for it."""

    groups: list[Group]
    numbers: list[int]
    members: int
