"""HuBERT: samples to a vector for every 20 ms of speech (Hsu et al., 2021)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mm.checkpoint import pretrained
from mm.errors import InputError
from mm.nn.transformer import Transformer

from .families.hubert import FAMILIES
from .spec import HubertSpec

EPS = 1e-7


class Hubert(pretrained.Pretrained):
    """wave (B, L) at 16 kHz -> (B, T, D)."""

    kind, families = "hubert", FAMILIES

    def __init__(self, settings: HubertSpec):
        super().__init__()
        s = self.spec = settings
        inputs, dim = (1, *s.channels[:-1]), s.stack.dim
        self.convs = nn.ModuleList(Feature(a, b, kernel, stride, s, first=i == 0) for i, (a, b, kernel, stride) in
                                   enumerate(zip(inputs, s.channels, s.kernels, s.strides, strict=True)))
        self.project_norm = nn.LayerNorm(s.channels[-1]) if s.project_norm else nn.Identity()
        self.project = nn.Linear(s.channels[-1], dim)
        self.positions = nn.Conv1d(dim, dim, s.near, padding=s.near // 2, groups=s.groups)
        self.entry_norm = nn.LayerNorm(dim) if s.entry_norm else nn.Identity()
        self.stack = Transformer(s.stack)

    def forward(self, wave: Tensor) -> Tensor:
        """Raises InputError on another shape or too few samples."""
        if wave.ndim != 2 or wave.shape[1] < self.spec.shortest:
            raise InputError(f"waves should be (B, L), L at least {self.spec.shortest}, not {tuple(wave.shape)}")
        if self.preprocessing is not None and self.preprocessing.normalise:
            wave = (wave - wave.mean(1, keepdim=True)) / (wave.var(1, keepdim=True, correction=0) + EPS).sqrt()
        x = wave.unsqueeze(1)
        for conv in self.convs:
            x = conv(x)
        x = self.project(self.project_norm(x.transpose(1, 2)))
        near = self.positions(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.stack(self.entry_norm(x + F.gelu(near)))


class Feature(nn.Module):
    """x: (B, C, T) -> (B, D, T'): a convolution, the norm that it has, GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, settings: HubertSpec, *, first: bool):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=settings.conv_bias)
        self.norm = nn.LayerNorm(outputs) if settings.conv_norm == "layer" else None
        if settings.conv_norm == "group" and first:
            self.norm = nn.GroupNorm(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if isinstance(self.norm, nn.LayerNorm):
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        elif self.norm is not None:
            x = self.norm(x)
        return F.gelu(x)
