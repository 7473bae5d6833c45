"""The order of training data as a pure function of (seed, step), so that a run can stop anywhere and go on exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from mm.errors import InputError


def generator(*key: int) -> np.random.Generator:
    """A random generator that depends on these numbers alone; every use in a recipe has a key of its own."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def readers(trainer: Any) -> tuple[int, int]:
    """(the number of this one, how many) of the trainer's processes that read different rows: those that split layers
    between them read the same."""
    shares = trainer.distributed_sampler_kwargs
    return (shares["rank"], shares["num_replicas"]) if shares else (0, 1)


def torch_seed(*key: int) -> int:
    """A seed for torch made of these numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True, kw_only=True)
class Order:
    """Batches of `batch` rows cut from an endless row of shuffled passes (epochs) over `count` items.

    A pass has each item `each` times, side by side. Of `world` processes, `rank` gets its own consecutive part of each
    batch, so that the batch as a whole does not depend on how many there are.
    """

    count: int
    batch: int
    seed: int
    each: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError("there is nothing to train on: the data holds no usable item")
        if self.batch < 1 or self.batch % self.world:
            raise InputError(f"a batch of {self.batch} rows cannot be shared evenly by {self.world} processes")
        if self.each < 1 or self.batch // self.world % self.each:
            raise InputError(f"{self.batch // self.world} rows a process are not a multiple of {self.each} per group")

    def rows(self, step: int) -> list[tuple[int, int, int]]:
        """(epoch, item, which of its `each` times) of this process's rows in the batch at `step`."""
        share = self.batch // self.world
        first = step * self.batch + self.rank * share
        return [self._at(*divmod(position, self.each)) for position in range(first, first + share)]

    def _at(self, unit: int, time: int) -> tuple[int, int, int]:
        epoch, place = divmod(unit, self.count)
        return epoch, int(_shuffled(self.count, self.seed, epoch)[place]), time


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, epoch).permutation(count)


class Steps(Sampler[int]):
    """The steps `start` to `stop`; its length counts from 0, as the trainer's progress does after a restart."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop
