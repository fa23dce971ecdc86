"""`gvpo sample`: groups drawn from a model, into a file or folder that `gvpo score` and `gvpo train` take.

What is drawn is a function of the settings, the seed and the position in the order of the prompts, and so is each
group's id: a command that was stopped and is given again draws only what is missing, the same to the bit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvpo.cli.options import checked_config, config_default, config_option
from gvpo.cli.progress import Stop, progress_bar, stoppable
from gvpo.errors import UserError
from gvpo.training.config import GVPOConfig

if TYPE_CHECKING:
    from gvpo.groups import Group
    from gvpo.sources.dataset import PromptOrder, Row

POLL_SECONDS = 1.0


def sample(
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="FILE", help="Rows to draw for: .jsonl, .parquet, or a hub dataset.")
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="FILE|FOLDER/",
            help="A .jsonl file that groups are appended to, or a folder where each batch becomes a file.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Hub id, folder, .gguf file, smollm2-135m (embedded), or the folder policy of a run: its newest.",
            show_default=True,
        ),
    ] = config_default("model"),
    num_generations: Annotated[
        int, config_option("num_generations", "INT", "-k", "--num_generations")
    ] = config_default("num_generations"),
    temperature: Annotated[float, config_option("temperature", "FLOAT")] = config_default("temperature"),
    top_p: Annotated[float, config_option("top_p", "FLOAT")] = config_default("top_p"),
    top_k: Annotated[int, config_option("top_k", "INT")] = config_default("top_k"),
    max_completion_length: Annotated[int, config_option("max_completion_length", "INT")] = config_default(
        "max_completion_length"
    ),
    seed: Annotated[int, config_option("seed", "INT")] = config_default("seed"),
    prompt_column: Annotated[str, config_option("prompt_column", "NAME")] = config_default("prompt_column"),
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="INT", help="Only the first so many rows.")
    ] = None,
    epochs: Annotated[
        int,
        typer.Option(
            "--epochs", min=0, metavar="INT", help="Passes over the rows; 0 = until stopped.", show_default=True
        ),
    ] = 1,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="A new order of the rows in every pass.")] = False,
    batch: Annotated[
        int,
        typer.Option("--batch", min=1, metavar="INT", help="Prompts drawn together, then written.", show_default=True),
    ] = 8,
    source: Annotated[
        str,
        typer.Option(
            "--source",
            metavar="NAME",
            help="What the completions are called: policy, or teacher for another model's.",
            show_default=True,
        ),
    ] = "policy",
    rollout_dtype: Annotated[str, config_option("rollout_dtype", "DTYPE")] = config_default("rollout_dtype"),
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Load what the run publishes in MODEL before each batch; wait for the first."),
    ] = False,
) -> int:
    """Draw groups of completions and write them, without rewards.

    The same command given again goes on where it was stopped; another --seed draws more. Any number of samplers may
    write to one file or folder. Then: gvpo score adds rewards, gvpo train takes the file or folder.
    """
    config = _checked_config(
        num_generations=num_generations,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_completion_length=max_completion_length,
        seed=seed,
        prompt_column=prompt_column,
        rollout_dtype=rollout_dtype,
        token_budget=None,
    )
    if not source:
        raise UserError("--source: empty; name where the completions come from, such as policy or teacher")
    job = _Job(config, model, source, batch, follow)
    from gvpo.sampling.group_writer import open_writer
    from gvpo.sources.dataset import PromptOrder

    rows = _rows(prompts, prompt_column, limit)
    _check_model(job)
    order, total = PromptOrder(rows, seed, shuffle=shuffle), epochs * len(rows) if epochs else None
    with open_writer(out, job.name) as writer:
        batches = _missing(order, job, total, writer.drawn)
        first = next(batches, None)
        if first is None:
            print(f"all {total} groups are in {out}; another --seed draws more")
            return 0
        tally = _Tally()
        with (
            stoppable("gvpo sample", "this batch") as stop,
            progress_bar("groups", total) as show,
        ):
            policy = _Policy(job, rows, stop)
            for one in itertools.chain([first], batches):
                if not policy.is_ready():
                    break
                started = time.perf_counter()
                groups = policy.draw(one)
                writer.write([group for group in groups if group.id not in writer.drawn])
                tally.add(groups, time.perf_counter() - started)
                show(one.start + len(groups), f"{tally.speed}{policy.state}")
    print(f"{out}: {tally}" + ("" if stop.code is None else "; stopped, the same command goes on from here"))
    return stop.code or 0


@dataclass(frozen=True)
class _Job:
    """How groups are drawn. identity: what a draw depends on, beside prompt and position."""

    config: GVPOConfig
    model: str
    source: str
    batch: int
    follow: bool

    @property
    def model_name(self) -> str:
        return str(Path(self.model))  # the same with and without a / at the end

    @property
    def identity(self) -> list[Any]:
        c = self.config
        shape = [c.temperature, c.top_p, c.top_k, c.num_generations, c.max_completion_length]
        return [self.model_name, c.seed, *shape]

    @property
    def name(self) -> str:
        """The sampler's: the same for all that may draw the same groups."""
        return _hash(self.identity)[:8]

    def group_id(self, row: Row, position: int) -> str:
        return _hash([*self.identity, row.prompt if row.prompt_ids is None else row.prompt_ids, position])


@dataclass(frozen=True)
class _Batch:
    """Rows that are drawn together, their ids, and the first one's position in the endless order of the prompts."""

    start: int
    rows: list[Row]
    ids: list[str]


