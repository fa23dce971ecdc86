"""Several processes in step, over accelerate: who takes which groups, and what they tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import gather_object
from torch import nn

from gvpo.errors import UserError
from gvpo.rewards.resolve import nearest
from gvpo.training.update import OneProcess

T = TypeVar("T")


def check_trackers(names: Sequence[str], output_dir: str | None) -> None:
    """Refuse trackers that accelerate does not know, or would leave out in silence. Raises UserError."""
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name == "all":
            continue
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"config, field 'report_to': {name!r} is unknown; {nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in available:
            raise UserError(f"config, field 'report_to': {name!r} is not installed; pip install {name}")
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and output_dir is None:
            raise UserError(f"config, field 'report_to': {name!r} writes files; give output_dir")


class Processes(OneProcess):
    """The processes of an Accelerator. With one process every method is the identity."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.count = accelerator.num_processes
        self.is_main = accelerator.is_main_process

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share: every count-th item, so that shares differ by one at most."""
        return list(items[self.accelerator.process_index :: self.count])

    def interleave(self, items: Sequence[T]) -> list[T]:
        """All processes' items on every process, in the order that `mine` took them from."""
        if self.count == 1:
            return list(items)
        shares: list[list[T]] = gather_object([list(items)])
        longest = max(len(share) for share in shares)
        return [share[place] for place in range(longest) for share in shares if place < len(share)]

    def most(self, count: int) -> int:
        """The largest count over all processes."""
        return count if self.count == 1 else max(gather_object([count]))

    def total(self, count: int) -> int:
        """The sum of the counts of all processes."""
        return count if self.count == 1 else sum(gather_object([count]))

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A block whose backward passes do not exchange gradients yet."""
        return self.accelerator.no_sync(module)

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Each metric's mean over the processes that have it."""
        if self.count == 1:
            return dict(metrics)
        shares: list[dict[str, float]] = gather_object([dict(metrics)])
        names = dict.fromkeys(name for share in shares for name in share)
        return {name: fmean(share[name] for share in shares if name in share) for name in names}

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()
