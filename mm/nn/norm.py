"""Norms over the last dimension. Statistics are taken in float32 (float64 stays), whatever the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec


class LayerNorm(nn.LayerNorm):
    """x: (..., D) -> (..., D). Ba et al., 2016."""

    def __init__(self, dim: int, settings: spec.LayerNorm):
        super().__init__(dim, eps=settings.eps, bias=settings.bias)


class RMSNorm(nn.Module):
    """x: (..., D) -> (..., D). Zhang & Sennrich, 2019; the three orders of scale and cast differ in half precision."""

    def __init__(self, dim: int, settings: spec.RMSNorm):
        super().__init__()
        self.eps, self.order = settings.eps, settings.order
        self.weight = nn.Parameter(torch.empty(dim))
        self.floor = torch.tensor(self.eps, device="cpu")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.order == "one_plus" else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return self.plain(x)
            return F.rms_norm(x, x.shape[-1:], 1 + self.weight if self.order == "one_plus" else self.weight, self.eps)
        y = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        if self.order == "cast_then_scale":
            return self.weight * y.to(x.dtype)
        weight = self.weight.float()
        return (y * (1 + weight if self.order == "one_plus" else weight)).to(x.dtype)

    def plain(self, x: Tensor) -> Tensor:
        """The same without gradients, in half the calls of `F.rms_norm` on a CPU."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.floor, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(1 + self.weight if self.order == "one_plus" else self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, order={self.order}"


class L2Norm(nn.Module):
    """x: (..., D) -> (..., D), divided by its root mean square."""

    def __init__(self, dim: int, settings: spec.L2Norm):
        super().__init__()
        self.eps = settings.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, x.shape[-1:], None, self.eps).to(x.dtype)


NORMS = {spec.LayerNorm: LayerNorm, spec.RMSNorm: RMSNorm, spec.L2Norm: L2Norm}


def build_norm(settings: spec.Norm | None, dim: int) -> nn.Module:
    """The module for a norm spec; None is the identity."""
    return nn.Identity() if settings is None else NORMS[type(settings)](dim, settings)
