"""The attention layer: projections, norms and gates around `attend`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec
from mm.kernels import attend
from mm.kernels.options import Bias
from mm.nn.linear import FusedLinear, Linear
from mm.nn.moe import Route
from mm.nn.norm import build_norm
from mm.nn.state import KVCache, Write
from mm.positions import rope as rotary
from mm.positions.rope import Rotation
from mm.positions.visibility import At, Mask


@dataclass(frozen=True)
class AttentionInputs:
    """What one attention layer is shown beside its input: where the tokens are, the rotation of this layer's rope, the
    shared position bias, and, when streaming, this layer's cache with the slots to write and, for a few tokens, what
    they see there. `window` is how far it sees where that is not what its spec says, `early` the rotation of queries as
    they meet the first positions, if these stay in sight. `routes` gets the route of this layer's mixture of experts,
    where somebody asked for it."""

    at: At
    window: spec.Window | None = None
    rotation: Rotation | None = None
    early: Rotation | None = None
    bias: Bias | None = None
    cache: KVCache | None = None
    write: Write | None = None
    mask: Mask | None = None
    routes: list[Route] | None = None


class Heads(nn.Module):
    """What self- and cross-attention share: norms of q and k, rotation, cache, extra key, gate, output projection."""

    def __init__(self, dim: int, settings: spec.Attention, value_dim: int | None = None):
        super().__init__()
        s = self.settings = settings
        self.value_dim = value_dim or s.head_dim
        self.widths = (s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * self.value_dim)
        self.q_norm, self.k_norm = (build_qk_norm(s, heads) for heads in (s.heads, s.kv_heads))
        self.sinks = nn.Parameter(torch.zeros(s.heads)) if s.sinks else None
        self.extra_k = nn.Parameter(torch.zeros(s.kv_heads, s.head_dim)) if s.extra_key else None
        self.extra_v = nn.Parameter(torch.zeros(s.kv_heads, self.value_dim)) if s.extra_key else None
        gates = {"none": 0, "head": s.heads, "element": s.heads * self.value_dim}[s.gate]
        self.gate = Linear(dim, gates, bias=False) if gates else None
        self.mixed = nn.Parameter(mixed_frequencies(s)) if s.rope and isinstance(s.rope.axes, spec.Mixed) else None
        self.cached = (s.kv_heads, s.head_dim, self.value_dim)  # heads, key width and value width of a cache

    def reset_parameters(self) -> None:
        for parameter in (self.sinks, self.extra_k, self.extra_v):
            if parameter is not None:
                nn.init.zeros_(parameter)
        if self.mixed is not None:
            self.mixed.data.copy_(mixed_frequencies(self.settings))

    def ready(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Flat projections (B, T, H * E) as normalised heads (B, H, T, E)."""
        return self.split(q, self.q_norm), *self.keys(k, v)

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(k, self.k_norm), v.unflatten(-1, (-1, self.value_dim)).transpose(1, 2)

    def split(self, x: Tensor, norm: nn.Module) -> Tensor:
        s = self.settings
        if s.qk_norm and s.qk_norm.over == "flat":
            x = norm(x)
        x = x.unflatten(-1, (-1, s.head_dim)).transpose(1, 2)
        return norm(x) if s.qk_norm and s.qk_norm.over == "head" and not s.qk_norm.after_rope else x

    def look(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, k_at: At) -> Tensor:
        """Heads -> heads (B, H, T, F)."""
        s, window = self.settings, inputs.window or self.settings.window
        rotation = inputs.rotation
        if self.mixed is not None:
            rotation = rotary.rotation(inputs.at.rotary_positions, s.rope, s.head_dim, self.mixed)
        q_rope = k_rope = rotation
        late_norm = s.qk_norm is not None and s.qk_norm.after_rope
        if inputs.early is not None:
            q, k = twofold(q, k, inputs, window.first)
            q_rope = k_rope = None
        elif rotation is not None and (inputs.cache is not None or self.extra_k is not None or late_norm):
            k, k_rope = rotary.apply(k, rotation), None
        if late_norm:
            q, q_rope = (q if rotation is None else rotary.apply(q, rotation)), None
            q, k = self.q_norm(q), self.k_norm(k)
        if s.temperature is not None:
            q = (q * warmth(inputs.at.position, s.temperature)[:, None, :, None]).to(q.dtype)
        if inputs.cache is not None:
            k, v, k_at = inputs.cache.write(k, v, inputs.write)
        if self.extra_k is not None:
            k, v, k_at = self.with_extra(k, v, k_at)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms give float32
        return attend(q, k, v, q_at=inputs.at, k_at=k_at, window=window, q_rope=q_rope, k_rope=k_rope, bias=inputs.bias,
                      sinks=self.sinks, softcap=s.softcap, scale=s.head_dim**-0.5 if s.scale is None else s.scale,
                      dropout=s.dropout if self.training else 0.0,
                      mask=None if self.extra_k is not None else inputs.mask)

    def with_extra(self, k: Tensor, v: Tensor, k_at: At) -> tuple[Tensor, Tensor, At]:
        extra = (self.extra_k, self.extra_v)
        more_k, more_v = (x.to(k.dtype)[None, :, None].expand(k.shape[0], -1, 1, -1) for x in extra)
        return torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), k_at.with_extra_key()

    def gated(self, heads: Tensor, x: Tensor) -> Tensor:
        """Heads (B, H, T, F) -> (B, T, H * F), times the gate computed from the layer's input x."""
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(x)).unflatten(-1, (self.settings.heads, -1)).transpose(1, 2)
            heads = heads * gate
        return heads.transpose(1, 2).flatten(2)


