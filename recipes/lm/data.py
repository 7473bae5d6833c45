"""Batches of a corpus for training a language model: by step, the same ones after a restart and on any number of
processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm.errors import InputError
from mm.tokenizer.tokenizer import Tokenizer

from ..data.corpus import open_corpus
from ..data.sampler import Order, Steps, generator, readers
from .batch import NextToken, Objective
from .corruption import Corrupted
from .data_settings import LmData
from .encoding import token_file
from .masking import Masked
from .packing import NOWHERE, Packed, Spans, held_out, whole
from .token_file import TokenFile

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


def objective_for(kind: str, data: LmData, tokenizer: Tokenizer, vocab: int) -> Objective:
    """`next`, `masked` or `spans` tokens to predict, for a model of `vocab` entries. Raises InputError for a tokenizer
    that does not fit it or lacks the special tokens."""
    if tokenizer.vocab_size > vocab:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} entries, the model's embedding {vocab}: it is not "
                         "this model's tokenizer")
    if kind == "masked":
        return Masked(tokenizer, data.share)
    return Corrupted(tokenizer, vocab, data.share, data.span) if kind == "spans" else NextToken()


def validation_source(data: LmData) -> str | None:
    """What to evaluate on, if it is not a part of the training corpus."""
    return data.val or ("wikitext-2:valid" if data.path == "wikitext-2" else None)
