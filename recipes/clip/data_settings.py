"""What can be set about training data, as plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

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
        batch_size: rows of all processes together.
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
