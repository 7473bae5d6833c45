"""What can be set about a training run, as plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm.errors import InputError

from ..clip.data_settings import Augment, Data


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
    """A vision transformer; size and patch are sides in pixels.

    Args:
        pool: the class token, the mean of the patches, or all of them side by side (for little data; such a model
            cannot be written for open_clip or transformers).
    """

    size: int = 224
    patch: int = 32
    width: int = 768
    heads: int = 12
    pool: Literal["token", "mean", "flatten"] = "token"
    patch_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TextTower(Tower):
    """A causal transformer read at the end token, or one that sees both ways and is averaged.

    Args:
        vocab: entries of a tokenizer to be trained on the captions (none: CLIP's own of 49,408).
        context: in tokens.
    """

    vocab: int | None = None
    context: int = 77
    width: int = 512
    heads: int = 8
    pool: Literal["end", "mean"] = "end"


@dataclass(frozen=True, kw_only=True)
class AudioTower(Tower):
    """A vision transformer over log-mel spectrograms, its patches averaged.

    Args:
        seconds: of sound that a picture of it shows, 10 ms a row (longer sounds are cut, shorter ones padded)
        mels: its columns.
        patch: a side, of both.
    """

    seconds: float = 10.0
    mels: int = 128
    patch: int = 16
    width: int = 384
    heads: int = 6
    patch_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A CLIP to be trained from scratch; the default is the size of ViT-B/32.

    Args:
        scale: the first factor on cosines (none: 1 / 0.07, for a siglip loss 10 with an offset of -10).
        image_backbone: what takes the place of `image`: any of timm's models by its name, with new weights, or a
            checkpoint (directory or owner/model) of a ViT or CLIP, whose image tower and preprocessing are taken and
            get a new projection (`lock.image: 0` trains that and the final norm alone).
        audio: a third tower, for sounds (none: there is none).
    """

    dim: int = 512
    scale: float | None = None
    image: ImageTower = ImageTower()
    image_backbone: str | None = None
    text: TextTower = TextTower()
    audio: AudioTower | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale <= 0:
            raise InputError(f"shape.scale must be positive, not {self.scale}")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The contrastive loss, the mean over every two of image, text and audio that a batch holds.

    Args:
        kind: softmax over the batch (CLIP), or a sigmoid of every pair (siglip), which trains an offset of the logits
            too.
        smoothing: the share of a softmax's target that is spread over the whole batch.
        positives: what is right for a row: its own pair alone, or all rows of its group, which are those with an
            equal `group` in the table or, where it has none, equal captions. Equal captions in a batch are counted
            where they are not positives.
        matryoshka: numbers of leading dimensions that should serve alone too; the loss is the mean over them and all.
        chunk: rows that go through the towers at a time, at the memory of so many and the gradient of the whole batch
            (GradCache; none: all of a process's rows).
    """

    kind: Literal["softmax", "siglip"] = "softmax"
    smoothing: float = 0.0
    positives: Literal["pair", "group"] = "pair"
    matryoshka: tuple[int, ...] = ()
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise InputError(f"loss.smoothing must lie in [0, 1), not {self.smoothing}")
        if self.kind == "siglip" and self.smoothing:
            raise InputError("loss.smoothing belongs to the softmax loss: leave it out with siglip")
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"loss.chunk must be at least 1, not {self.chunk}")


@dataclass(frozen=True, kw_only=True)
class Lock:
    """Towers that do not train, and so have no gradient, no optimizer state and no place in checkpoints.

    Args:
        image: true locks the whole tower (LiT), a number N all of it but its last N blocks, final norm
            and head.
        text: the same for the text tower.
        audio: the same for the audio tower.
    """

    image: bool | int = False
    text: bool | int = False
    audio: bool | int = False


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank changes, merged into the exported model, are all that trains of these towers.

    Args:
        towers: some of image, text and audio.
        rank: the rank of the changes.
        alpha: the changes are multiplied by alpha / rank.
        layers: ends of the names of the linear layers to change, such as qkv or mlp.up (none: all of them).
    """

    towers: tuple[str, ...] = ("image", "text")
    rank: int = 8
    alpha: float = 16.0
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and a schedule.

    Args:
        lr: the highest learning rate.
        weight_decay: AdamW's weight decay, applied to matrices.
        beta1: AdamW's decay of the mean of gradients.
        beta2: AdamW's decay of the mean of squared gradients.
        eps: AdamW's epsilon.
        warmup: steps in which the learning rate rises from 0 to `lr`.
        schedule: after the warm-up the learning rate falls as a cosine, or (wsd) stays and then falls linearly.
        decay: the share of all steps in which it falls (wsd).
        final: the share of `lr` that is left at the end.
        clip: the largest gradient norm (0: any).
        ema: the decay of the averaged weights that are evaluated and exported (0: the weights themselves).
    """

    lr: float = 5e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    warmup: int = 100
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: float = 0.2
    final: float = 0.0
    clip: float = 1.0
    ema: float = 0.999

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optim.{name} must lie in [0, 1), not {getattr(self, name)}")
        if not 0 < self.decay <= 1:
            raise InputError(f"optim.decay must lie in (0, 1], not {self.decay}")
        if self.lr <= 0:
            raise InputError(f"optim.lr must be positive, not {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How long a run is, and on what.

    Args:
        max_steps: how many steps the optimizer takes.
        seed: fixes the order of the data, new weights and every random draw.
        accelerator: cpu, gpu, or auto.
        devices: processes, on one GPU each.
        precision: auto is bf16-mixed on a GPU, 32-true elsewhere.
        threads: CPU threads (none: PyTorch's choice).
        log: steps between two lines of the log.
        evaluate: steps between two evaluations; there is one at the end as well.
        save: steps between two checkpoints; there is one at the end as well.
    """

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
    """The model directory written at the end.

    Args:
        dtype: the type of its weights.
    """

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class ClipJob:
    """Train a CLIP on pairs of pictures, captions and sounds.

    Args:
        out: the directory of the run; the same command continues what is there.
        model: a checkpoint (directory or hub name) to fine-tune, with its own preprocessing and tokenizer, instead of
            a new model of this `shape`.
        lora: none trains the towers themselves.
        patch_dropout: the share of every picture's patches that training leaves out (none: what the model or the
            shape says).
        shard: spread weights, gradients and optimizer state over the devices (FSDP2) instead of a copy on each (DDP).
    """

    data: Data
    out: str = "runs/clip"
    model: str | None = None
    shape: Shape = Shape()
    augment: Augment = Augment()
    loss: Loss = Loss()
    lock: Lock = Lock()
    lora: Lora | None = None
    patch_dropout: float | None = None
    shard: bool = False
    optim: Optim = Optim()
    trainer: Trainer = Trainer()
    export: Export = Export()

    def __post_init__(self) -> None:
        if self.data.batch_size < 2:
            raise InputError("data.batch_size is 1: a contrastive loss compares the rows of a batch and needs two")
        towers = ("image", "text") if self.lora is None else self.lora.towers
        odd = [name for name in towers if name not in ("image", "text", "audio")]
        if odd or not towers:
            raise InputError(f"lora.towers should name some of image, text and audio, not {', '.join(odd) or 'none'}")


# What may change when a run goes on.
FREE = frozenset(("trainer.max_steps", "trainer.devices", "trainer.threads", "trainer.log", "trainer.evaluate",
                  "trainer.save", "data.workers", "export.dtype", "loss.adversarial_from"))
