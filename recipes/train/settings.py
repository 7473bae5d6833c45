"""What can be set about a training run, as plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm.errors import InputError

from ..data.settings import Augment, Data


@dataclass(frozen=True, kw_only=True)
class Tower:
    """`depth` pre-norm layers; mlp is the ratio of hidden to model width, drop_path grows from 0 to this rate."""

    width: int
    depth: int = 12
    heads: int
    mlp: float = 4.0
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ImageTower(Tower):
    """A vision transformer; size and patch are sides in pixels. pool: the class token, the mean of the patches, or
    all of them side by side (for little data; such a model cannot be written for open_clip or transformers)."""

    size: int = 224
    patch: int = 32
    width: int = 768
    heads: int = 12
    pool: Literal["token", "mean", "flatten"] = "token"
    patch_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TextTower(Tower):
    """A causal transformer read at the end token, or one that sees both ways and is averaged.

    vocab: entries of a tokenizer to be trained on the captions (none: CLIP's own of 49,408). context: in tokens.
    """

    vocab: int | None = None
    context: int = 77
    width: int = 512
    heads: int = 8
    pool: Literal["end", "mean"] = "end"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A CLIP to be trained from scratch; the default is the size of ViT-B/32. scale: the first factor on cosines."""

    dim: int = 512
    scale: float = 1 / 0.07
    image: ImageTower = ImageTower()
    text: TextTower = TextTower()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The softmax contrastive loss. smoothing: the share of each target that is spread over the whole batch."""

    smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up (in steps) and cosine.

    final: what is left of `lr` at the end. clip: the largest gradient norm (0: any). ema: the decay of the averaged
    weights that are evaluated and exported (0: the weights themselves).
    """

    lr: float = 5e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    warmup: int = 100
    final: float = 0.0
    clip: float = 1.0
    ema: float = 0.999

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optim.{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.lr <= 0:
            raise InputError(f"optim.lr must be positive, not {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How long and on what. precision: auto is bf16-mixed on a GPU, 32-true elsewhere. threads: of the CPU (none:
    PyTorch's choice). log, evaluate and save count steps; evaluation and saving also happen at the end."""

    max_steps: int = 1000
    seed: int = 0
    accelerator: str = "auto"
    devices: int = 1
    precision: str = "auto"
    threads: int | None = None
    log: int = 10
    evaluate: int = 500
    save: int = 500

    def __post_init__(self) -> None:
        for name in ("max_steps", "devices", "log", "evaluate", "save"):
            if getattr(self, name) < 1:
                raise InputError(f"trainer.{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Export:
    """The model directory written at the end."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class ClipJob:
    """Train a CLIP on pairs of pictures and captions.

    out: the directory of the run; the same command continues what is there. model: a checkpoint (directory or hub
    name) to fine-tune, with its own preprocessing and tokenizer, instead of a new model of this `shape`.
    """

    data: Data
    out: str = "runs/clip"
    model: str | None = None
    shape: Shape = Shape()
    augment: Augment = Augment()
    loss: Loss = Loss()
    optim: Optim = Optim()
    trainer: Trainer = Trainer()
    export: Export = Export()


FREE = frozenset(("trainer.max_steps", "trainer.devices", "trainer.threads", "trainer.log", "trainer.evaluate",
                  "trainer.save", "data.workers", "export.dtype"))  # may change when a run goes on
