"""A layer, and a stack of them, as data."""

from __future__ import annotations

from typing import Literal

from mm.spec.mixers import Attention, Differential, Latent
from mm.spec.mlp import Mlp, Moe
from mm.spec.norms import LayerNorm, Norm
from mm.spec.positions import Alibi, Buckets
from mm.spec.schema import require, require_rates, spec


@spec
class Layer:
    """One block. `placement` of the norms:

    pre            x + f(norm(x))                     GPT-2, Llama, ViT
    post_branch    x + norm(f(x))                     OLMo 2
    sandwich       x + post(f(norm(x)))               Gemma 2
    residual_post  norm(x + f(x))                     BERT, the original
    parallel       x + mixer(norm(x)) + mlp(norm(x))  GPT-J, Falcon; `parallel_norms`: two norms (GPT-NeoX)

    `mixer_norm` False leaves out the norm before the mixer (ModernBERT's first layer); `cross_norm` stands before
    cross-attention where that has another norm (Moshi). `layer_scale` is the initial value of the branches' learned
    scale; `drop_path` the probability that a row skips a branch while training.
    """

    mixer: Attention | Latent | Differential
    mlp: Mlp | Moe | None = None
    cross: Attention | None = None
    norm: Norm = LayerNorm()
    mixer_norm: bool = True
    cross_norm: Norm | None = None
    placement: Literal["pre", "post_branch", "sandwich", "residual_post", "parallel", "parallel_norms"] = "pre"
    layer_scale: float | None = None
    drop_path: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.placement.startswith("parallel"):
            require(self.cross is None and self.mlp is not None, "a parallel layer has an mlp and no cross-attention")
        require(self.cross is None or self.cross.rope is None, "cross-attention has no rope: it reads another sequence")
        require(self.cross_norm is None or self.cross is not None, "Layer.cross_norm is for cross-attention")
        require_rates(self, "drop_path", "dropout")


@spec
class Stack:
    """Layers over tokens of width `dim`; `memory_dim` is the width that cross-attention reads (None: `dim`);
    `relative` is a position bias that all layers share (T5, ALiBi)."""

    dim: int
    layers: tuple[Layer, ...]
    final_norm: Norm | None = None
    relative: Alibi | Buckets | None = None
    memory_dim: int | None = None

    def __post_init__(self) -> None:
        require(self.dim > 0, "Stack.dim must be positive")
        heads = {attention(layer).heads for layer in self.layers}
        require(self.relative is None or len(heads) == 1, "layers that share a position bias need equal heads")
        extra = any(attention(layer).extra_key for layer in self.layers)
        require(self.relative is None or not extra, "an extra key has no position for a position bias")
        first = any(attention(layer).window.first for layer in self.layers)
        require(self.relative is None or not first, "positions that stay in sight have no distance for a position bias")


def attention(layer: Layer) -> Attention | Latent:
    """The attention inside a layer's mixer: its heads, window and rope."""
    return layer.mixer.base if isinstance(layer.mixer, Differential) else layer.mixer


def drop_path_ramp(rate: float, depth: int) -> list[float]:
    """Stochastic depth that grows linearly from 0 at the first layer to `rate` at the last (Huang et al., 2016)."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
