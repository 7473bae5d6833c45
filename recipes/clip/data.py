"""Batches of pictures, token ids and spectrograms for contrastive training: read and worded here, augmented on the
device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import lightning
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm.errors import InputError
from mm.tokenizer.tokenizer import Tokenizer

from ...encoders.vision.image import FILTERS, Preprocess, read_image
from ..data.pictures import TRIES
from ..data.report import Note
from ..data.sampler import Order, Steps, generator, torch_seed
from .augment import Dice, augment
from .captions import LooseTokenizer
from .pairs import Pair, Pairs
from .settings import Augment, Data, Words

if TYPE_CHECKING:
    from ...encoders.audio.spectrogram import Spectrogram

MOST = 1000  # turns of one source for one of the smallest
READING, AUGMENTING, WORDING, CHOOSING = 1, 2, 3, 5  # the last number of the keys of random generators


class Batch(NamedTuple):
    """Two or three of pixels (B, 3, h, w) uint8 (after augmentation normalised floats), ids (B, T) and sounds
    (B, 1, F, T), the same for all rows; group (B,)."""

    pixels: Tensor | None
    ids: Tensor | None
    group: Tensor
    notes: list[Note]
    sounds: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """By the name of the tower that reads it."""
        held = {"image": self.pixels, "text": self.ids, "audio": self.sounds}
        return {name: value for name, value in held.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Input:
    """What a model wants: its preprocessing, its tokenizer, the context in tokens, whether ids may be cut behind the
    longest text of a batch, and the spectrogram of a sound, if it hears."""

    preprocess: Preprocess
    tokenizer: Tokenizer
    context: int
    trim: bool
    spectrogram: Spectrogram | None = None


class Batches(Dataset[Batch]):
    """Batch by step: `batches[step]` depends on the step, the seed and the data alone. All pairs hold the same kinds
    of things; `repeats` says whether equal captions in a batch are noted."""

    def __init__(self, pairs: Pairs, model: Input, data: Data, crop: float, order: Order, repeats: bool = False
                 ) -> None:
        """`order` is that of the items or, with `data.per_group`, of the groups."""
        self.kinds, self.repeats = pairs.items[0].kinds, repeats
        self.pairs, self.model, self.words, self.crop, self.order = pairs, model, data.words, crop, order
        self.groups = by_group(pairs) if data.per_group else None
        self.loose = LooseTokenizer(model.tokenizer, data.bpe_dropout) if data.bpe_dropout else None
        side = data.canvas and (data.canvas, data.canvas)
        self.canvas = replace(model.preprocess, size=side, edge=None) if side else model.preprocess

    def __getitem__(self, step: int) -> Batch:
        notes: list[Note] = []
        rows = [self.readable(self.item(*row), row[0], notes) for row in self.order.rows(step)]
        randoms = [generator(self.order.seed, *row, WORDING) for row in self.order.rows(step)]
        pixels = ids = sounds = None
        if "image" in self.kinds:
            pixels = torch.stack([row.pixels for row in rows]).permute(0, 3, 1, 2)
        if "text" in self.kinds:
            captions = [word(row.pair.captions, self.words, r) for row, r in zip(rows, randoms, strict=True)]
            ids = self.tokens(captions, randoms, notes)
            notes += repeated(captions) if self.repeats else []
        if "audio" in self.kinds:
            sounds = torch.stack([row.sound for row in rows])
        return Batch(pixels, ids, torch.tensor([row.pair.group for row in rows]), notes, sounds)

    def item(self, epoch: int, unit: int, time: int) -> int:
        """The index of an item: the unit itself, or a member of the group, another one each time while they last."""
        if self.groups is None:
            return unit
        members = self.groups[unit]
        return members[generator(self.order.seed, epoch, unit, CHOOSING).permutation(len(members))[time % len(members)]]

    def readable(self, index: int, epoch: int, notes: list[Note]) -> Read:
        """The item at `index` or, while its picture or sound cannot be read, the next one."""
        for offset in range(TRIES):
            place = (index + offset) % len(self.pairs)
            pair = self.pairs.items[place]
            part, kind = pair.picture, "picture"
            try:
                image = None if pair.picture is None else read_image(pair.picture.open())
                part, kind = pair.sound, "sound"
                sound = None if pair.sound is None else self.model.spectrogram(pair.sound.open())
            except (InputError, OSError) as error:
                notes.append((kind, part.name, str(error)))
                continue
            random = generator(self.order.seed, epoch, place, READING)
            return Read(pair, None if image is None else torch.from_numpy(self.cut(image, random)), sound)
        raise InputError(f"{self.pairs.where}: {TRIES} items in a row cannot be read; the last: {notes[-1][2]}")

    def cut(self, image: Image.Image, random: np.random.Generator) -> np.ndarray:
        """RGB of any size -> (h, w, 3) uint8 at the size of the canvas, a random part of it where `crop` is below 1."""
        if self.crop >= 1:
            return np.array(self.canvas.cut(image))
        height, width = self.canvas.size
        box = crop_box(image.width, image.height, self.crop, random)
        return np.array(image.resize((width, height), FILTERS[self.canvas.interpolation], box=box, reducing_gap=2.0))

    def tokens(self, captions: list[str], randoms: list[np.random.Generator], notes: list[Note]) -> Tensor:
        tokenizer, context = self.model.tokenizer, self.model.context
        for text in captions:
            if len(text.encode()) > context // 2 and tokenizer.too_long(text, context):
                notes.append(("caption", text, f"{text[:60]!r} is cut to {context} tokens"))
        ids = self.loose(captions, context, randoms) if self.loose else tokenizer(captions, context)
        if not self.model.trim:
            return ids
        last = (ids != tokenizer.pad_id).any(dim=0).nonzero().max()
        return ids[:, : last + 2]  # an end token that doubles as padding comes after the last other one


class Read(NamedTuple):
    """An item in memory: pixels (h, w, 3) uint8, sound (1, F, T)."""

    pair: Pair
    pixels: Tensor | None
    sound: Tensor | None


class Turns:
    """Sources take turns in a fixed round, evenly spread; `counts` are their sizes."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)

    @cached_property
    def round(self) -> list[tuple[int, int]]:
        """(source, how often it had its turn before in this round) of each step of a round."""
        shares = [min(MOST, round(count / min(self.counts))) for count in self.counts]
        due = [((time + 0.5) / share, source, time) for source, share in enumerate(shares) for time in range(share)]
        return [(source, time) for _, source, time in sorted(due)]

    def at(self, step: int) -> tuple[int, int]:
        """The source of a step and the number of its batch, each counted from 0."""
        rounds, place = divmod(step, len(self.round))
        source, time = self.round[place]
        return source, rounds * sum(other == source for other, _ in self.round) + time


