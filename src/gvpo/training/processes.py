"""Several processes in step: who takes which groups, and what they tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class OneProcess:
    """A run of one process: nothing to share out, nobody to wait for."""

    count = 1
    is_main = True

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share: every count-th item, so that shares differ by one at most."""
        return list(items)

    def interleave(self, items: Sequence[T]) -> list[T]:
        """All processes' items on every process, in the order that `mine` took them from."""
        return list(items)

    def most(self, count: int) -> int:
        """The largest count over all processes."""
        return count

    def total(self, count: int) -> int:
        """The sum of the counts of all processes."""
        return count

    def mean(self, metrics: Mapping[str, float], weight: float) -> dict[str, float]:
        """Each metric's mean over the processes that have it, weighted by how much this one stands for."""
        return dict(metrics)

    def share(self, value: T) -> T:
        """The main process's value, on every process."""
        return value

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A block whose backward passes do not exchange gradients yet."""
        return nullcontext()

    def wait(self) -> None:
        """Until every process is here."""


class Processes(OneProcess):
    """The processes of torch.distributed, each with a copy of the weights."""

    def __init__(self) -> None:
        self.count = distributed.get_world_size()
        self.is_main = distributed.get_rank() == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        return list(items[distributed.get_rank() :: self.count])

    def interleave(self, items: Sequence[T]) -> list[T]:
        shares = self._everyones(list(items))
        longest = max(len(share) for share in shares)
        return [share[place] for place in range(longest) for share in shares if place < len(share)]

    def most(self, count: int) -> int:
        return max(self._everyones(count))

    def total(self, count: int) -> int:
        return sum(self._everyones(count))

    def mean(self, metrics: Mapping[str, float], weight: float) -> dict[str, float]:
        shares = [(share, weight) for share, weight in self._everyones((dict(metrics), weight)) if weight > 0]
        names = dict.fromkeys(name for share, _ in shares for name in share)
        return {
            name: sum(share[name] * weight for share, weight in shares if name in share)
            / sum(weight for share, weight in shares if name in share)
            for name in names
        }

    def share(self, value: T) -> T:
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def wait(self) -> None:
        distributed.barrier()

    def _everyones(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values


def current_processes() -> OneProcess:
    """The processes that this one was launched with."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return Processes() if several else OneProcess()
