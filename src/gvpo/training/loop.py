"""The training loop: prompts -> sources -> rewards -> reference log-probs -> updates -> metrics, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerState, get_scheduler

from gvpo.errors import UserError
from gvpo.evaluation.evaluator import answer_greedily, evaluation_metrics, score_answers
from gvpo.groups import Group
from gvpo.models.encoding import encode_groups, end_token_ids, tokenized
from gvpo.models.loading import check_model, load_model
from gvpo.models.modes import disable_dropout
from gvpo.models.scoring import Scorer, plan_scoring
from gvpo.report.model_card import model_card
from gvpo.report.terminal import Progress as ProgressDisplay
from gvpo.report.terminal import completions_table
from gvpo.rewards.fill import fill_rewards
from gvpo.rewards.resolve import resolve_rewards
from gvpo.sampling.sampler import SamplingParams
from gvpo.sampling.torch_sampler import TorchSampler
from gvpo.sources.dataset import PromptOrder, Row, read_rows
from gvpo.sources.policy import PolicySource, Source, draw_seed
from gvpo.training.checkpoint import Progress, load_checkpoint, prune_checkpoints, save_checkpoint
from gvpo.training.config import GVPOConfig, dump_config
from gvpo.training.data_checks import check_columns, check_prompts, check_rewards
from gvpo.training.metrics import members_of, update_metrics
from gvpo.training.plan import choose_reference, planned_updates
from gvpo.training.processes import Processes, check_trackers
from gvpo.training.reference import Reference
from gvpo.training.run_folder import RunFolder, disk
from gvpo.training.startup import check_scores
from gvpo.training.update import Targets, backpropagate, find_objective


class GVPOTrainer:
    """Trains a causal language model by regression onto rewards (arXiv 2504.19599, Algorithm 1).

    model: a module (trained in place; .model is it) or anything load_model takes. train_dataset: a datasets.Dataset, a
    list of rows, a list of Groups, or a path; never mutated. reward_funcs: callables as TRL calls them,
    "module:function", ready-made names, or a list; may be None where every row brings its rewards. tokenizer: of a
    model that is given as a module; None where rows carry prompt_ids. eval_dataset: held-out prompts, answered
    greedily. sources: what draws completions for rows without; default the policy itself.
    Raises UserError, one line, for every mistake of the user's, before weights load where that can be known.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        train_dataset: Any,
        reward_funcs: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None = None,
        *,
        config: GVPOConfig | None = None,
        tokenizer: Any | None = None,
        eval_dataset: Any | None = None,
        sources: Source | None = None,
    ) -> None:
        self.config = config = config or GVPOConfig()
        self.reward_functions = [] if reward_funcs is None else resolve_rewards(reward_funcs)
        rows = read_rows(train_dataset, prompt_column=config.prompt_column, name="train_dataset")
        self.eval_rows: list[Row] = []
        if eval_dataset is not None:
            self.eval_rows = read_rows(eval_dataset, prompt_column=config.prompt_column, name="eval_dataset")
        check_rewards(rows, self.eval_rows, self.reward_functions, config.reward_weights)
        _check_settings(config, rows, self.eval_rows)
        reference = choose_reference(config, rows)
        if not isinstance(model, nn.Module):
            check_model(model)
        if reference not in ("rollout", "initial") and isinstance(reference, str):
            check_model(reference)

        _reset_accelerate()
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.bf16 else "no",
            log_with=[*config.trackers] or None,
            project_dir=config.output_dir,
        )
        self.processes = Processes(self.accelerator)
        self.model: Any
        self.tokenizer = tokenizer
        if isinstance(model, nn.Module):
            self.model = model
        else:
            self.model, loaded = load_model(model)
            self.tokenizer = tokenizer if tokenizer is not None else loaded
        check_prompts(rows, self.eval_rows, self.tokenizer, self.model, config)
        if config.disable_dropout:
            disable_dropout(self.model)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

        self.order = PromptOrder(rows, config.seed, shuffle=config.shuffle_dataset)
        self.total_updates = planned_updates(config, len(rows))
        self.scorer, self.optimizer, self.scheduler = self._prepare()
        dtype = next(self.model.parameters()).dtype
        self.reference = Reference(reference, self.scorer, self.accelerator.device, dtype)
        self.sampler = TorchSampler(self.model, end_token_ids(self.model, self.tokenizer))
        params = SamplingParams(config.max_completion_length, config.temperature, config.top_p, config.top_k)
        self.source = sources or PolicySource(self.sampler, self.tokenizer, config.num_generations, params)
        # With one update per rollout the policy is its own reference: the log-ratio is zero, nothing needs scoring.
        self.own_reference = reference == "rollout" and config.updates_per_rollout * config.epochs_per_rollout == 1
        self.progress = Progress()
        self.history: list[dict[str, Any]] = []
        self._checked = False
        self._seconds: dict[str, float] = {}

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, Any]:
        """Run to the last update and save the model. Returns the summary; .history has a row an update.

        resume_from_checkpoint: True = the newest checkpoint in output_dir, or a checkpoint's folder.
        Raises UserError if the run folder holds another run, a reward function fails, or the disk is full.
        """
        config, started = self.config, time.perf_counter()
        folder = self._open_folder(resume_from_checkpoint)
        self.scorer.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._display() as display:
            if config.eval_on_start and self.progress.update == 0:
                self._log(folder, display, {"update": 0, **self.evaluate(folder)})
            while self.progress.update < self.total_updates:
                if self.progress.batch == 0:
                    rows, groups = self._draw()
                    self._reward(rows, groups)
                    self._keep_completions(folder, display, groups)
                    self._check_once(groups, display)
                    self.progress.groups = groups
                    self._refer()
                row = self._update()
                if self._due(config.eval_steps) or (self.eval_rows and self.progress.update == self.total_updates):
                    row |= self.evaluate(folder)
                self._log(folder, display, row)
                if self._due(config.save_steps):
                    self._save_checkpoint(folder)
        self.model.eval()
        return self._finish(folder, time.perf_counter() - started)

    def evaluate(self, folder: RunFolder | None = None) -> dict[str, float]:
        """Answer eval_dataset greedily, score it, and return the metrics (eval/...); empty without a dataset."""
        mine = self.processes.mine(self.eval_rows)
        with self._timed("evaluation"), self.accelerator.autocast():
            answers = answer_greedily(mine, self.sampler, self.tokenizer, self.config.max_completion_length)
        score_answers(answers, self.reward_functions, self.config.reward_weights, trainer_state=self._trainer_state())
        answers = self.processes.interleave(answers)
        if folder is not None and self.processes.is_main and answers:
            folder.write_completions(f"eval-{self.progress.update:06d}", answers)
        return evaluation_metrics(answers) if answers else {}

    def save_model(self, path: str | Path) -> None:
        """Save the model in safetensors, with tokenizer and model card, as from_pretrained and vLLM load it."""
        if not self.processes.is_main:
            return
        target = Path(path)
        with disk(target):
            self.model.save_pretrained(target)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(target)
            name = str(getattr(self.model.config, "_name_or_path", "") or "")
            card = model_card(base_model=name, config=self.config, history=self.history, dataset=None)
            (target / "README.md").write_text(card, encoding="utf-8")

    # The arrows of one step, in order.

    def _draw(self) -> tuple[list[Row], list[Group]]:
        """prompts -> sources -> groups: this process's share of the next rollout."""
        progress, count = self.progress, self.config.groups_per_rollout
        self.reference.before_rollout(progress.rollout)
        rows = self.processes.mine(self.order.take(progress.position, count))
        seeds = self.processes.mine([draw_seed(self.config.seed, progress.rollout, n) for n in range(count)])
        sampled = [n for n, row in enumerate(rows) if not row.offline]
        with self._timed("rollout"), self.accelerator.autocast():
            drawn = self.source.fill([rows[n] for n in sampled], [seeds[n] for n in sampled]) if sampled else []
        by_place = dict(zip(sampled, drawn, strict=True))
        groups = [
            tokenized(by_place[n] if n in by_place else row.group(), self.tokenizer) for n, row in enumerate(rows)
        ]
        progress.position += count
        progress.rollout += 1
        return rows, groups

    def _reward(self, rows: list[Row], groups: list[Group]) -> None:
        """groups -> rewards, in place."""
        with self._timed("reward"):
            logged = fill_rewards(
                groups,
                [row.has_rewards for row in rows],
                self.reward_functions,
                self.config.reward_weights,
                trainer_state=self._trainer_state(),
            )
        self.progress.reward_metrics = self.processes.mean(logged)

    def _refer(self) -> None:
        """groups -> reference log-probs of every member that is trained on, in place.

        Update by update, in the batches that the update will use: equal weights then give log-ratios of exactly zero.
        """
        if self.own_reference:
            return
        config = self.config
        with self._timed("reference"):
            for batch in range(config.updates_per_rollout):
                teaching = _teaching(self._batch(batch)[1])
                with self.accelerator.autocast():
                    logps_N = self.reference.logprobs(
                        teaching, self.tokenizer, config.token_budget, config.share_prefix, self.processes
                    )
                members = (completion for group in teaching for completion in group.completions)
                for completion, logp in zip(members, logps_N.tolist(), strict=True):
                    completion.ref_logprob = logp

    def _update(self) -> dict[str, Any]:
        """groups -> score -> weights -> backward -> optimizer. Returns the update's metrics."""
        config, progress = self.config, self.progress
        numbers, groups = self._batch(progress.batch)
        teaching = _teaching(groups)
        count = self.processes.total(len(teaching))
        learning_rate = self.scheduler.get_last_lr()[0]
        with self._timed("update"):
            encoded = encode_groups(teaching, self.tokenizer)
            plan = plan_scoring(self.scorer, encoded, config.token_budget, config.share_prefix)
            targets = Targets.of(teaching, self.accelerator.device, own_reference=self.own_reference)
            # Data-parallel wrappers average gradients over processes: a denominator smaller by their number sums.
            logps_N, loss = backpropagate(
                self.scorer,
                encoded,
                plan,
                targets,
                find_objective(config.objective),
                config.beta,
                count / self.processes.count,
                self.processes,
            )
            grad_norm = self._step()
        progress.update += 1
        progress.batch += 1
        refs_N = logps_N if targets.ref_logps_N is None else targets.ref_logps_N
        taught = [number for number, group in zip(numbers, groups, strict=True) if len(_rewarded(group)) >= 2]
        members = members_of(teaching, taught, logps_N.tolist(), refs_N.tolist())
        members = self.processes.interleave(members)
        losses = self.processes.interleave([float(loss)])
        dropped = self.processes.total(sum(len(group.completions) for group in groups)) - len(members)
        if progress.batch == config.updates_per_rollout * config.epochs_per_rollout:
            progress.batch, progress.groups = 0, []
        row = {
            "update": progress.update,
            "rollout": progress.rollout,
            "epoch": progress.position / len(self.order.rows),
            "learning_rate": learning_rate,
            "loss": sum(losses) / len(losses),
            "grad_norm": grad_norm,
            **update_metrics(members, config.beta, dropped),
        }
        if clash := row.keys() & progress.reward_metrics.keys():
            raise UserError(
                f"a reward function's log_metric({min(clash)!r}, ...): the run logs that name itself; rename it"
            )
        return row | progress.reward_metrics

    def _batch(self, batch: int) -> tuple[list[int], list[Group]]:
        """This process's groups of a rollout's update number `batch` (from 0), and their numbers in the run."""
        config, progress = self.config, self.progress
        start = batch % config.updates_per_rollout * config.groups_per_update
        mine = self.processes.mine(range(config.groups_per_rollout))
        chosen = [place for place, n in enumerate(mine) if start <= n < start + config.groups_per_update]
        first = (progress.rollout - 1) * config.groups_per_rollout
        return [first + mine[place] for place in chosen], [progress.groups[place] for place in chosen]

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

    def _prepare(self) -> tuple[Any, Any, Any]:
        config = self.config
        scorer = Scorer(self.model)
        parameters = [p for p in scorer.parameters() if p.requires_grad]
        if not parameters:
            raise UserError("the model has no parameter that requires a gradient; unfreeze some, or add an adapter")
        decayed = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay}
        others = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
        optimizer = torch.optim.AdamW(
            [group for group in (decayed, others) if group["params"]],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        scorer, optimizer = self.accelerator.prepare(scorer, optimizer)
        schedule = get_scheduler(
            config.lr_scheduler_type, optimizer.optimizer, config.warmup_steps, num_training_steps=self.total_updates
        )
        return scorer, optimizer, schedule

    def _open_folder(self, resume: bool | str | Path | None) -> RunFolder:
        config = self.config
        checkpoint = self._checkpoint(resume) if resume else None
        # A checkpoint of another run does not make output_dir this run's.
        goes_on = checkpoint is not None and checkpoint.resolve().is_relative_to(
            Path(config.output_dir or "").resolve()
        )
        folder = RunFolder(config.output_dir if self.processes.is_main else None, resume=goes_on)
        self.processes.wait()
        if checkpoint is not None:
            self._resume(checkpoint)
            self.history = folder.keep_rows(self.progress.update)
        folder.create(dump_config(config))
        if config.trackers:
            self.accelerator.init_trackers(config.run_name or "gvpo", config=_flat(config))
        return folder

    def _checkpoint(self, resume: Literal[True] | str | Path) -> Path:
        if resume is not True:
            return Path(resume)
        found = RunFolder(self.config.output_dir, resume=True).checkpoints()
        if not found:
            raise UserError(f"output_dir {self.config.output_dir!r}: no checkpoint to resume from; set save_steps")
        return found[-1]

    def _resume(self, checkpoint: Path) -> None:
        config, module = self.config, self.accelerator.unwrap_model(self.scorer)
        progress = load_checkpoint(checkpoint, module, self.optimizer.optimizer, self.scheduler, self.reference)
        if progress.batch and len(progress.groups) != config.groups_per_rollout:
            raise UserError(
                f"checkpoint {str(checkpoint)!r}: made within a rollout of {len(progress.groups)} groups, the config "
                f"has {config.groups_per_rollout}; resume with its groups_per_update and updates_per_rollout"
            )
        self.progress = replace(progress, groups=self.processes.mine(progress.groups))

    def _save_checkpoint(self, folder: RunFolder) -> None:
        everyones = self.processes.interleave(self.progress.groups)
        if folder.path is not None:
            target = folder.path / "checkpoints" / f"step-{self.progress.update}"
            module = self.accelerator.unwrap_model(self.scorer)
            progress = replace(self.progress, groups=everyones)
            save_checkpoint(target, progress, module, self.optimizer.optimizer, self.scheduler, self.reference)
            prune_checkpoints(folder.checkpoints(), self.config.save_total_limit)
        self.processes.wait()

    def _check_once(self, groups: list[Group], display: ProgressDisplay) -> None:
        """Before the first update: refuse a score that is not a function of the weights."""
        if self._checked:
            return
        # Two members show what a whole group would, in a forward that fits.
        group = next((replace(group, completions=group.completions[:2]) for group in _teaching(groups)), None)
        with self.accelerator.autocast():
            warnings = check_scores(self.scorer, group, self.tokenizer, bf16=self.config.bf16)
        for warning in warnings:
            display.note(f"warning: {warning}")
        self._checked = self.processes.most(group is not None) > 0

    def _keep_completions(self, folder: RunFolder, display: ProgressDisplay, groups: list[Group]) -> None:
        everyones = self.processes.interleave(groups)
        if not self.processes.is_main:
            return
        folder.write_completions(f"rollout-{self.progress.rollout:06d}", everyones)
        if self.config.num_completions_to_print:
            display.note(completions_table(everyones, self.config.num_completions_to_print))

    def _log(self, folder: RunFolder, display: ProgressDisplay, row: dict[str, Any]) -> None:
        self.history.append(row)
        seconds, self._seconds = self._seconds, {}
        if self.processes.is_main:
            folder.append("metrics.jsonl", row)
            timings = {f"seconds/{name}": value for name, value in seconds.items()}
            folder.append("timings.jsonl", {"update": row["update"], **timings})
            due = row["update"] % self.config.logging_steps == 0
            display.update(row, line=due)
            if due and self.config.trackers:
                self.accelerator.log({k: v for k, v in row.items() if k != "update"}, step=row["update"])

    def _finish(self, folder: RunFolder, seconds: float) -> dict[str, Any]:
        summary = {"updates": self.progress.update, "seconds": round(seconds, 3), "seed": self.config.seed}
        last = self.history[-1] if self.history else {}
        summary |= {name: last[name] for name in ("reward", "loss", "eval/reward") if name in last}
        if folder.path is not None:
            self.save_model(folder.path / "model")
            folder.write_summary(summary)
        if self.config.trackers:
            self.accelerator.end_training()
        self.processes.wait()
        return summary

    def _due(self, steps: int | None) -> bool:
        return steps is not None and self.progress.update % steps == 0

    def _display(self) -> ProgressDisplay:
        enabled = self.processes.is_main and not self.config.disable_tqdm
        return ProgressDisplay(self.total_updates, start=self.progress.update, enabled=enabled)

    def _trainer_state(self) -> TrainerState:
        epoch = self.progress.position / len(self.order.rows)
        return TrainerState(global_step=self.progress.update, max_steps=self.total_updates, epoch=epoch)

    @contextmanager
    def _timed(self, name: str) -> Any:
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start


def _rewarded(group: Group) -> list[Any]:
    return [completion for completion in group.completions if completion.reward is not None]


def _teaching(groups: Sequence[Group]) -> list[Group]:
    """The groups with two rewarded members or more, and only those members; completions are shared, not copied."""
    kept = ((group, _rewarded(group)) for group in groups)
    return [replace(group, completions=members) for group, members in kept if len(members) >= 2]


def _check_settings(config: GVPOConfig, rows: Sequence[Row], eval_rows: Sequence[Row]) -> None:
    """What a config asks for, against what the trainer was given. Raises UserError."""
    for name in ("eval_steps", "eval_on_start"):
        if getattr(config, name) and not eval_rows:
            raise UserError(f"config, field {name!r}: there is nothing to evaluate on; give eval_dataset")
    check_trackers(config.trackers, config.output_dir)
    if config.output_dir is not None:
        check_columns([*rows, *eval_rows])


def _reset_accelerate() -> None:
    # accelerate keeps one state a process, and refuses a second trainer with another precision.
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def _flat(config: GVPOConfig) -> dict[str, Any]:
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in config.model_dump().items()}
