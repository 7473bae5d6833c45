"""Encoders as data: patches, position tables, pools, heads, towers and pairs of towers, beside the core's `mm.spec`."""

from __future__ import annotations

import math
from typing import Any, Literal

from mm.errors import InputError
from mm.spec import LayerNorm, Mlp, Norm, Stack, attention
from mm.spec.schema import require, require_rates, spec

from .audio.spectrogram import Spectrogram


# --------------------------------------------------------------------------------------------- pictures
@spec
class Patches:
    """The projection of patches of `size` (height, width) pixels, `stride` apart (None: side by side)."""

    size: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    channels: int = 3
    bias: bool = True

    def __post_init__(self) -> None:
        for name in ("size", "stride"):
            pair = getattr(self, name)
            require(pair is None or (len(pair) == 2 and min(pair) > 0), f"Patches.{name} must be two positive numbers")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """How many patches a picture of this many pixels has, down and across; an incomplete last one is left out."""
        (ph, pw), (sh, sw) = self.size, self.stride or self.size
        if height < ph or width < pw:
            raise InputError(f"a picture of {height} x {width} pixels has no whole patch of {ph} x {pw}")
        return (height - ph) // sh + 1, (width - pw) // sw + 1

    def check(self, height: int, width: int) -> None:
        """Raises InputError unless patches that lie side by side fill the picture."""
        self.grid(height, width)
        (ph, pw), overlapping = self.size, self.stride not in (None, self.size)
        if not overlapping and (height % ph or width % pw):
            raise InputError(f"a picture of {height} x {width} pixels is not a whole number of {ph} x {pw} patches: "
                             f"resize it to {height - height % ph} x {width - width % pw}, for example")


@spec
class GridTable:
    """One learned vector per patch, and per prefix token where `prefix`; other grids are reached by interpolation.
    `keep_aspect` interpolates to the square around the grid and takes its first rows and columns; `align_corners`
    keeps the outermost vectors in place. `fixed` starts as 2-D sinusoids and is not trained (MAE, CLIPA)."""

    prefix: bool = True
    mode: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True
    keep_aspect: bool = False
    align_corners: bool = False
    fixed: bool = False


@spec
class FactorTable:
    """One learned vector per row of patches plus one per column; other lengths are reached by linear interpolation,
    with `keep_aspect` as for a GridTable (NaFlexVit's factorized positions)."""

    keep_aspect: bool = False

    @property
    def prefix(self) -> bool:
        """Prefix tokens have no vectors."""
        return False


@spec
class IndexGrid:
    """Rotary coordinates that count patches from `offset`, stretched to a `reference` grid (height, width) where there
    is one (EVA-02, PE-Core, RoPE-ViT)."""

    order: Literal["yx", "xy"] = "yx"
    reference: tuple[int, ...] | None = None
    offset: float = 0.0


@spec
class CentredGrid:
    """Rotary coordinates of patch centres in [-1, 1] (DINOv3). While training they are shifted by up to `shift`,
    stretched per axis by up to `stretch` and together by up to `rescale`."""

    normalise: Literal["separate", "min", "max"] = "separate"
    shift: float = 0.0
    stretch: float = 1.0
    rescale: float = 1.0

    def __post_init__(self) -> None:
        require(self.shift >= 0 and min(self.stretch, self.rescale) >= 1,
                "CentredGrid.shift must not be negative, stretch and rescale not below 1")


# ------------------------------------------------------------------------------------------------ heads
@spec
class TokenPool:
    """The token at `index`: 0 the class token, -1 the last."""

    index: int = 0


@spec
class MeanPool:
    """The mean of the patches, and of the prefix tokens too where `prefix`."""

    prefix: bool = False


@spec
class PrefixPool:
    """The first `tokens` tokens: their mean (AST), or all of them side by side (distilled DeiT, a classifier each)."""

    tokens: int = 2
    join: Literal["mean", "concat"] = "mean"


@spec
class TokenMeanPool:
    """The class token and the mean of the patches, side by side (DINOv2's classifier)."""


@spec
class MaxPool:
    """The largest value of each channel over the patches, and the prefix tokens too where `prefix`."""

    prefix: bool = False


@spec
class MeanMaxPool:
    """Half of a MeanPool plus half of a MaxPool."""

    prefix: bool = False


@spec
class FlattenPool:
    """All `tokens` patches side by side: every place keeps its own share of the vector, so a small tower trained on
    little data need not learn where things are. Serves one picture size only."""

    tokens: int


@spec
class ArgmaxPool:
    """The token with the largest id, the first one if several: OpenAI CLIP's end of text."""


@spec
class EosPool:
    """The first token whose id is `id`, or the first of all where there is none."""

    id: int


@spec
class ProbePool:
    """Attention by one learned query, then a residual MLP (MAP; Zhai et al., 2021; SigLIP). Without `prefix` it reads
    the patches alone."""

    heads: int
    mlp: Mlp
    norm: Norm = LayerNorm(eps=1e-6)
    prefix: bool = True


@spec
class QueryPool:
    """Attention by `queries` learned vectors of width `dim`, normalised, of which `then` makes one (OpenCLIP's
    attentional pooler)."""

    queries: int
    heads: int
    dim: int
    then: TokenPool | MeanPool
    norm: Norm = LayerNorm()

    def __post_init__(self) -> None:
        require(self.dim % self.heads == 0, f"QueryPool.dim {self.dim} cannot be split over {self.heads} heads")


