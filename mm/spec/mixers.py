"""Mixers as data: attention of every kind."""

from __future__ import annotations

from typing import Literal

from mm.spec.norms import Norm, RMSNorm
from mm.spec.positions import CAUSAL, EVERYWHERE, DynamicNTK, LongRope, Mixed, Rope, Window
from mm.spec.schema import require, require_rates, spec


@spec
class QKNorm:
    """`over` the width of a head, or `flat` over all heads at once; `after_rope` is Llama 4's order."""

    norm: Norm
    over: Literal["head", "flat"] = "head"
    after_rope: bool = False


@spec
class Temperature:
    """Queries at position p times `1 + slope ln(1 + floor((p + 1) / every))`, against attention that spreads thin in
    long texts (Llama 4's layers without rope)."""

    slope: float = 0.1
    every: int = 8192

    def __post_init__(self) -> None:
        require(self.every > 0, "Temperature.every must be positive")


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
    window: Window = EVERYWHERE
    rope: Rope | None = None
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    out_bias: bool = True
    scale: float | None = None
    qk_norm: QKNorm | None = None
    temperature: Temperature | None = None
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
        if self.window.first:
            by_length = self.rope is not None and isinstance(self.rope.scaling, DynamicNTK | LongRope)
            late = self.qk_norm is not None and self.qk_norm.after_rope
            require(not (by_length or late or self.extra_key or (self.rope is not None and self.rope.axes)),
                    "positions that stay in sight go with a rope of one axis that does not depend on the length, a "
                    "qk_norm before it, and no extra key")


@spec
class Latent:
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values come from one vector of `kv_rank` per token, and
    one rotary key of `rope_dim` that all heads share. A head's queries and keys are `nope_dim` + `rope_dim` wide, its
    values `value_dim`; `q_rank` None projects queries directly. `scale` None is (nope_dim + rope_dim) ** -0.5."""

    heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    q_rank: int | None = None
    window: Window = CAUSAL
    bias: bool = False
    scale: float | None = None
    norm: Norm = RMSNorm()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = (self.heads, self.kv_rank, self.nope_dim, self.rope_dim, self.value_dim, self.q_rank or 1)
        require(min(sizes) > 0, "Latent needs positive sizes")
        require_rates(self, "dropout")
        require(not isinstance(self.rope.axes, Mixed), "latent attention has no learned mixed axes")
        require(self.window.first == 0, "latent attention has no positions that stay in sight")
        self.rope.check(self.rope_dim)

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        """The width that the rope turns."""
        return self.rope_dim

    @property
    def extra_key(self) -> bool:
        return False


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
