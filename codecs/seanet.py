"""SEANet (Tagliasacchi et al., 2020) as Mimi uses it: samples to vectors and back, all causal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .conv import Conv, ConvTranspose, Debt, Past
from .spec import Seanet

Layers = list[Past | Debt]
BLOCK = 31 << 20  # bytes; glibc learns from blocks of less than 32 MiB


class Residual(nn.Module):
    """x: (B, T, C) -> (B, T, C): x plus two convolutions, each behind an ELU."""

    def __init__(self, dim: int, hidden: int, kernel: int, dilation: int):
        super().__init__()
        self.narrow = Conv(dim, hidden, kernel, dilation=dilation, elu=True)
        self.wide = Conv(hidden, dim, 1, elu=True)

    def forward(self, x: Tensor, state: Past | None = None, rows: Tensor | None = None,
                valid: Tensor | None = None) -> Tensor:
        y = self.wide(self.narrow(x, state, rows))
        return x + y if torch.is_grad_enabled() else y.add_(x)

    def init_state(self, batch: int, steps: int, dtype: torch.dtype, device: torch.device) -> Past:
        return self.narrow.init_state(batch, steps, dtype, device)

    def after(self, steps: int) -> int:
        return steps


class Chain(nn.Module):
    """Layers over (B, T, C), streamed with one state each. An input without state and without gradients goes through in
    pieces of `piece` steps, which stay in the processor's cache."""

    def __init__(self, layers: list[nn.Module], piece: int):
        super().__init__()
        self.layers, self.piece = nn.ModuleList(layers), piece

    def forward(self, x: Tensor, state: Layers | None = None, rows: Tensor | None = None,
                valid: Tensor | None = None) -> Tensor:
        """valid: (B,) steps that exist, where windows beyond them follow transformers' rule."""
        if state is None and x.shape[1] > self.piece and not torch.is_grad_enabled():
            return self.in_pieces(x, valid)
        for i, layer in enumerate(self.layers):
            x = layer(x, None if state is None else state[i], rows, valid)
            valid = None if valid is None else layer.after(valid)
        return x

    def in_pieces(self, x: Tensor, valid: Tensor | None) -> Tensor:
        state = self.init_state(len(x), self.piece, x.dtype, x.device)
        out = []
        for start in range(0, x.shape[1], self.piece):
            left = None if valid is None else (valid - start).clamp(min=0)
            out.append(self(x[:, start : start + self.piece], state, None, left))
        return torch.cat(out, 1)

    def init_state(self, batch: int, steps: int, dtype: torch.dtype, device: torch.device) -> Layers:
        """For calls of up to `steps` inputs."""
        keep_memory()
        states = []
        for layer in self.layers:
            states.append(layer.init_state(batch, steps, dtype, device))
            steps = layer.after(steps)
        return states


def keep_memory() -> None:
    """Has glibc keep memory that is freed: after one block of this size, up to twice as much. Otherwise it goes back to
    the system after every piece, and fetching it again is a tenth to a fifth of the time of long or many sounds."""
    torch.empty(BLOCK, dtype=torch.uint8, device="cpu")


def build_encoder(s: Seanet, dim: int, piece: int) -> Chain:
    """(B, L, channels) -> (B, L / hop, D). piece: samples."""
    width = s.filters
    layers: list[nn.Module] = [Conv(s.channels, width, s.kernel)]
    for ratio in reversed(s.ratios):
        layers += [*residuals(s, width), Conv(width, 2 * width, 2 * ratio, stride=ratio, elu=True)]
        width *= 2
    return Chain([*layers, Conv(width, dim, s.last_kernel, elu=True)], piece)


def build_decoder(s: Seanet, dim: int, piece: int) -> Chain:
    """(B, T, D) -> (B, T * hop, channels). piece: vectors."""
    width = s.filters * 2 ** len(s.ratios)
    layers: list[nn.Module] = [Conv(dim, width, s.kernel)]
    for ratio in s.ratios:
        width //= 2
        layers += [ConvTranspose(2 * width, width, ratio), *residuals(s, width)]
    return Chain([*layers, Conv(width, s.channels, s.last_kernel, elu=True)], piece)


def residuals(s: Seanet, width: int) -> list[Residual]:
    return [Residual(width, width // s.compress, s.residual_kernel, s.dilation_base**j) for j in range(s.residuals)]
