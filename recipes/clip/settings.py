"""Settings of the training of a CLIP: plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm.errors import InputError

from ..train.settings import Export, Lora, Optim, Trainer

TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True, kw_only=True)
class Words:
    """How captions that are a name followed by tags are worded, anew each time: with probability `name` the name
    alone, with probability `tags` one to three tags, otherwise the name somewhere among one to three tags.

    Args:
        drop: the probability that a word is left out.
    """

    name: float = 0.4
    tags: float = 0.2
    drop: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Data:
    """Pairs to train on, and how they are read.

    Args:
        path: a table (with two or three of picture, caption and sound), folder, .tar shards or emojicross.
        val: the same kinds of source to evaluate on, or none.
        batch_size: rows of a step, all processes together.
        per_group: a pass has this many random items of each group, side by side in a batch (none: it has every item).
        workers: processes that read pictures.
        canvas: side in pixels at which pictures wait for augmentation (none: the model's size).
        templates: captions of a folder of classes, {} standing for the name.
        words: none takes one of the captions as it is.
        bpe_dropout: the probability that the tokenizer leaves out a merge, which breaks words into more pieces.
    """

    path: str
    val: str | None = None
    batch_size: int = 256
    per_group: int | None = None
    workers: int = 0
    canvas: int | None = None
    templates: tuple[str, ...] = TEMPLATES
    words: Words | None = None
    bpe_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """One affine map and one smooth warp a picture; all values are largest or typical magnitudes.

    rotation and shear in degrees, scale and aspect as natural logarithms, shift as a share of half the side, warp as
    the standard deviation of a 4 x 4 field of shifts, flip the probability of a mirror image.
    """

    rotation: float = 0.0
    scale: float = 0.0
    aspect: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    warp: float = 0.0
    flip: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Colour:
    """One 3 x 3 matrix and offset a picture.

    hue (standard deviation, radians); saturation, contrast and gain of each channel (natural logarithms); brightness
    (a share of white); gray, invert and permute (of channels) are probabilities.
    """

    hue: float = 0.05
    saturation: float = 0.2
    contrast: float = 0.2
    gain: float = 0.0
    brightness: float = 0.1
    gray: float = 0.0
    invert: float = 0.0
    permute: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Texture:
    """blur, outline (dark edges), cutout (a box of one colour) and background (white turns into a colour) are
    probabilities; noise is a standard deviation."""

    blur: float = 0.0
    outline: float = 0.0
    cutout: float = 0.0
    background: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to training pictures; the default is a light set for photographs.

    Args:
        crop: the smallest share of a picture's area that a random crop keeps when it is read (1: the whole picture).
        white: pictures lie on white, which then also fills what a shift uncovers.
    """

    crop: float = 0.5
    white: bool = False
    geometry: Geometry = Geometry()
    colour: Colour = Colour()
    texture: Texture = Texture()


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
        seconds: length of the sound that a spectrogram shows, 10 ms a column (longer sounds are cut, shorter ones
            padded)
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
        image_backbone: takes the place of `image`: any of timm's models by its name, with new weights, or a
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
        positives: the right answers of a row: its own pair alone, or all rows of its group, which are those with an
            equal `group` in the table or, where it has none, equal captions. Equal captions in a batch are counted
            where they are not positives.
        matryoshka: numbers of leading dimensions that should serve alone too; the loss is the mean over them and all.
        chunk: rows that go through the towers at a time, with the memory of that many and the gradient of the whole
            batch (GradCache; none: all of a process's rows).
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
class TowerLora(Lora):
    """Low-rank changes, merged into the exported model, are all that trains of these towers.

    Args:
        towers: some of image, text and audio.
    """

    towers: tuple[str, ...] = ("image", "text")


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
    lora: TowerLora | None = None
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