Pool = (TokenPool | MeanPool | PrefixPool | TokenMeanPool | MaxPool | MeanMaxPool | FlattenPool | ArgmaxPool | EosPool
        | ProbePool | QueryPool)


@spec
class Projection:
    """A linear map to `dim`, a classifier or a shared space; `act` tanh makes it ViT's and BERT's pooler."""

    dim: int
    bias: bool = False
    act: Literal["none", "tanh"] = "none"


@spec
class Head:
    """How a tower ends: `pool`, then a norm, then a projection."""

    pool: Pool
    norm: Norm | None = None
    proj: Projection | None = None

    def width(self, dim: int) -> int:
        """The width of a pooled vector where tokens are `dim` wide."""
        match self.pool:
            case QueryPool(dim=own):
                return own
            case FlattenPool(tokens=tokens) | PrefixPool(tokens=tokens, join="concat"):
                return tokens * dim
            case TokenMeanPool():
                return 2 * dim
        return dim


# ----------------------------------------------------------------------------------------------- towers
@spec
class ViTSpec:
    """`image` is the (height, width) in pixels that the position table was made for; any other size is served too.
    Tokens are `cls` class tokens, `registers`, then patches row by row. `coords` are what the rope of the stack turns
    by; prefix tokens do not turn. `native` says that it was trained on pictures at their own aspect (NaFlex)."""

    image: tuple[int, ...]
    patches: Patches
    stack: Stack
    head: Head
    cls: int = 1
    registers: int = 0
    positions: GridTable | FactorTable | None = GridTable()
    coords: IndexGrid | CentredGrid | None = None
    pre_norm: Norm | None = None
    patch_dropout: float = 0.0
    native: bool = False

    def __post_init__(self) -> None:
        require(len(self.image) == 2, "ViTSpec.image must be (height, width)")
        require(min(self.cls, self.registers) >= 0, "ViTSpec.cls and registers must not be negative")
        require(0.0 <= self.patch_dropout < 1.0, f"patch_dropout must lie in [0, 1), not {self.patch_dropout}")
        require(not isinstance(self.head.pool, ArgmaxPool | EosPool), "a picture has no token ids to pool by")
        require(not (isinstance(self.head.pool, FlattenPool) and self.patch_dropout),
                "a flatten pool needs every patch: it goes with patch_dropout 0")
        ropes = any(attention(layer).rope for layer in self.stack.layers)
        require(ropes == (self.coords is not None), "a ViT has rotary layers exactly when it has coords")
        self.patches.grid(*self.image)

    @property
    def channels(self) -> int:
        """The number of channels of a picture."""
        return self.patches.channels


@spec
class Argument:
    """A keyword argument of a constructor, as plain data."""

    name: str
    value: Any


@spec
class Backbone:
    """Any of timm's models as an image tower: `name` is timm's, at its own `image` size (height, width) in pixels, with
    `pool` as its global_pool ("": its own). Features of width `dim` come from timm's own classifier ("own"), from its
    pooled features as they are ("none"), or from a linear layer or MLP on them."""

    name: str
    image: tuple[int, ...]
    dim: int
    pool: str = ""
    head: Literal["own", "none", "linear", "mlp"] = "linear"
    bias: bool = False
    arguments: tuple[Argument, ...] = ()
    dropout: float = 0.0
    drop_path: float | None = None
    patch_dropout: float = 0.0

    def __post_init__(self) -> None:
        require(len(self.image) == 2 and min(self.image) > 0, "Backbone.image must be (height, width)")
        require(self.dim > 0, "Backbone.dim must be positive")
        require_rates(self, "dropout", "patch_dropout")

    @property
    def channels(self) -> int:
        """The number of channels of a picture."""
        return next((argument.value for argument in self.arguments if argument.name == "in_chans"), 3)


@spec
class TextSpec:
    """`context` is the longest text in tokens. With `pad`, tokens of that id are neither seen nor pooled; without it
    they count as text, as in CLIP and SigLIP."""

    vocab: int
    context: int
    stack: Stack
    head: Head
    pad: int | None = None

    def __post_init__(self) -> None:
        require(min(self.vocab, self.context) > 0, "TextSpec.vocab and context must be positive")


@spec
class AudioSpec:
    """A ViT over the spectrograms (1, F, T) that `spectrogram` makes of sounds."""

    tower: ViTSpec
    spectrogram: Spectrogram

    def __post_init__(self) -> None:
        require(self.tower.patches.channels == 1, "a spectrogram has one channel, as should AudioSpec.tower.patches")


@spec
class CLIPSpec:
    """Two towers that end in one space, and a third one for sounds where there is `audio`. `logit_scale` (the
    logarithm) and `logit_bias` are where training starts."""

    image: ViTSpec | Backbone
    text: TextSpec
    logit_scale: float = math.log(1 / 0.07)
    logit_bias: float | None = None
    audio: AudioSpec | None = None

    def __post_init__(self) -> None:
        image, text = out_dim(self.image), out_dim(self.text)
        require(image == text, f"image features are {image} wide and text features {text}")
        audio = out_dim(self.audio.tower) if self.audio else image
        require(image == audio, f"image features are {image} wide and audio features {audio}")

    @property
    def dim(self) -> int:
        """The width of the shared space."""
        return out_dim(self.image)


def out_dim(tower: ViTSpec | TextSpec | Backbone) -> int:
    """The width of a tower's features."""
    if isinstance(tower, Backbone):
        return tower.dim
    return tower.head.proj.dim if tower.head.proj else tower.head.width(tower.stack.dim)