def _missing(order: PromptOrder, job: _Job, total: int | None, drawn: set[str]) -> Iterator[_Batch]:
    """The batches that are not all drawn, whole: what a row gets must not depend, by a rounding, on a kill."""
    for start in itertools.count(0, job.batch):
        count = job.batch if total is None else min(job.batch, total - start)
        if count <= 0:
            return
        rows = order.take(start, count)
        ids = [job.group_id(row, start + n) for n, row in enumerate(rows)]
        if not drawn.issuperset(ids):
            yield _Batch(start, rows, ids)


class _Policy:
    """The model that draws: one for all, or the newest that a run has published."""

    def __init__(self, job: _Job, rows: Sequence[Row], stop: Stop) -> None:
        self.job, self._rows, self._stop = job, rows, stop
        self.update: int | None = None
        self._source: Any = None

    @property
    def state(self) -> str:
        """What a person is told of it."""
        return "" if self.update is None else f"  update {self.update}"

    def is_ready(self) -> bool:
        """Load what is to be loaded before a batch, waiting for it if need be; False: stopped."""
        from gvpo.sampling.published import is_policy_folder, newest_update

        job = self.job
        if job.follow or (self._source is None and is_policy_folder(job.model)):
            self._wait()
            if self._stop.code is None and newest_update(job.model) not in (None, self.update):
                self._load(published=True)
        elif self._source is None:
            self._load(published=False)
        return self._stop.code is None

    def draw(self, batch: _Batch) -> list[Group]:
        """The batch's groups."""
        from gvpo.sources.fill import fill_groups
        from gvpo.sources.policy import draw_seed

        job, tokenizer = self.job, self._source.tokenizer
        seeds = [draw_seed(job.config.seed, batch.start + n) for n in range(len(batch.rows))]
        groups = fill_groups(batch.rows, [self._source], job.config.num_generations, seeds, tokenizer)
        meta = {"model": job.model_name, "temperature": job.config.temperature}
        if self.update is not None:
            meta["update"] = self.update
        for group, name in zip(groups, batch.ids, strict=True):
            group.id = name
            for member in group.completions:
                member.source, member.meta = job.source, dict(meta)
        return groups

    def _wait(self) -> None:
        from gvpo.sampling.published import newest_update

        if self._source is None and newest_update(self.job.model) is None:
            print(f"gvpo sample: waiting for {self.job.model_name}/update-*", file=sys.stderr)
        while self._source is None and self._stop.code is None and newest_update(self.job.model) is None:
            time.sleep(POLL_SECONDS)

    def _load(self, *, published: bool) -> None:
        from gvpo.models.loading import load_model
        from gvpo.models.modes import run_device
        from gvpo.sampling.published import load_newest
        from gvpo.sampling.sampler import SamplingParams
        from gvpo.sampling.torch_sampler import make_torch_sampler
        from gvpo.sources.policy import PolicySource
        from gvpo.training.data_checks import check_prompts
        from gvpo.training.devices import keep_freed_memory

        job, c, first = self.job, self.job.config, self._source is None
        self._source, place = None, run_device()  # one model in memory at a time
        if place.type == "cpu":
            keep_freed_memory()
        if published:
            model, tokenizer, self.update = load_newest(job.model, place)
        else:
            model, tokenizer = load_model(job.model, device=place)
        if first:
            check_prompts(self._rows, [], tokenizer, model, c)
        params = SamplingParams(c.max_completion_length, c.temperature, c.top_p, c.top_k)
        sampler = make_torch_sampler(model, tokenizer, c.rollout_dtype)
        self._source = PolicySource(sampler, tokenizer, params)


@dataclass
class _Tally:
    groups: int = 0
    completions: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, groups: Sequence[Group], seconds: float) -> None:
        members = [member for group in groups for member in group.completions]
        self.groups += len(groups)
        self.completions += len(members)
        self.tokens += sum(len(member.token_ids or []) for member in members)
        self.seconds += seconds

    @property
    def speed(self) -> str:
        return f"{self.tokens / self.seconds if self.seconds else 0:.0f} tokens/s"

    def __str__(self) -> str:
        counts = f"{self.groups} groups drawn, {self.completions} completions of {self.tokens} tokens"
        return f"{counts} in {self.seconds:.1f} s, {self.speed}"


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _checked_config(**values: Any) -> GVPOConfig:
    if values["num_generations"] == 1:
        raise UserError("-k 1: a group of one teaches nothing; give 2 or more")
    return checked_config(**values)


def _rows(prompts: str, prompt_column: str, limit: int | None) -> list[Row]:
    from gvpo.sources.dataset import read_rows
    from gvpo.training.data_checks import check_columns

    rows = read_rows(prompts, prompt_column=prompt_column)[:limit]
    check_columns(rows)
    for row in rows:
        if row.offline:
            raise UserError(f"{row.where}: brings its own completions, so there is nothing to draw; drop the column")
        try:
            json.dumps(row.prompt)
        except (TypeError, ValueError) as error:
            raise UserError(f"{row.where}, field 'prompt': cannot be written ({error}); give plain text") from error
    return rows


def _check_model(job: _Job) -> None:
    from gvpo.models.loading import check_model
    from gvpo.sampling.published import is_policy_folder

    name = job.model
    inside = Path(name) / "policy"
    if is_policy_folder(name, empty=job.follow):
        return
    if job.follow:
        hint = f"give {inside}" if inside.is_dir() else "give OUTPUT_DIR/policy of a run that publishes its policy"
        raise UserError(f"--follow: model {name!r} is not a folder of update-*; {hint}")
    if Path(name).is_dir() and is_policy_folder(name, empty=True):
        raise UserError(f"model {name!r}: holds no update-* yet; --follow waits for the first")
    check_model(name)
