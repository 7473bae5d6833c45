"""Batches of pictures with classes, or of features of a frozen backbone: by step, the same ones after a restart."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import lightning
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm.errors import InputError

from ...encoders.vision.image import Preprocess, read_image
from ..data.pictures import TRIES
from ..data.report import Note
from ..data.sampler import Order, Steps, torch_seed
from .labelled import Labelled
from .settings import ClassAugment, ClassData

READING, MIXING = 8, 9  # the last number of the keys of random generators
Change = Callable[[Image.Image], Tensor]


class ClassBatch(NamedTuple):
    """inputs: pixels (B, 3, h, w), or features (B, D); target: classes (B,) or, of mixed pictures, shares (B, C)."""

    inputs: Tensor
    target: Tensor
    notes: list[Note]


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, the global generators of Python, NumPy and PyTorch, which timm draws from, depend on the key alone."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = torch_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def changes(wanted: Preprocess, settings: ClassAugment) -> Change:
    """timm's random changes of one RGB picture, ending as `wanted` does: (3, h, w). Raises InputError for a policy
    that timm does not know."""
    from timm.data import create_transform

    unit = wanted.rescale * 255  # timm's pixels run to 1, these to `unit`
    mean, std = (tuple(value / unit for value in values) for values in (wanted.mean, wanted.std))
    filters = {"nearest": "nearest", "bilinear": "bilinear", "box": "box", "hamming": "hamming", "lanczos": "lanczos"}
    try:
        made = create_transform(
            wanted.size, is_training=True, scale=(settings.crop, 1.0), hflip=settings.flip, mean=mean, std=std,
            color_jitter=settings.jitter or None, auto_augment=bounded(settings.policy) or None, re_prob=settings.erase,
            re_mode="pixel", interpolation=filters.get(wanted.interpolation, "bicubic"))
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"augment.policy {settings.policy!r} is nothing that timm knows ({error})") from None
    if settings.crop == 1:
        made.transforms[0] = wanted.cut
    return made


def bounded(policy: str) -> str:
    """The policy with magnitudes below 10, at which timm asks Pillow to posterize to no bits, which it refuses."""
    return f"{policy}-mmax9" if policy.startswith("rand") and "mmax" not in policy else policy


class ClassBatches(Dataset[ClassBatch]):
    """Batch by step: `batches[step]` depends on the step, the seed and the data alone."""

    def __init__(self, source: Labelled, change: Change, order: Order) -> None:
        self.source, self.change, self.order = source, change, order

    def __getitem__(self, step: int) -> ClassBatch:
        notes: list[Note] = []
        rows = [self.readable(item, epoch, notes) for epoch, item, _ in self.order.rows(step)]
        pixels, labels = zip(*rows, strict=True)
        return ClassBatch(torch.stack(pixels), torch.tensor(labels), notes)

    def readable(self, index: int, epoch: int, notes: list[Note]) -> tuple[Tensor, int]:
        """The item at `index` or, while its picture cannot be read, the next one."""
        for offset in range(TRIES):
            place = (index + offset) % len(self.source)
            picture = self.source.pictures[place]
            try:
                image = read_image(picture.open())
            except (InputError, OSError) as error:
                notes.append(("picture", picture.name, str(error)))
                continue
            with seeded(self.order.seed, epoch, place, READING):
                return self.change(image), self.source.labels[place]
        raise InputError(f"{self.source.where}: {TRIES} pictures in a row cannot be read; the last: {notes[-1][2]}")


class FeatureBatches(Dataset[ClassBatch]):
    """The same order of features (n, D) that are already there."""

    def __init__(self, features: Tensor, labels: Tensor, order: Order) -> None:
        self.features, self.labels, self.order = features, labels, order

    def __getitem__(self, step: int) -> ClassBatch:
        rows = torch.tensor([item for _, item, _ in self.order.rows(step)])
        return ClassBatch(self.features[rows], self.labels[rows], [])


class ClassModule(lightning.LightningDataModule):
    """Training batches from any step on. `make(order)` gives them by step; they are mixed on the device."""

    def __init__(self, make: Callable[[Order], Dataset[ClassBatch]], count: int, classes: int, data: ClassData,
                 settings: ClassAugment, seed: int) -> None:
        super().__init__()
        self.make, self.count, self.classes, self.data, self.seed = make, count, classes, data, seed
        self.settings, self.mixup = settings, None
        if settings.mixup or settings.cutmix:
            from timm.data import Mixup

            self.mixup = Mixup(settings.mixup, settings.cutmix, prob=settings.mix, label_smoothing=0.0,
                               num_classes=classes)

    def train_dataloader(self) -> DataLoader[ClassBatch]:
        trainer = self.trainer
        order = Order(count=self.count, batch=self.data.batch_size, seed=self.seed, rank=trainer.global_rank,
                      world=trainer.world_size)
        return DataLoader(self.make(order), batch_size=None, num_workers=self.data.workers,
                          sampler=Steps(trainer.global_step, trainer.max_steps),
                          pin_memory=trainer.strategy.root_device.type == "cuda")

    def on_after_batch_transfer(self, batch: ClassBatch, dataloader_idx: int) -> ClassBatch:
        if self.mixup is None:
            return batch
        with seeded(self.seed, self.trainer.global_step, self.trainer.global_rank, MIXING):
            pixels, target = self.mixup(batch.inputs, batch.target)
        return batch._replace(inputs=pixels, target=target)
