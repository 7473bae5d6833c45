"""Batches of pictures and token ids for contrastive training: read and worded here, augmented on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import lightning
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm.errors import InputError
from mm.tokenizer import Tokenizer

from ...encoders.image import FILTERS, Preprocess, read_image
from .augment import Dice, augment
from .pairs import Pair, Pairs
from .sampler import Order, Steps, generator, torch_seed
from .settings import Augment, Data, Words

READING, AUGMENTING, WORDING = 1, 2, 3  # the last number of the keys of random generators
TRIES = 64  # unreadable pictures in a row before a source is given up


class Batch(NamedTuple):
    """pixels (B, 3, h, w) uint8 (after augmentation normalised floats), ids (B, T), group (B,); `notes` are (kind, key,
    sentence) of what went wrong on the way, to be counted once per key."""

    pixels: Tensor
    ids: Tensor
    group: Tensor
    notes: list[tuple[str, str, str]]


@dataclass(frozen=True, kw_only=True)
class Input:
    """What a model wants: its preprocessing, its tokenizer, the context in tokens, and whether ids may be cut behind
    the longest text of a batch."""

    preprocess: Preprocess
    tokenizer: Tokenizer
    context: int
    trim: bool


class Batches(Dataset[Batch]):
    """Batch by step: `batches[step]` depends on the step, the seed and the data alone."""

    def __init__(self, pairs: Pairs, order: Order, model: Input, data: Data, crop: float) -> None:
        self.pairs, self.order, self.model, self.words, self.crop = pairs, order, model, data.words, crop
        side = data.canvas and (data.canvas, data.canvas)
        self.canvas = replace(model.preprocess, size=side, edge=None) if side else model.preprocess

    def __getitem__(self, step: int) -> Batch:
        notes: list[tuple[str, str, str]] = []
        pictures, captions, groups = [], [], []
        for epoch, index in self.order.rows(step):
            pair, pixels = self.readable(index, epoch, notes)
            pictures.append(torch.from_numpy(pixels))
            captions.append(word(pair.captions, self.words, generator(self.order.seed, epoch, index, WORDING)))
            groups.append(pair.group)
        pixels = torch.stack(pictures).permute(0, 3, 1, 2)
        return Batch(pixels, self.tokens(captions, notes), torch.tensor(groups), notes)

    def readable(self, index: int, epoch: int, notes: list[tuple[str, str, str]]) -> tuple[Pair, np.ndarray]:
        """The item at `index` or, while its picture cannot be read, the next one."""
        for offset in range(TRIES):
            place = (index + offset) % len(self.pairs)
            pair = self.pairs.items[place]
            try:
                image = read_image(pair.picture.open())
            except (InputError, OSError) as error:
                notes.append(("picture", pair.picture.name, str(error)))
                continue
            return pair, self.cut(image, generator(self.order.seed, epoch, place, READING))
        raise InputError(f"{self.pairs.where}: {TRIES} pictures in a row cannot be read; the last: {notes[-1][2]}")

    def cut(self, image: Image.Image, random: np.random.Generator) -> np.ndarray:
        """RGB of any size -> (h, w, 3) uint8 at the size of the canvas, a random part of it where `crop` is below 1."""
        if self.crop >= 1:
            return np.array(self.canvas.cut(image))
        height, width = self.canvas.size
        box = crop_box(image.width, image.height, self.crop, random)
        return np.array(image.resize((width, height), FILTERS[self.canvas.interpolation], box=box, reducing_gap=2.0))

    def tokens(self, captions: list[str], notes: list[tuple[str, str, str]]) -> Tensor:
        tokenizer, context = self.model.tokenizer, self.model.context
        for text in captions:
            if len(text.encode()) > context // 2 and tokenizer.too_long(text, context):
                notes.append(("caption", text, f"{text[:60]!r} is cut to {context} tokens"))
        ids = tokenizer(captions, context)
        if not self.model.trim:
            return ids
        last = (ids != tokenizer.pad_id).any(dim=0).nonzero().max()
        return ids[:, : last + 2]  # an end token that doubles as padding comes after the last other one


def crop_box(width: int, height: int, least: float, random: np.random.Generator) -> tuple[float, float, float, float]:
    """(left, upper, right, lower) of a part with at least this share of the area, up to a third wider or higher."""
    area, aspect = random.uniform(least, 1), math.exp(random.uniform(-1, 1) * math.log(4 / 3))
    w, h = min(1.0, math.sqrt(area * aspect)) * width, min(1.0, math.sqrt(area / aspect)) * height
    left, upper = random.uniform(0, 1) * (width - w), random.uniform(0, 1) * (height - h)
    return left, upper, left + w, upper + h


def word(captions: tuple[str, ...], words: Words, random: np.random.Generator) -> str:
    """One wording of an item's captions."""
    if random.random() < words.joined and len(captions) > 1:
        count = int(random.integers(1, 4))
        chosen = random.permutation(len(captions) - 1)[:count] + 1
        if random.random() < 0.5:
            chosen = np.insert(chosen, random.integers(0, len(chosen) + 1), 0)
        text = " ".join(captions[i] for i in chosen)
    elif words.first is not None and random.random() < words.first:
        text = captions[0]
    else:
        text = captions[random.integers(len(captions))]
    if not words.drop:
        return text
    kept = [part for part in text.split() if random.random() >= words.drop]
    return " ".join(kept) or text


class PairsModule(lightning.LightningDataModule):
    """Training batches for a model's `Input`, the same ones whatever the number of processes, from any step on."""

    def __init__(self, pairs: Pairs, model: Input, data: Data, changes: Augment, seed: int) -> None:
        super().__init__()
        self.pairs, self.model, self.data, self.changes, self.seed = pairs, model, data, changes, seed

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer, data = self.trainer, self.data
        order = Order(count=len(self.pairs), batch=data.batch_size, seed=self.seed, rank=trainer.global_rank,
                      world=trainer.world_size)
        batches = Batches(self.pairs, order, self.model, data, self.changes.crop)
        return DataLoader(batches, batch_size=None, sampler=Steps(trainer.global_step, trainer.max_steps),
                          num_workers=data.workers, pin_memory=trainer.strategy.root_device.type == "cuda")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        seed = torch_seed(self.seed, self.trainer.global_step, AUGMENTING)
        dice = Dice(seed, len(batch.pixels), rank=self.trainer.global_rank, world=self.trainer.world_size,
                    device=batch.pixels.device)
        wanted = self.model.preprocess
        pixels = augment(batch.pixels.float() / 255, wanted.size, self.changes, dice)
        mean, std = (pixels.new_tensor(x).view(3, 1, 1) for x in (wanted.mean, wanted.std))
        return batch._replace(pixels=(pixels - mean) / std)
