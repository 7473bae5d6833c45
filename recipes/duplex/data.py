"""Batches of conversations for training a duplex model: by step, the same ones after a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm.errors import InputError
from mm.spec import DuplexSpec
from mm.speech.streams import NONE
from mm.tokenizer.tokenizer import Tokenizer

from ..data.dialogues import Codes, Packed, check_conditions, held_out, read_dialogues
from ..data.report import Note
from ..data.sampler import Order, Steps, generator, readers
from ..data.words import by_word

if TYPE_CHECKING:
    from .settings import DuplexData

HIDING = 32  # the last number of the keys of random generators


class DuplexBatch(NamedTuple):
    """codes (B, 1 + Q, T), text first; documents (B, T), -1 for padding; told: the conditions of the documents, where
    the model has any."""

    codes: Tensor
    documents: Tensor
    told: Mapping[int, Mapping[str, str]]
    notes: Sequence[Note] = ()


def batch_of(packed: Packed, rows: Iterable[tuple[int, int]]) -> DuplexBatch:
    """Rows by epoch and index."""
    codes, documents = (torch.from_numpy(np.stack(part)) for part in zip(*(packed.row(*row) for row in rows),
                                                                         strict=True))
    told = {i: packed.dialogues[i].told for i in documents.unique().tolist() if i >= 0 and packed.dialogues[i].told}
    return DuplexBatch(codes, documents, told)


class Batches(Dataset[DuplexBatch]):
    """Batch by step: `batches[step]` depends on the step, the seed and the data alone. Of the codes from the stream
    `heard` on, the share `drop` is hidden."""

    def __init__(self, packed: Packed, order: Order, heard: int = 0, drop: float = 0.0) -> None:
        self.packed, self.order, self.heard, self.drop = packed, order, heard, drop

    def __getitem__(self, step: int) -> DuplexBatch:
        rows = [(epoch, index) for epoch, index, _ in self.order.rows(step)]
        batch = batch_of(self.packed, rows)
        if self.drop:
            for codes, row in zip(batch.codes[:, self.heard:], rows, strict=True):
                random = generator(self.order.seed, *row, HIDING)
                codes[torch.from_numpy(random.random(codes.shape) < self.drop)] = NONE
        return batch


class Drilled(Dataset[DuplexBatch]):
    """The batches of a drill for so many steps, then others, from their first one on."""

    def __init__(self, drill: Batches, steps: int, then: Batches) -> None:
        self.drill, self.steps, self.then = drill, steps, then

    def __getitem__(self, step: int) -> DuplexBatch:
        return self.drill[step] if step < self.steps else self.then[step - self.steps]


class Fixed(Dataset[DuplexBatch]):
    """All rows as they stand, `batch` at a time, the last ones fewer."""

    def __init__(self, packed: Packed, batch: int) -> None:
        self.packed, self.batch = packed, batch

    def __len__(self) -> int:
        return -(-len(self.packed) // self.batch)

    def __getitem__(self, index: int) -> DuplexBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.batch
        return batch_of(self.packed, [(0, i) for i in range(first, min(first + self.batch, len(self.packed)))])


class DuplexModule(lightning.LightningDataModule):
    """Training batches from any step on, and a fixed set of evaluation batches (`validation`, None without any).
    `drill` holds what is trained on before all else, None where that is nothing. `header` is that of a file of the
    codes, `codec` what encoded sound files, if that was to be done."""

    def __init__(self, data: DuplexData, model: DuplexSpec, tokenizer: Tokenizer, seed: int, cache: Path) -> None:
        super().__init__()
        self.data, self.spec, self.tokenizer, self.seed = data, model, tokenizer, seed
        self.cache = Path(data.cache or cache)
        self.training: Packed | None = None

    def setup(self, stage: str = "fit") -> None:
        """Reads the conversations, once: a trainer asks again."""
        if self.training is not None:
            return
        s, data = self.spec, self.data
        check_conditions(s.conditioning)
        codes = Codes(self.cache, data.codec, s.own, s.heard)
        read = partial(read_dialogues, codes=codes, encode=by_word(self.tokenizer), model=s, late=data.late,
                       jobs=max(data.workers, 1))
        kept = read(data.path)
        kept, out = (kept, read(data.val)) if data.val else held_out(kept, data.holdout)
        self.training = Packed(kept, data.length, self.seed)
        self.drill = Packed(read(data.drill), data.length, self.seed) if data.drill else None
        self.validation = Packed(out, data.length, None) if out else None
        self.header, self.codec = codes.first[1], codes.model

    def fingerprint(self) -> str:
        """Sixteen hex digits of all that is trained on."""
        made = hashlib.sha256()
        for one in chain(self.training.dialogues, self.drill.dialogues if self.drill else ()):
            made.update(one.codes.tobytes())
            made.update(repr(sorted(one.told.items())).encode() if one.told else b"")
        return made.hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        return {"codes": self.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises InputError where the conversations are not those of the checkpoint."""
        if state_dict["codes"] != self.fingerprint():
            names = " and ".join(filter(None, (self.data.path, self.data.drill)))
            raise InputError(f"the conversations of {names} are not those that this run began with")

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        return DataLoader(self.batches(*readers(trainer)), batch_size=None, num_workers=self.data.workers,
                          sampler=Steps(trainer.global_step, trainer.max_steps),
                          pin_memory=trainer.strategy.root_device.type == "cuda")

    def batches(self, rank: int = 0, world: int = 1) -> Batches | Drilled:
        """By step, those of one of `world` processes."""
        def of(packed: Packed) -> Batches:
            order = Order(count=len(packed), batch=self.data.batch_size, seed=self.seed, rank=rank, world=world)
            return Batches(packed, order, 1 + self.spec.own, self.data.drop)
        then = of(self.training)
        return Drilled(of(self.drill), self.data.drill_steps, then) if self.drill else then

    def where(self, step: int) -> list[str]:
        """Where the conversations of the batch at a step come from."""
        drilled = self.drill is not None and step < self.data.drill_steps
        found = self.batches()[step].documents.unique().tolist()
        dialogues = (self.drill if drilled else self.training).dialogues
        return [dialogues[i].where for i in found if i >= 0]

    def evaluation(self) -> Fixed:
        return Fixed(self.validation, self.data.batch_size)
