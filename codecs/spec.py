"""A neural codec as data (Mimi: Défossez et al., 2024)."""

from __future__ import annotations

import math

from mm.spec import Attention, Layer, LayerNorm, Mlp, Rope, Stack, Window
from mm.spec.schema import require, require_rates, spec


@spec
class Seanet:
    """Convolutions between samples and vectors. `ratios` are the decoder's strides in order, the encoder's reversed;
    every stage has `residuals` residual blocks, block j dilated by dilation_base ** j, with width / `compress` inside.
    Kernels of strided and transposed convolutions are twice the stride."""

    channels: int = 1
    filters: int = 64
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    residuals: int = 1
    dilation_base: int = 2
    compress: int = 2
    kernel: int = 7
    residual_kernel: int = 3
    last_kernel: int = 3

    def __post_init__(self) -> None:
        sizes = (self.channels, self.filters, self.residuals, self.dilation_base, self.compress, self.kernel,
                 self.residual_kernel, self.last_kernel, *self.ratios)
        require(bool(self.ratios) and min(sizes) > 0, "Seanet needs positive sizes and at least one ratio")
        require(self.filters % self.compress == 0, "Seanet.filters must be a multiple of compress")

    @property
    def hop(self) -> int:
        """Samples per vector."""
        return math.prod(self.ratios)


@spec
class Quantizer:
    """`codebooks` of `size` entries of width `dim`; the first `semantic` of them and the others each quantise the same
    vector, through projections of their own."""

    codebooks: int = 32
    semantic: int = 1
    size: int = 2048
    dim: int = 256

    def __post_init__(self) -> None:
        require(min(self.semantic, self.dim) > 0 and self.size > 1, "Quantizer needs positive sizes")
        require(self.codebooks > self.semantic, "Quantizer.codebooks must be more than the semantic ones")


@spec
class MimiSpec:
    """`rate` in Hz. A frame is `seanet.hop` x `stride` samples: the transformers run `stride` steps per frame."""

    rate: int = 24000
    seanet: Seanet = Seanet()
    encoder: Stack
    decoder: Stack
    stride: int = 2
    quantizer: Quantizer = Quantizer()

    def __post_init__(self) -> None:
        require(self.rate > 0 and self.stride > 1, "MimiSpec.rate must be positive and stride at least 2")
        require(self.encoder.dim == self.decoder.dim, "the encoder's and the decoder's stack must be equally wide")

    @property
    def frame(self) -> int:
        """Samples per frame."""
        return self.seanet.hop * self.stride

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.rate / self.frame


@spec
class Learning:
    """How codebooks learn (`codecs.learning`).

    decay: of the running averages that entries are. rounds: of k-means at the start. expire: entries that are used less
    than this share of the mean are replaced by vectors of the batch, every `look` steps. dropout: the probability that
    a sequence uses some of the acoustic codebooks only. skip: the probability that a sequence is not quantised at all.
    """

    decay: float = 0.99
    rounds: int = 50
    expire: float = 0.1
    look: int = 5
    dropout: float = 0.5
    skip: float = 0.5

    def __post_init__(self) -> None:
        require_rates(self, "decay", "expire")
        require(min(self.rounds, self.look) > 0, "Learning.rounds and look must be positive")
        require(min(self.dropout, self.skip) >= 0 and max(self.dropout, self.skip) <= 1,
                "Learning.dropout and skip must lie in [0, 1]")


def mimi_stack(*, dim: int = 512, depth: int = 8, heads: int = 8, hidden: int = 2048, window: int = 250,
               theta: float = 10000.0, eps: float = 1e-5, layer_scale: float = 0.01) -> Stack:
    """The transformer of Mimi's encoder or decoder; a step sees itself and the `window` - 1 before."""
    require(heads > 0 and dim % heads == 0, f"{heads} heads do not divide a width of {dim}")
    mixer = Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, window=Window(left=window - 1, right=0),
                      rope=Rope(theta=theta, layout="interleaved"), q_bias=False, k_bias=False, v_bias=False,
                      out_bias=False)
    layer = Layer(mixer=mixer, mlp=Mlp(hidden=hidden, up_bias=False, down_bias=False), norm=LayerNorm(eps=eps),
                  layer_scale=layer_scale)
    return Stack(dim=dim, layers=(layer,) * depth)