class Attention(Heads):
    """Self-attention. x: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, settings: spec.Attention):
        super().__init__(dim, settings)
        s = settings
        self.qkv = FusedLinear(dim, self.widths, (s.q_bias, s.k_bias, s.v_bias))
        self.inner_norm = build_norm(s.inner_norm, s.heads * s.head_dim)
        self.out = Linear(s.heads * s.head_dim, dim, bias=s.out_bias)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        q, k, v = self.ready(*self.qkv(x))
        heads = self.look(q, k, v, inputs, inputs.at)
        return self.out(self.inner_norm(self.gated(heads, x)))


class CrossAttention(Heads):
    """x: (B, T, D), memory: (B, S, M) or what `remember` made of it -> (B, T, D)."""

    def __init__(self, dim: int, memory_dim: int, settings: spec.Attention):
        super().__init__(dim, settings)
        s = settings
        self.q = Linear(dim, self.widths[0], bias=s.q_bias)
        self.kv = FusedLinear(memory_dim, self.widths[1:], (s.k_bias, s.v_bias))
        self.inner_norm = build_norm(s.inner_norm, s.heads * s.head_dim)
        self.out = Linear(s.heads * s.head_dim, dim, bias=s.out_bias)

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, M) -> keys (B, K, S, E) and values (B, K, S, F)."""
        k, v = self.keys(*self.kv(memory))
        return k.contiguous(), v.contiguous()

    def forward(self, x: Tensor, at: At, memory: Tensor | tuple[Tensor, Tensor], memory_at: At) -> Tensor:
        k, v = memory if isinstance(memory, tuple) else self.keys(*self.kv(memory))
        q = self.split(self.q(x), self.q_norm)
        heads = self.look(q, k, v, AttentionInputs(at), memory_at)
        return self.out(self.inner_norm(self.gated(heads, x)))


class DifferentialAttention(Heads):
    """x: (B, T, D) -> (B, T, D): the difference of two softmax maps per head pair. Ye et al., 2024.

    Pair h owns query heads 2h and 2h+1 and one value head of twice the width; the subtracted map is weighted by
    lambda = exp(q1 . k1) - exp(q2 . k2) + lambda_init, and the result is normalised per head.
    """

    def __init__(self, dim: int, settings: spec.Differential):
        base = settings.base
        super().__init__(dim, base, 2 * base.head_dim)
        self.differential = settings
        self.cached = (2 * base.kv_heads, base.head_dim, self.value_dim)
        widths = (2 * self.widths[0], 2 * self.widths[1], self.widths[2])
        self.qkv = FusedLinear(dim, widths, (base.q_bias, base.k_bias, base.v_bias))
        self.lambdas = nn.Parameter(torch.randn(4, base.head_dim) * 0.1)
        self.pair_norm = build_norm(settings.norm, self.value_dim)
        self.out = Linear(base.heads * self.value_dim, dim, bias=base.out_bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.lambdas, std=0.1)

    def weight(self) -> Tensor:
        q1, k1, q2, k2 = self.lambdas.float()
        return (q1 @ k1).exp() - (q2 @ k2).exp() + self.differential.lambda_init

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        q, k, v = self.ready(*self.qkv(x))
        kv = self.settings.kv_heads
        q = q.unflatten(1, (kv, -1, 2)).transpose(2, 3).flatten(1, 3)  # the two queries of a group beside their own key
        heads = self.look(q, k, v.repeat_interleave(2, 1), inputs, inputs.at).unflatten(1, (kv, 2, -1))
        first, second = heads[:, :, 0].flatten(1, 2), heads[:, :, 1].flatten(1, 2)
        heads = self.pair_norm(first - self.weight().to(x.dtype) * second) * (1 - self.differential.lambda_init)
        return self.out(self.gated(heads, x))


def twofold(q: Tensor, k: Tensor, inputs: AttentionInputs, first: int) -> tuple[Tensor, Tensor]:
    """Heads (B, H, T, E) -> (B, H, T, 2 E): one half meets the `first` keys, turned as if a query lay no further from
    them than its window reaches, the other half all later keys. What meets nothing is 0."""
    early = (inputs.at.position < first)[:, None, :, None]
    q = torch.cat([rotary.apply(q, inputs.early), rotary.apply(q, inputs.rotation)], -1)
    k = rotary.apply(k, inputs.rotation)
    return q, torch.cat([torch.where(early, k, 0), torch.where(early, 0, k)], -1)


def warmth(position: Tensor, settings: spec.Temperature) -> Tensor:
    """(B, T) positions -> the factor of each query."""
    return 1 + settings.slope * torch.log1p(torch.floor((position.float() + 1) / settings.every))


def build_qk_norm(settings: spec.Attention, heads: int) -> nn.Module:
    if settings.qk_norm is None:
        return nn.Identity()
    return build_norm(settings.qk_norm.norm, settings.head_dim * (heads if settings.qk_norm.over == "flat" else 1))


def mixed_frequencies(settings: spec.Attention) -> Tensor:
    """(axes, H, R/2) initial frequencies of learned mixed axes: 1-D bands per head, turned by a random angle."""
    rope = settings.rope
    pairs = (rope.dim or settings.head_dim) // 2
    axes = rope.axes.axes
    band = 1.0 / rope.theta ** (torch.arange(pairs, dtype=torch.float32) // axes * axes / pairs)
    direction = F.normalize(torch.randn(axes, settings.heads, pairs), dim=0)
    return direction * band
