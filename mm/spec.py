"""A model is data: frozen, keyword-only dataclasses describe each layer, and a stack is a tuple of layers.

Every spec checks itself when it is made and goes through JSON and back (`mm.schema`).
"""

from __future__ import annotations

from typing import Literal

from mm.schema import require, require_rates, spec


# ---------------------------------------------------------------------------------------------- norms
@spec
class LayerNorm:
    eps: float = 1e-5
    bias: bool = True


@spec
class RMSNorm:
    """`order` says where the cast back to the input dtype happens: `cast_then_scale` (Llama, Qwen, Mistral),
    `scale_then_cast` (OLMo 2, GPT-OSS) or `one_plus` (Gemma: (1 + weight) in float32, then the cast)."""

    eps: float = 1e-6
    order: Literal["cast_then_scale", "scale_then_cast", "one_plus"] = "cast_then_scale"


@spec
class L2Norm:
    """Division by the root mean square, without weight (Llama 4's query and key norm)."""

    eps: float = 1e-6


Norm = LayerNorm | RMSNorm | L2Norm


# ------------------------------------------------------------------------------------------- positions
@spec
class LinearScaling:
    factor: float


@spec
class DynamicNTK:
    factor: float
    original: int


@spec
class Llama3Scaling:
    factor: float
    original: int
    low: float = 1.0
    high: float = 4.0


@spec
class Yarn:
    """`mscale` and `mscale_all` are DeepSeek's; both 0 gives the paper's gain 0.1 ln(factor) + 1."""

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all: float = 0.0
    truncate: bool = True
    gain: float | None = None


@spec
class LongRope:
    original: int
    factor: float
    short: tuple[float, ...]
    long: tuple[float, ...]
    gain: float | None = None


Scaling = LinearScaling | DynamicNTK | Llama3Scaling | Yarn | LongRope


@spec
class Axial:
    """Each of `axes` coordinates turns its own equal share of the angles (2-D pictures: EVA, DINOv3)."""

    axes: int = 2


@spec
class Sections:
    """M-RoPE: one frequency table, `sizes[a]` of its angles turned by coordinate a, in runs or interleaved."""

    sizes: tuple[int, ...]
    interleaved: bool = False


@spec
class Mixed:
    """Learned frequencies per layer and head over all `axes` coordinates at once (RoPE-ViT)."""

    axes: int = 2


