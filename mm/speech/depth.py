"""The depth transformer: the codes of one frame, one after the other, each step with weights of its own.

All steps of all frames are one batched product when it trains, x (K, N, D): K codebooks, N frames. RQ-Transformer, Lee
et al., 2022; weights per step: Moshi, Défossez et al., 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec
from mm.kernels import attend
from mm.nn.gated import silu_mlp
from mm.nn.linear import StepLinear, add, multiply
from mm.nn.mlp import ACTIVATIONS
from mm.nn.norm import build_norm
from mm.positions import rope as rotary
from mm.positions.rope import Rotation
from mm.positions.visibility import At, along
from mm.speech.streams import CodeTables, TextTable


@dataclass(frozen=True)
class Cache:
    """Room for the steps of one frame: of each layer, keys and values (B, K, steps, E); where step k and those up to it
    are."""

    layers: list[tuple[Tensor, Tensor]]
    at: list[tuple[At, At]]


class StepNorm(nn.Module):
    """x: (K, N, D) -> (K, N, D), with weights per step."""

    def __init__(self, settings: spec.Norm, steps: int, dim: int):
        super().__init__()
        self.settings = settings
        self.weight = nn.Parameter(torch.ones(steps, dim))
        self.bias = nn.Parameter(torch.zeros(steps, dim)) if getattr(settings, "bias", False) else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, steps: slice = slice(None)) -> Tensor:
        """steps: those of x, all by default."""
        wide, shape = x if x.dtype == torch.float64 else x.float(), x.shape[-1:]
        centred = isinstance(self.settings, spec.LayerNorm)
        y = F.layer_norm(wide, shape, eps=self.settings.eps) if centred else F.rms_norm(wide, shape, None,
                                                                                       self.settings.eps)
        y = y * self.weight[steps].unsqueeze(1)
        return (y if self.bias is None else y + self.bias[steps].unsqueeze(1)).to(x.dtype)


class StepAttention(nn.Module):
    """x: (K, N, D) -> (K, N, D), where steps see those before them."""

    def __init__(self, dim: int, settings: spec.Attention, sets: tuple[int, ...]):
        super().__init__()
        s = self.settings = settings
        self.heads = (s.heads, s.kv_heads, s.kv_heads)
        self.qkv = StepLinear(sets, dim, sum(self.heads) * s.head_dim)
        self.out = StepLinear(sets, s.heads * s.head_dim, dim)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.settings.head_dim)).permute(1, 2, 0, 3)
        at = along(x.shape[1], x.shape[0], device=x.device)
        y = attend(*heads.split(self.heads, 1), q_at=at, k_at=at, window=self.settings.window, q_rope=rotation,
                   k_rope=rotation)
        return self.out(y.permute(2, 0, 1, 3).flatten(2))

    def step(self, x: Tensor, k: int, rotation: Rotation | None, cache: tuple[Tensor, Tensor],
             at: tuple[At, At]) -> Tensor:
        """x: (B, D) -> (B, D)."""
        heads = self.qkv.step(x, k).unflatten(-1, (-1, 1, self.settings.head_dim))
        q, key, value = heads.split(self.heads, 1)
        if rotation is not None:
            q, key = rotary.apply(q, rotation), rotary.apply(key, rotation)
        for held, new in zip(cache, (key, value), strict=True):
            held[:, :, k:k + 1] = new
        keys, values = (held[:, :, :k + 1] for held in cache)
        y = attend(q, keys, values, q_at=at[0], k_at=at[1])
        return self.out.step(y.flatten(1), k)


class StepMlp(nn.Module):
    """x: (K, N, D) -> (K, N, D), a gated MLP. `widths` are those of the sets, padded with weights that stay 0."""

    def __init__(self, dim: int, settings: spec.Mlp, sets: tuple[int, ...], widths: tuple[int, ...]):
        super().__init__()
        self.act, self.silu = ACTIVATIONS[settings.act], settings.act == "silu" and max(sets) > 0
        self.widths = widths or (settings.hidden,) * (max(sets) + 1)
        self.up = StepLinear(sets, dim, 2 * max(self.widths))  # gate, then up
        self.down = StepLinear(sets, max(self.widths), dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.up.reset_parameters()
        self.down.reset_parameters()
        for i, width in enumerate(self.widths):
            self.up.weight[i].unflatten(0, (2, -1))[:, width:] = 0
            self.down.weight[i, :, width:] = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.silu and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            return silu_mlp(x, *(part.of_steps(part.weight) for part in (self.up, self.down)))
        gate, up = self.up(x).chunk(2, -1)
        return self.down(multiply(self.act(gate), up))

    def step(self, x: Tensor, k: int) -> Tensor:
        gate, up = self.up.step(x, k).chunk(2, -1)
        return self.down.step(multiply(self.act(gate), up), k)


class DepthBlock(nn.Module):
    """x: (K, N, D) -> (K, N, D)."""

    def __init__(self, dim: int, layer: spec.Layer, sets: tuple[int, ...], widths: tuple[int, ...]):
        super().__init__()
        self.mixer, self.mlp = StepAttention(dim, layer.mixer, sets), StepMlp(dim, layer.mlp, sets, widths)
        self.mixer_norm, self.mlp_norm = build_norm(layer.norm, dim), build_norm(layer.norm, dim)
        self.initial = layer.layer_scale
        self.mixer_scale, self.mlp_scale = (
            None if layer.layer_scale is None else nn.Parameter(torch.full((dim,), float(layer.layer_scale)))
            for _ in range(2))

    def reset_parameters(self) -> None:
        if self.initial is not None:
            nn.init.constant_(self.mixer_scale, self.initial)
            nn.init.constant_(self.mlp_scale, self.initial)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        x = add(scaled(self.mixer(self.mixer_norm(x), rotation), self.mixer_scale), x)
        return add(scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale), x)

    def step(self, x: Tensor, k: int, rotation: Rotation | None, cache: tuple[Tensor, Tensor],
             at: tuple[At, At]) -> Tensor:
        x = add(scaled(self.mixer.step(self.mixer_norm(x), k, rotation, cache, at), self.mixer_scale), x)
        return add(scaled(self.mlp.step(self.mlp_norm(x), k), self.mlp_scale), x)


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else multiply(x, scale)


class DepthStack(nn.Module):
    """x: (K, N, D) -> (K, N, D), after the final norm where the stack has one."""

    def __init__(self, settings: spec.Depth):
        super().__init__()
        stack, sets = settings.stack, settings.weights
        self.stack = stack
        self.blocks = nn.ModuleList(DepthBlock(stack.dim, layer, sets, settings.hidden) for layer in stack.layers)
        steps = len(sets) if settings.sets > 1 else 1
        self.final_norm = StepNorm(stack.final_norm, steps, stack.dim) if stack.final_norm else None

    def rotation(self, positions: Tensor) -> Rotation | None:
        mixer = self.stack.layers[0].mixer
        return None if mixer.rope is None else rotary.rotation(positions, mixer.rope, mixer.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        rotation = self.rotation(torch.arange(len(x), device=x.device).unsqueeze(0))
        for block in self.blocks:
            x = block(x, rotation)
        return x if self.final_norm is None else self.final_norm(x)

    def cache(self, batch: int, steps: int, like: Tensor) -> Cache:
        """Room for the steps of one frame."""
        layers = [tuple(like.new_empty(batch, layer.mixer.kv_heads, steps, layer.mixer.head_dim) for _ in range(2))
                  for layer in self.stack.layers]
        places = torch.arange(steps, device=like.device).expand(batch, steps)
        return Cache(layers, [(At(places[:, :1], regular=True), At(places[:, :k + 1], regular=True))
                              for k in range(steps)])

    def step(self, x: Tensor, k: int, cache: Cache) -> Tensor:
        """x: (B, D) of step k, after those before it -> (B, D)."""
        rotation = self.rotation(torch.full((1, 1), k, device=x.device)) if self.stack.layers[0].mixer.rope else None
        for block, held in zip(self.blocks, cache.layers, strict=True):
            x = block.step(x, k, rotation, held, cache.at[k])
        if self.final_norm is None:
            return x
        i = min(k, len(self.final_norm.weight) - 1)
        return self.final_norm(x.unsqueeze(0), slice(i, i + 1)).squeeze(0)


class DepthDecoder(nn.Module):
    """What the temporal stack made of frames, and their tokens -> logits of their codes."""

    def __init__(self, settings: spec.DuplexSpec):
        super().__init__()
        depth, text = settings.depth, settings.text
        self.count, dim, sets = depth.codebooks, depth.stack.dim, depth.weights
        self.input = StepLinear((0,) * self.count if depth.one_input else sets, settings.stack.dim, dim)
        self.text = TextTable(text, dim, depth.rank)
        later, steps = self.count - 1, tuple(range(self.count))
        self.codes = CodeTables(later, settings.card + 1, depth.rank or dim) if later else None
        self.up = StepLinear(steps[:-1], depth.rank, dim) if depth.rank and later else None
        self.stack = DepthStack(depth)
        self.head = StepLinear(steps, dim, settings.card, settings.head_bias)

    def hidden(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x: (B, T, M), tokens (B, 1 + K, T), the last codes unread -> (K, B, T, D) before the heads."""
        shape, x, tokens = x.shape[:2], x.flatten(0, 1), tokens.transpose(1, 2).flatten(0, 1)
        before = self.text(tokens[:, 0]).unsqueeze(0)
        if self.codes is not None:
            codes = self.codes.each(tokens[:, 1:self.count])
            before = torch.cat([before, codes if self.up is None else self.up(codes)])
        x = self.input(x.expand(self.count, -1, -1)) + before
        return self.stack(x).unflatten(1, shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """(K, B, T, D) -> (K, B, T, card)."""
        return self.head(hidden.flatten(1, 2)).unflatten(1, hidden.shape[1:3])

    def begin(self, x: Tensor) -> tuple[Cache, Tensor]:
        """x: (B, M) of one frame -> room for its steps, and what each reads of it (K, B, D)."""
        return self.stack.cache(len(x), self.count, x), self.input(x.expand(self.count, -1, -1))

    def step(self, x: Tensor, token: Tensor, k: int, cache: Cache) -> Tensor:
        """x: (B, D) of `begin`, the token (B,) before codebook k -> its logits (B, card)."""
        if k == 0:
            before = self.text(token)
        else:
            before = self.codes.one(token, k - 1)
            before = before if self.up is None else self.up.step(before, k - 1)
        return self.head.step(self.stack.step(x + before, k, cache), k)
