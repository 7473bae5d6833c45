"""Settings of the training of a classifier: plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm.errors import InputError

from ..train.settings import Export, Optim, Trainer


@dataclass(frozen=True, kw_only=True)
class ClassData:
    """Pictures with classes, and how they are read.

    Args:
        path: a folder with a sub-folder of pictures per class, or with train and val folders of such; a CSV, TSV or
            JSONL file with columns image, label and, if there is one, split; a folder that holds such a file named
            items or metadata; or .tar shards with .cls or .json labels.
        val: the same kinds of source to evaluate on (none: the split of `path` or, where it has none, what is held
            out).
        holdout: the share of every class that is held out for evaluation where nothing else is.
        size: the side in pixels at which pictures are seen (none: the model's own, 224 for a new one).
        workers: processes that read pictures.
    """

    path: str
    val: str | None = None
    holdout: float = 0.1
    size: int | None = None
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise InputError(f"data.holdout must lie in [0, 1), not {self.holdout}")
        if self.size is not None and self.size < 1:
            raise InputError(f"data.size must be positive, not {self.size}")


@dataclass(frozen=True, kw_only=True)
class ClassAugment:
    """What happens to training pictures, by timm.

    Args:
        crop: the smallest share of a picture's area that a random crop keeps (1: the whole picture, as in
            evaluation).
        flip: the probability of a mirror image.
        policy: an AutoAugment, RandAugment or AugMix string (empty: none).
        jitter: strength of the change of brightness, contrast and saturation, where there is no policy.
        erase: the probability that a random box is erased.
        mixup: their alphas (0: off)
        cutmix: their alphas (0: off)
        mix: the share of batches that are mixed.
    """

    crop: float = 0.25
    flip: float = 0.5
    policy: str = "rand-m9-mstd0.5-inc1"
    jitter: float = 0.3
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise InputError(f"augment.crop must lie in (0, 1], not {self.crop}")
        for name in ("flip", "erase", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"augment.{name} is a probability in [0, 1], not {getattr(self, name)}")
        if min(self.mixup, self.cutmix, self.jitter) < 0:
            raise InputError("augment.mixup, cutmix and jitter must not be negative")


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """A vision transformer to be trained from scratch; the default is the size of ViT-S/16.

    Args:
        patch: a side in pixels.
        mlp: the ratio of hidden to model width.
        pool: the class token or the mean of the patches.
    """

    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp: float = 4.0
    layer_scale: float | None = None
    pool: Literal["token", "mean"] = "token"


@dataclass(frozen=True, kw_only=True)
class VitLoss:
    """Cross-entropy.

    Args:
        smoothing: the share of each target that is spread over all classes.
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise InputError(f"loss.smoothing must lie in [0, 1), not {self.smoothing}")


@dataclass(frozen=True, kw_only=True)
class VitOptim(Optim):
    """As for every run, with `layer_decay`: each layer's learning rate is that of the layer above it times this."""

    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"optim.layer_decay must lie in (0, 1], not {self.layer_decay}")


@dataclass(frozen=True, kw_only=True)
class VitJob:
    """Train or fine-tune a vision transformer as a classifier.

    Args:
        out: the directory of the run; the same command continues what is there.
        model: a checkpoint (directory or hub name; of a CLIP its image tower) to go on from, instead of a new
            `shape`.
        head: `same` keeps a classifier whose classes are those of the data; `new` replaces it whatever it was. A
            model without a classifier gets a new one in any case.
        freeze: `backbone` trains the classifier alone, on features that are computed once, from pictures as
            evaluation sees them.
        drop_path: the probability that a picture skips a block in training, growing from 0 at the first to this.
    """

    data: ClassData
    out: str = "runs/vit"
    model: str | None = None
    shape: VitShape = VitShape()
    head: Literal["same", "new"] = "same"
    freeze: Literal["none", "backbone"] = "none"
    drop_path: float = 0.0
    augment: ClassAugment = ClassAugment()
    loss: VitLoss = VitLoss()
    optim: VitOptim = VitOptim()
    trainer: Trainer = Trainer()
    export: Export = Export()

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise InputError(f"drop_path must lie in [0, 1), not {self.drop_path}")
        mixed = self.augment.mixup or self.augment.cutmix
        if mixed and self.freeze == "backbone":
            raise InputError("augment.mixup and cutmix mix pictures, which a frozen backbone sees only once: leave "
                             "them out with freeze backbone")
        if mixed and self.data.batch_size // self.trainer.devices % 2:
            raise InputError(f"mixup and cutmix mix pairs: data.batch_size {self.data.batch_size} must be even")
