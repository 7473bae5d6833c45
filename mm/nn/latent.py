"""Multi-head latent attention (DeepSeek-V2, 2024): a small vector per token holds the keys and values of all heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm import spec
from mm.kernels import attend
from mm.nn.attention import AttentionInputs
from mm.nn.linear import FusedLinear, Linear
from mm.nn.norm import build_norm
from mm.positions import rope as rotary
from mm.positions.visibility import At


class Unfolding(Linear):
    """Latents (..., R) -> (..., H * (N + F)); its weight is also read head by head, so it is never packed away."""


class LatentAttention(nn.Module):
    """x: (B, T, D) -> (B, T, D).

    A cache holds the latent (R) and one rotated key (P) per token, for all heads. Few new tokens look at the latents
    themselves: a head's key projection moves into its query, its value projection behind the weighted sum. Many new
    tokens unfold the latents to keys and values first, which then costs less.
    """

    def __init__(self, dim: int, settings: spec.Latent):
        super().__init__()
        s = self.settings = settings
        width = s.nope_dim + s.rope_dim
        self.qkv = FusedLinear(dim, (s.q_rank or s.heads * width, s.kv_rank, s.rope_dim),
                               (s.bias and s.q_rank is not None, s.bias, s.bias))
        self.q_norm = build_norm(s.norm if s.q_rank else None, s.q_rank or 0)
        self.q_up = Linear(s.q_rank, s.heads * width, bias=False) if s.q_rank else nn.Identity()
        self.kv_norm = build_norm(s.norm, s.kv_rank)
        self.kv_up = Unfolding(s.kv_rank, s.heads * (s.nope_dim + s.value_dim), bias=False)
        self.out = Linear(s.heads * s.value_dim, dim, bias=s.bias)
        self.scale = width**-0.5 if s.scale is None else s.scale
        self.cached = (1, s.rope_dim, s.kv_rank)  # heads, key width and value width of a cache

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        q, key, latent = self.project(x, inputs)
        if inputs.cache is None:
            heads = self.unfolded(q, key, latent, inputs, inputs.at)
        else:
            key, latent, k_at = inputs.cache.write(key, latent, inputs.write)
            look = self.unfolded if self.unfolds(x.shape[1]) else self.absorbed
            heads = look(q, key, latent, inputs, k_at)
        return self.out(heads.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """x -> queries (B, H, T, N + P), the rotated key (B, 1, T, P), the latent (B, 1, T, R)."""
        q, latent, key = self.qkv(x)
        q = self.q_up(self.q_norm(q)).unflatten(-1, (self.settings.heads, -1)).transpose(1, 2)
        plain, rotated = q.split((self.settings.nope_dim, self.settings.rope_dim), -1)
        q = torch.cat([plain, rotary.apply(rotated, inputs.rotation)], -1)
        latent = self.kv_norm(latent).to(q.dtype)  # under autocast norms give float32
        return q, rotary.apply(key.unsqueeze(1), inputs.rotation), latent.unsqueeze(1)

    def unfolds(self, tokens: int) -> bool:
        """Whether keys and values from all latents (S R H (N + F) products) pay for this many queries, each of which
        would look at 2 R + P channels per head instead of N + P + F."""
        s = self.settings
        return tokens * (2 * s.kv_rank - s.nope_dim - s.value_dim) > s.kv_rank * (s.nope_dim + s.value_dim)

    def unfolded(self, q: Tensor, key: Tensor, latent: Tensor, inputs: AttentionInputs, k_at: At) -> Tensor:
        """Heads (B, H, T, F) by keys and values of every head."""
        s = self.settings
        kv = self.kv_up(latent.squeeze(1)).unflatten(-1, (s.heads, -1)).transpose(1, 2)
        plain, v = kv.split((s.nope_dim, s.value_dim), -1)
        k = torch.cat([plain, key.expand(-1, s.heads, -1, -1)], -1)
        return self.attend(q, k, v, inputs, k_at)

    def absorbed(self, q: Tensor, key: Tensor, latent: Tensor, inputs: AttentionInputs, k_at: At) -> Tensor:
        """Heads (B, H, T, F) by one key (latent, rotated key) and one value (latent) that all heads share."""
        s = self.settings
        to_k, to_v = self.kv_up.weight.unflatten(0, (s.heads, -1)).split((s.nope_dim, s.value_dim), 1)
        plain, rotated = q.split((s.nope_dim, s.rope_dim), -1)
        q = torch.cat([torch.einsum("bhtn,hnr->bhtr", plain, to_k), rotated], -1)
        latents = self.attend(q, torch.cat([latent, key], -1), latent, inputs, k_at)
        return torch.einsum("bhtr,hfr->bhtf", latents, to_v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, k_at: At) -> Tensor:
        s = self.settings
        return attend(q, k, v, q_at=inputs.at, k_at=k_at, window=s.window, bias=inputs.bias, scale=self.scale,
                      dropout=s.dropout if self.training else 0.0, mask=inputs.mask)
