"""One block: mixer, optional cross-attention and MLP on a residual stream, in each of the field's placements."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec
from mm.nn.attention import Attention, AttentionInputs, CrossAttention, DifferentialAttention
from mm.nn.latent import LatentAttention
from mm.nn.linear import add, multiply
from mm.nn.moe import Moe, build_mlp
from mm.nn.norm import build_norm
from mm.positions.visibility import At

MIXERS = {spec.Attention: Attention, spec.Differential: DifferentialAttention, spec.Latent: LatentAttention}


class Block(nn.Module):
    """x: (B, T, D) -> (B, T, D). `spec.Layer` says what each placement computes."""

    def __init__(self, dim: int, layer: spec.Layer, memory_dim: int | None = None):
        super().__init__()
        self.layer = layer
        self.mixer = MIXERS[type(layer.mixer)](dim, layer.mixer)
        self.cross = CrossAttention(dim, memory_dim or dim, layer.cross) if layer.cross else None
        self.mlp = build_mlp(dim, layer.mlp) if layer.mlp else None
        self.mixer_norm = build_norm(layer.norm if layer.mixer_norm else None, dim)
        self.cross_norm = build_norm(layer.cross_norm or layer.norm, dim) if layer.cross else None
        self.mlp_norm = build_norm(layer.norm, dim) if layer.mlp and layer.placement != "parallel" else None
        sandwich = layer.norm if layer.placement == "sandwich" else None
        self.mixer_post_norm = build_norm(sandwich, dim)
        self.cross_post_norm = build_norm(sandwich if layer.cross else None, dim)
        self.mlp_post_norm = build_norm(sandwich if layer.mlp else None, dim)
        self.mixer_scale, self.cross_scale, self.mlp_scale = (
            nn.Parameter(torch.ones(dim) * layer.layer_scale) if here and layer.layer_scale is not None else None
            for here in (True, layer.cross, layer.mlp))

    def reset_parameters(self) -> None:
        for scale in (self.mixer_scale, self.cross_scale, self.mlp_scale):
            if scale is not None:
                nn.init.constant_(scale, self.layer.layer_scale)

    def forward(self, x: Tensor, inputs: AttentionInputs, memory: Tensor | None = None,
                memory_at: At | None = None) -> Tensor:
        if self.layer.placement.startswith("parallel"):
            y = self.mixer_norm(x)
            z = y if self.mlp_norm is None else self.mlp_norm(x)
            mixed = self.branch(self.mixer(y, inputs), self.mixer_scale)
            return add(add(mixed, self.branch(self.think(z, inputs), self.mlp_scale)), x)
        x = self.add(x, lambda y: self.mixer(y, inputs), self.mixer_norm, self.mixer_post_norm, self.mixer_scale)
        if self.cross is not None:
            x = self.add(x, lambda y: self.cross(y, inputs.at, memory, memory_at), self.cross_norm,
                         self.cross_post_norm, self.cross_scale)
        if self.mlp is not None:
            x = self.add(x, lambda y: self.think(y, inputs), self.mlp_norm, self.mlp_post_norm, self.mlp_scale)
        return x

    def think(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        return self.mlp(x, inputs.routes) if isinstance(self.mlp, Moe) else self.mlp(x)

    def add(self, x: Tensor, f: Callable[[Tensor], Tensor], norm: nn.Module, post_norm: nn.Module,
            scale: Tensor | None) -> Tensor:
        """The residual stream plus one branch."""
        match self.layer.placement:
            case "pre":
                return add(self.branch(f(norm(x)), scale), x)
            case "post_branch":
                return add(self.branch(norm(f(x)), scale), x)
            case "sandwich":
                return add(self.branch(post_norm(f(norm(x))), scale), x)
            case "residual_post":
                return norm(add(self.branch(f(x), scale), x))
        raise AssertionError(self.layer.placement)

    def branch(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """A branch's output before it is added: dropout, LayerScale, stochastic depth."""
        if self.training and self.layer.dropout:
            x = F.dropout(x, self.layer.dropout)
        if scale is not None:
            x = multiply(x, scale)
        if self.training and self.layer.drop_path:
            keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.layer.drop_path
            x = x * keep.to(x.dtype) / (1 - self.layer.drop_path)
        return x
