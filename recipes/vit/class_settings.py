"""What can be set about pictures with classes, as plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from mm.errors import InputError


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
        jitter: of brightness, contrast and saturation, where there is no policy.
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