class Mixture(Dataset[Batch]):
    """Batches of several sources, which take turns in proportion to their items."""

    def __init__(self, sources: Sequence[Batches]) -> None:
        self.sources, self.turns = sources, Turns([len(source.pairs) for source in sources])

    def __getitem__(self, step: int) -> Batch:
        source, own = self.turns.at(step)
        return self.sources[source][own]


def by_kinds(pairs: Pairs) -> list[Pairs]:
    """The items that hold the same kinds of things, most items first."""
    parts: dict[tuple[str, ...], list[Pair]] = {}
    for pair in pairs.items:
        parts.setdefault(pair.kinds, []).append(pair)
    return [replace(pairs, items=items) for items in sorted(parts.values(), key=len, reverse=True)]


def repeated(captions: Sequence[str]) -> list[Note]:
    """A note for every caption that several rows have."""
    told = "rows of a batch, which count as wrong answers to each other (loss.positives=group: as right ones)"
    counts = Counter(captions)
    return [("repeat", text, f"{text[:60]!r} is the caption of {n} {told}") for text, n in counts.items() if n > 1]


def crop_box(width: int, height: int, least: float, random: np.random.Generator) -> tuple[float, float, float, float]:
    """(left, upper, right, lower) of a part with at least this share of the area, up to a third wider or higher."""
    area, aspect = random.uniform(least, 1), math.exp(random.uniform(-1, 1) * math.log(4 / 3))
    w, h = min(1.0, math.sqrt(area * aspect)) * width, min(1.0, math.sqrt(area / aspect)) * height
    left, upper = random.uniform(0, 1) * (width - w), random.uniform(0, 1) * (height - h)
    return left, upper, left + w, upper + h


def by_group(pairs: Pairs) -> list[list[int]]:
    """The indices of the items of each group, in order of first appearance."""
    members: dict[int, list[int]] = {}
    for index, pair in enumerate(pairs.items):
        members.setdefault(pair.group, []).append(index)
    return list(members.values())


def word(captions: tuple[str, ...], words: Words | None, random: np.random.Generator) -> str:
    """One of the captions or, with `words`, a wording of a name and its tags."""
    if words is None:
        return captions[random.integers(len(captions))]
    name, tags, choice = captions[0], captions[1:], random.random()
    if choice < words.name or not tags:
        parts = [name]
    else:
        parts = [tags[i] for i in random.permutation(len(tags))[: random.integers(1, 4)]]
        if choice >= words.name + words.tags:
            parts.insert(int(random.integers(len(parts) + 1)), name)
    text = " ".join(parts)
    kept = [part for part in text.split() if not words.drop or random.random() >= words.drop]
    return " ".join(kept) or text


class PairsModule(lightning.LightningDataModule):
    """Training batches for a model's `Input`, the same ones whatever the number of processes, from any step on. With
    `repeats`, equal captions in a batch are noted."""

    def __init__(self, pairs: Pairs, model: Input, data: Data, changes: Augment, seed: int, repeats: bool = False
                 ) -> None:
        super().__init__()
        self.pairs, self.model, self.data, self.changes, self.seed = pairs, model, data, changes, seed
        self.repeats = repeats

    def batches(self, pairs: Pairs) -> Batches:
        trainer, data = self.trainer, self.data
        count = len(by_group(pairs)) if data.per_group else len(pairs)
        order = Order(count=count, batch=data.batch_size, seed=self.seed, each=data.per_group or 1,
                      rank=trainer.global_rank, world=trainer.world_size)
        return Batches(pairs, self.model, data, self.changes.crop, order, self.repeats)

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer, data = self.trainer, self.data
        batches = Mixture([self.batches(part) for part in by_kinds(self.pairs)])
        return DataLoader(batches, batch_size=None, sampler=Steps(trainer.global_step, trainer.max_steps),
                          num_workers=data.workers, pin_memory=trainer.strategy.root_device.type == "cuda")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if batch.pixels is None:
            return batch
        seed = torch_seed(self.seed, self.trainer.global_step, AUGMENTING)
        dice = Dice(seed, len(batch.pixels), rank=self.trainer.global_rank, world=self.trainer.world_size,
                    device=batch.pixels.device)
        wanted = self.model.preprocess
        pixels = augment(batch.pixels.float() / 255, wanted.size, self.changes, dice)
        mean, std = (pixels.new_tensor(x).view(3, 1, 1) for x in (wanted.mean, wanted.std))
        return batch._replace(pixels=(pixels - mean) / std)