@spec
class Rope:
    """Rotary positions. `dim` is the rotated width (None: the whole head), `layout` how the pairs lie in it;
    `frequency` multiplies every angle (2 pi where coordinates are fractions of a turn, as in DINOv3)."""

    theta: float = 10000.0
    dim: int | None = None
    layout: Literal["half", "interleaved"] = "half"
    frequency: float = 1.0
    scaling: Scaling | None = None
    axes: Axial | Sections | Mixed | None = None

    def __post_init__(self) -> None:
        require(self.theta > 0, "Rope.theta must be positive")
        require(not isinstance(self.axes, Mixed) or self.scaling is None, "learned mixed axes have no Rope.scaling")
        by_band = isinstance(self.scaling, DynamicNTK | Yarn | LongRope)
        require(not (isinstance(self.axes, Axial) and by_band), "axial rope scales by LinearScaling or Llama3Scaling")

    def check(self, head_dim: int) -> None:
        """Raises InputError unless the angles fit heads of this width."""
        width = self.dim or head_dim
        require(0 < width <= head_dim and width % 2 == 0,
                f"Rope.dim must be even and at most head_dim {head_dim}, not {width}")
        if isinstance(self.axes, Axial):
            require(width // 2 % self.axes.axes == 0, f"{width // 2} angles cannot be shared by {self.axes.axes} axes")
        if isinstance(self.axes, Sections):
            require(sum(self.axes.sizes) == width // 2, f"Sections.sizes must add up to {width // 2} angles")
        if isinstance(self.scaling, LongRope):
            counts = {len(self.scaling.short), len(self.scaling.long)}
            require(counts == {width // 2}, f"LongRope.short and long must hold {width // 2} factors each")


@spec
class Alibi:
    """A penalty that grows with distance, one slope a head."""


@spec
class Buckets:
    """T5's learned bias: one value per head and logarithmic distance bucket."""

    count: int = 32
    distance: int = 128
    two_sided: bool = True

    def __post_init__(self) -> None:
        near = self.count // (4 if self.two_sided else 2)
        require(0 < near < self.distance, f"{self.count} buckets do not reach a distance of {self.distance}")


@spec
class Sight:
    """How far a token sees: `left` and `right` count positions beside its own (None: without limit), `chunk` cuts the
    axis into blocks that do not see each other. Causal is `Sight(right=0)`; Mistral's window W is `left=W - 1`."""

    left: int | None = None
    right: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            require(getattr(self, name) is None or getattr(self, name) >= 0, f"Sight.{name} must not be negative")
        require(self.chunk is None or self.chunk > 0, "Sight.chunk must be positive")


CAUSAL = Sight(right=0)
EVERYWHERE = Sight()


# ------------------------------------------------------------------------------------------ sublayers
@spec
class QKNorm:
    """`over` the width of a head, or `flat` over all heads at once; `after_rope` is Llama 4's order."""

    norm: Norm
    over: Literal["head", "flat"] = "head"
    after_rope: bool = False


@spec
class Attention:
    """Multi-head (`kv_heads` = `heads`), grouped or multi-query attention.

    `gate` multiplies the heads' output by a sigmoid of the input, per head or per element, before `out`;
    `extra_key` adds one learned key and value that everybody sees (ImageBind); `scale` None is head_dim ** -0.5;
    `inner_norm` normalises the concatenated heads before `out` (EVA-02).
    """

    heads: int
    kv_heads: int
    head_dim: int
    sight: Sight = EVERYWHERE
    rope: Rope | None = None
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    out_bias: bool = True
    scale: float | None = None
    qk_norm: QKNorm | None = None
    inner_norm: Norm | None = None
    softcap: float = 0.0
    sinks: bool = False
    extra_key: bool = False
    gate: Literal["none", "head", "element"] = "none"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(min(self.heads, self.kv_heads, self.head_dim) > 0, "Attention needs positive heads and head_dim")
        require_rates(self, "dropout")
        require(self.heads % self.kv_heads == 0, f"{self.heads} heads cannot share {self.kv_heads} key/value heads")
        if self.rope is not None:
            self.rope.check(self.head_dim)
            mixed = isinstance(self.rope.axes, Mixed)
            require(not mixed or self.heads == self.kv_heads, "learned mixed axes need a key head per query head")


@spec
class Differential:
    """Two softmax maps a head, the second subtracted (Differential Transformer, 2024). `base` counts head pairs:
    queries and keys have 2 x base.heads (and kv_heads) of width head_dim, values are 2 x head_dim wide."""

    base: Attention
    lambda_init: float
    norm: Norm = RMSNorm(eps=1e-5)

    def __post_init__(self) -> None:
        flat = self.base.qk_norm is not None and self.base.qk_norm.over == "flat"
        mixed = self.base.rope is not None and isinstance(self.base.rope.axes, Mixed)
        require(not (flat or mixed or self.base.sinks or self.base.extra_key or self.base.inner_norm),
                "differential attention has no flat qk_norm, mixed rope, sinks, extra key or inner_norm")


@spec
class Mlp:
    """`down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))`; `inner_norm` sits before `down` (EVA-02)."""

    hidden: int
    act: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"] = "gelu"
    gated: bool = False
    up_bias: bool = True
    down_bias: bool = True
    inner_norm: Norm | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.hidden > 0, "Mlp.hidden must be positive")
        require_rates(self, "dropout")


@spec
class Layer:
    """One block. `placement` of the norms:

    pre            x + f(norm(x))                     GPT-2, Llama, ViT
    post_branch    x + norm(f(x))                     OLMo 2
    sandwich       x + post(f(norm(x)))               Gemma 2
    residual_post  norm(x + f(x))                     BERT, the original
    parallel       x + mixer(norm(x)) + mlp(norm(x))  GPT-J, Falcon; `parallel_norms`: two norms (GPT-NeoX)

    `mixer_norm` False leaves out the norm before the mixer (ModernBERT's first layer). `layer_scale` is the initial
    value of the branches' learned scale; `drop_path` the probability that a row skips a branch while training.
    """

    mixer: Attention | Differential
    mlp: Mlp | None = None
    cross: Attention | None = None
    norm: Norm = LayerNorm()
    mixer_norm: bool = True
    placement: Literal["pre", "post_branch", "sandwich", "residual_post", "parallel", "parallel_norms"] = "pre"
    layer_scale: float | None = None
    drop_path: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.placement.startswith("parallel"):
            require(self.cross is None and self.mlp is not None, "a parallel layer has an mlp and no cross-attention")
        require(self.cross is None or self.cross.rope is None, "cross-attention has no rope: it reads another sequence")
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


def attention(layer: Layer) -> Attention:
    """The attention inside a layer's mixer."""
    return layer.mixer.base if isinstance(layer.mixer, Differential) else layer.mixer


def drop_path_ramp(rate: float, depth: int) -> list[float]:
    """Stochastic depth that grows linearly from 0 at the first layer to `rate` at the last (Huang et al., 2016)."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
