"""Rows of packed documents, and batches of them for training a language model: any row and any batch by its number, the
same ones after a restart and on any number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm.errors import InputError
from mm.tokenizer.tokenizer import Tokenizer

from ..data.corpus import open_corpus
from ..data.sampler import Order, Steps, generator, readers
from .objectives import NOWHERE, NextToken, Objective, Row
from .settings import LmData
from .token_file import TokenFile, token_file

DOCUMENTS, HELD_OUT = 20, 21  # the last number of the keys of random generators


@dataclass(frozen=True, eq=False)
class Spans:
    """Parts of a token file that are documents of their own: starts and stops (n,) int64 of tokens."""

    file: TokenFile
    starts: np.ndarray
    stops: np.ndarray

    @property
    def size(self) -> int:
        """Tokens in all."""
        return int((self.stops - self.starts).sum())

    def where(self, number: int) -> str:
        """The file and line of a span, for messages."""
        return self.file.where(self.file.document(int(self.starts[number])))


def whole(file: TokenFile) -> Spans:
    """Every document."""
    ends = np.asarray(file.ends)
    return Spans(file, np.concatenate([[0], ends[:-1]]), ends)


def held_out(file: TokenFile, share: float) -> tuple[Spans, Spans]:
    """(training, evaluation): random documents with about this share of the tokens are held out, always the same ones.
    Documents with more than half of that share are cut first. Raises InputError where one side stays empty."""
    spans = shorter(whole(file), max(int(file.size * share / 2), 2))
    order = generator(len(spans.starts), HELD_OUT).permutation(len(spans.starts))
    until = np.cumsum((spans.stops - spans.starts)[order])
    count = int(np.searchsorted(until, file.size * share)) + 1
    out = np.zeros(len(order), bool)
    out[order[:count]] = True
    if out.all():
        raise InputError(f"a share of {share} cannot be held out of {file.size} tokens: give data.val, or holdout 0")
    return Spans(file, spans.starts[~out], spans.stops[~out]), Spans(file, spans.starts[out], spans.stops[out])


def shorter(spans: Spans, most: int) -> Spans:
    """The same tokens in spans of at most `most`."""
    parts = -(-(spans.stops - spans.starts) // most)
    starts = np.repeat(spans.starts, parts)
    within = np.arange(len(starts)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = starts + within * most
    return Spans(spans.file, starts, np.minimum(starts + most, np.repeat(spans.stops, parts)))


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of `length` tokens and `extra` more, which the next row begins with. Every pass (epoch) lays all spans end
    to end in another order, by the `seed` (None: as they stand), and has every token once, the last row padded."""

    spans: Spans
    length: int
    seed: int | None
    extra: int = 0

    def __len__(self) -> int:
        """Rows of a pass."""
        return max(math.ceil((self.spans.size - self.extra) / self.length), 1)

    def row(self, epoch: int, index: int) -> Row:
        """length + extra tokens."""
        order, ends = self.laid(epoch)
        start = index * self.length
        stop = min(start + self.length + self.extra, int(ends[-1]))
        ids = np.zeros(self.length + self.extra, np.int64)
        documents, learned = np.full(len(ids), NOWHERE, np.int64), np.zeros(len(ids), bool)
        at, place = start, int(np.searchsorted(ends, start, "right"))
        while at < stop:
            number, upto = order[place], min(int(ends[place]), stop)
            first = int(self.spans.stops[number] - (ends[place] - at))
            cut = slice(at - start, upto - start)
            ids[cut] = self.spans.file.tokens[first : first + upto - at]
            learned[cut] = self.spans.file.counted(first, first + upto - at)
            documents[cut] = number
            at, place = upto, place + 1
        return Row(ids, documents, learned)

    def laid(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the spans in a pass, and where each ends in it."""
        return _laid(self.spans, self.seed, epoch)


@lru_cache(maxsize=4)
def _laid(spans: Spans, seed: int | None, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    count = len(spans.starts)
    order = np.arange(count) if seed is None else generator(seed, epoch, DOCUMENTS).permutation(count)
    return order, np.cumsum((spans.stops - spans.starts)[order])


CORRUPTING = 22  # the last number of the keys of random generators


class Batches(Dataset[Any]):
    """Batch by step: `batches[step]` depends on the step, the seed and the data alone."""

    def __init__(self, packed: Packed, objective: Objective, order: Order) -> None:
        self.packed, self.objective, self.order = packed, objective, order

    def __getitem__(self, step: int) -> Any:
        order, first = self.order, self.order.rank * (self.order.batch // self.order.world)
        rows = [self.packed.row(epoch, index) for epoch, index, _ in order.rows(step)]
        return self.objective(rows, [generator(order.seed, step, first + i, CORRUPTING) for i in range(len(rows))])


class Fixed(Dataset[Any]):
    """All rows in the order of the corpus, `batch` at a time, the last ones fewer; corrupted alike every time."""

    def __init__(self, packed: Packed, objective: Objective, batch: int) -> None:
        self.packed, self.objective, self.batch = packed, objective, batch

    def __len__(self) -> int:
        return -(-len(self.packed) // self.batch)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.batch
        rows = [self.packed.row(0, i) for i in range(first, min(first + self.batch, len(self.packed)))]
        return self.objective(rows, [generator(first + i, CORRUPTING) for i in range(len(rows))])


class LmModule(lightning.LightningDataModule):
    """Training batches from any step on, and a fixed set of evaluation batches.

    `cache` is where token files lie unless the settings name a folder. After `prepare_data` and `setup`, `training` and
    `validation` (None where nothing is held out) are the packed rows, `notes` the sentences about unusable input.
    """

    def __init__(self, data: LmData, tokenizer: Tokenizer, seed: int, cache: Path,
                 objective: Objective | None = None) -> None:
        super().__init__()
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self.cache, self.objective = Path(data.cache or cache), objective or NextToken()
        self.notes: list[str] = []

    def prepare_data(self) -> None:
        """Writes the token files that are not there yet."""
        for source in filter(None, (self.data.path, validation_source(self.data))):
            self.file(source)

    def setup(self, stage: str = "fit") -> None:
        file, other = self.file(self.data.path), validation_source(self.data)
        kept, out = whole(file), None
        if other:
            out = whole(self.file(other))
        elif self.data.holdout:
            kept, out = held_out(file, self.data.holdout)
        self.training = self.packed(kept, self.seed)
        self.validation = None if out is None else self.packed(out, None)
        self.notes = [line for spans in filter(None, (kept, out if other else None))
                      for line in spans.file.account.sentences()]

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.training.spans.file.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises InputError where the corpus is no longer that of the checkpoint: the run would not be the same."""
        if state_dict["tokens"] != self.training.spans.file.fingerprint:
            raise InputError(f"{self.data.path} is not the corpus that this run began with: its texts have changed")

    def file(self, source: str) -> TokenFile:
        return token_file(open_corpus(source, self.data.split), self.tokenizer, self.cache, self.data.answers)

    def packed(self, spans: Spans, seed: int | None) -> Packed:
        return Packed(spans, self.data.length, seed, self.objective.extra)

    def train_dataloader(self) -> DataLoader[Any]:
        trainer, (rank, world) = self.trainer, readers(self.trainer)
        order = Order(count=len(self.training), batch=self.data.batch_size, seed=self.seed, rank=rank, world=world)
        return DataLoader(Batches(self.training, self.objective, order), batch_size=None,
                          num_workers=self.data.workers, sampler=Steps(trainer.global_step, trainer.max_steps),
                          pin_memory=trainer.strategy.root_device.type == "cuda")

    def evaluation(self, batch: int | None = None) -> Fixed:
        """The evaluation batches. Raises InputError where nothing is held out."""
        if self.validation is None:
            raise InputError("there is nothing to evaluate on: give data.val or a data.holdout above 0")
        return Fixed(self.validation, self.objective, batch or self.data.batch_size)

    def told(self, documents: Tensor) -> list[str]:
        """Documents (B, T) of a training batch -> the files and lines that they begin at."""
        numbers = dict.fromkeys(documents.flatten().tolist())
        return [self.training.spans.where(number) for number in numbers if number != NOWHERE]


def validation_source(data: LmData) -> str | None:
    """What to evaluate on, if it is not a part of the training corpus."""
    return data.val or ("wikitext-2:valid" if data.path == "wikitext-2" else None)
