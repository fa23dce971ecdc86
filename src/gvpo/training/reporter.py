"""What a run leaves behind and shows: its history, its folder, trackers, the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from accelerate import Accelerator

from gvpo.groups import Group
from gvpo.report.terminal import ProgressDisplay, completions_table
from gvpo.training.config import GVPOConfig
from gvpo.training.health import mark
from gvpo.training.run_folder import RunFolder


class Stopwatch:
    """Seconds by name, summed until they are taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of the block."""
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds so far, as `seconds/name`; counting starts anew."""
        seconds, self._seconds = self._seconds, {}
        return {f"seconds/{name}": value for name, value in seconds.items()}


class Reporter:
    """Where a run's rows, completions and notes go. A context manager: display and trackers are closed at its end.

    folder: one that writes nothing on other processes than the main one, which alone shows and tracks. history: rows of
    a run that goes on; new ones are added, on every process. total, start: updates in all, and made already.
    """

    def __init__(
        self,
        config: GVPOConfig,
        folder: RunFolder,
        accelerator: Accelerator,
        history: list[dict[str, Any]],
        stopwatch: Stopwatch,
        *,
        total: int,
        start: int,
    ) -> None:
        self.config = config
        self.folder = folder
        self.history = history
        self._stopwatch = stopwatch
        self._accelerator = accelerator
        self._is_main = accelerator.is_main_process
        self._display = ProgressDisplay(total, start=start, enabled=self._is_main and not config.disable_tqdm)
        if config.trackers:
            accelerator.init_trackers(config.run_name or "gvpo", config=_flat(config))

    def __enter__(self) -> Reporter:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)
        # Not accelerate's end_training, which would also end the communication between the processes.
        for tracker in self._accelerator.trackers if self.config.trackers else []:
            tracker.finish()

    def row(self, row: dict[str, Any]) -> None:
        """An update's metrics: to the history, metrics.jsonl, terminal and trackers; its seconds to timings.jsonl.

        What they show to be wrong goes into the row, and to the terminal when it begins.
        """
        self.history.append(row)
        news = mark(self.history, self.config)
        seconds = self._stopwatch.take()
        if not self._is_main:
            return
        self.folder.append("metrics.jsonl", row)
        self.folder.append("timings.jsonl", {"update": row["update"], **seconds})
        for symptom in news:
            self.note(f"warning: {symptom.name}: {symptom.text}")
        due = row["update"] % self.config.logging_steps == 0 or any(name.startswith("eval/") for name in row)
        self._display.update(row, line=due)
        if due and self.config.trackers:
            self._accelerator.log({k: v for k, v in row.items() if k != "update"}, step=row["update"])

    def completions(self, name: str, groups: Sequence[Group], *, show: int = 0) -> None:
        """Scored groups, all processes': to completions/NAME.jsonl, and some of them to the terminal."""
        if not self._is_main:
            return
        self.folder.write_completions(name, groups)
        if show:
            self._display.note(completions_table(groups, show))

    def note(self, text: str) -> None:
        """A line for the terminal."""
        self._display.note(text)


def _flat(config: GVPOConfig) -> dict[str, Any]:
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in config.model_dump().items()}
