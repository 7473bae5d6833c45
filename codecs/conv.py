"""Causal convolutions over (B, T, C) that stream: what a stream needs of its past is an argument.

Without gradients a convolution is one matrix product over windows, and a transposed one a product and an overlap-add:
for the few steps of a frame both are up to ten times as fast as torch's on a CPU, and the result is the same. Many
windows that overlap most are left to torch, up to twice as fast because it does not write them out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.errors import InputError
from mm.nn.linear import linear, plain
from mm.tree import register

LONG = 480  # steps, from which torch's convolution is the faster one, as measured

# With AVX-512, expm1 and so ELU take seven times as long in a process until torch takes the first power of 32 numbers.
torch.pow(10.0, torch.ones(32))


@dataclass
class Past:
    """held (B, P + T, C): the last P inputs of the stream, then room for T new ones. fresh (B,) bool: no input yet."""

    held: Tensor
    fresh: Tensor


register(Past)


@dataclass
class Debt:
    """carry (B, S, C): what the last input of a transposed convolution adds to the S outputs after its own."""

    carry: Tensor


register(Debt)


class Conv(nn.Module):
    """x: (B, T, C) -> (B, T / stride, D), causal. Before the first input are zeros, or copies of it where `replicate`.
    `elu`: the activation is applied to the input.

    weight: (D, kernel, C), so that a window of the input is a row of the product.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1, bias: bool = True,
                 replicate: bool = False, elu: bool = False):
        super().__init__()
        self.inputs, self.outputs, self.kernel, self.stride, self.dilation = inputs, outputs, kernel, stride, dilation
        self.replicate, self.elu = replicate, elu
        self.past = (kernel - 1) * dilation + 1 - stride
        if self.past < 0:
            raise InputError(f"a kernel of {kernel} leaves gaps at a stride of {stride}")
        self.weight = nn.Parameter(torch.empty(outputs, kernel, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset(self.weight, self.bias, self.kernel * self.inputs)

    def forward(self, x: Tensor, state: Past | None = None, rows: Tensor | None = None,
                valid: Tensor | None = None) -> Tensor:
        """state: continue a stream, rows (B,) bool says which rows advance. valid: (B,) steps that exist; windows that
        reach beyond them see zeros there, or copies of the last one where `replicate` (transformers' rule)."""
        if valid is not None and self.stride > 1:
            x = self.cut(x, valid)
        if torch.is_grad_enabled():
            return self.convolve(x)
        held = self.fill(x, state)
        out = self.product(held)
        if state is not None and self.past:
            self.keep(held, state, rows)
        return out

    def convolve(self, x: Tensor) -> Tensor:
        """The same with gradients."""
        x = F.elu(x) if self.elu else x
        if self.replicate:
            x = torch.cat([x[:, :1].expand(-1, self.past, -1), x], 1)
        elif self.past:
            x = F.pad(x, (0, 0, self.past, 0))
        if self.kernel == self.stride == 1:
            return linear(x, self.weight[:, 0], self.bias)
        return self.slide(x)

    def slide(self, x: Tensor) -> Tensor:
        """(B, P + T, C) -> (B, T / stride, D) by torch, as a picture whose channels come last, so that nothing is moved
        in memory."""
        picture, weight = (y.transpose(1, 2).unsqueeze(2) for y in (x, self.weight))
        out = F.conv2d(picture, weight, self.bias, (1, self.stride), dilation=(1, self.dilation))
        return out.squeeze(2).transpose(1, 2)

    def fill(self, x: Tensor, state: Past | None) -> Tensor:
        """(B, P + T, C): the past, then the activated input."""
        if not self.past:
            return F.elu(x) if self.elu else x
        batch, steps, channels = x.shape
        length = self.past + steps
        held = x.new_zeros(batch, length, channels) if state is None else state.held[:, :length]
        new = held[:, self.past :]
        new.copy_(x)
        if self.elu:
            F.elu_(new)
        if self.replicate:
            old = held[:, : self.past]
            first = new[:, :1].expand_as(old)
            old.copy_(first if state is None else torch.where(state.fresh[:, None, None], first, old))
        return held

    def product(self, held: Tensor) -> Tensor:
        if self.stride == 1 < min(self.kernel, self.inputs) and held.shape[:2].numel() >= LONG and plain(
                held, self.weight) and not torch.compiler.is_compiling():
            return self.slide(held)
        reach = (self.kernel - 1) * self.dilation + 1
        windows = held.unfold(1, reach, self.stride)[..., :: self.dilation]  # (B, T / stride, C, kernel)
        return linear(windows.transpose(2, 3).flatten(2), self.weight.flatten(1), self.bias)

    def keep(self, held: Tensor, state: Past, rows: Tensor | None) -> None:
        """The last inputs become the past of the rows that advance."""
        old, last = held[:, : self.past], held[:, held.shape[1] - self.past :]
        if rows is not None:
            last = torch.where(rows[:, None, None], last, old)
        elif held.shape[1] < 2 * self.past:
            last = last.clone()  # they overlap
        old.copy_(last)
        if self.replicate:
            state.fresh.logical_and_(torch.zeros_like(state.fresh) if rows is None else ~rows)

    def cut(self, x: Tensor, valid: Tensor) -> Tensor:
        """x (B, T, C) with zeros, or the last value of the row, at the steps from `valid` (B,) on."""
        beyond = (torch.arange(x.shape[1], device=x.device) >= valid[:, None]).unsqueeze(-1)
        last = x.gather(1, (valid - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, x.shape[2])) if self.replicate else 0.0
        return torch.where(beyond, last, x)

    def init_state(self, batch: int, steps: int, dtype: torch.dtype, device: torch.device) -> Past:
        """For calls of up to `steps` inputs."""
        room = self.past + steps if self.past else 0
        return Past(torch.zeros(batch, room, self.inputs, dtype=dtype, device=device),
                    torch.ones(batch, dtype=torch.bool, device=device))

    def after(self, steps: int) -> int:
        return -(-steps // self.stride)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, kernel={self.kernel}, stride={self.stride}, dilation={self.dilation}"


class Upsampling(nn.Module):
    """What transposed convolutions share. x: (B, T, C) -> (B, T * stride, D): step t adds to the outputs of its own
    stride and of the next, and the last step's debt waits for the next call."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.inputs, self.outputs, self.stride = inputs, outputs, stride


    def overlap(self, parts: Tensor, bias: Tensor | None, state: Debt | None, rows: Tensor | None) -> Tensor:
        """(B, T, 2 * stride, D) -> (B, T * stride, D)"""
        own, late = parts[:, :, : self.stride], parts[:, :, self.stride :]
        if torch.is_grad_enabled():
            out = own + F.pad(late[:, :-1], (0, 0, 0, 0, 1, 0))
            return (out if bias is None else out + bias).flatten(1, 2)
        out = own.clone(memory_format=torch.contiguous_format) if bias is None else own + bias
        out[:, 1:].add_(late[:, :-1])
        if state is not None:
            out[:, 0].add_(state.carry)
            last = late[:, -1]
            state.carry.copy_(last if rows is None else torch.where(rows[:, None, None], last, state.carry))
        return out.flatten(1, 2)

    def init_state(self, batch: int, steps: int, dtype: torch.dtype, device: torch.device) -> Debt:
        return Debt(torch.zeros(batch, self.stride, self.outputs, dtype=dtype, device=device))

    def after(self, steps: int) -> int:
        return steps * self.stride

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, kernel={2 * self.stride}, stride={self.stride}"


class ConvTranspose(Upsampling):
    """A transposed convolution of kernel 2 * stride behind an ELU. weight: (2 * stride, D, C)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(inputs, outputs, stride)
        self.weight = nn.Parameter(torch.empty(2 * stride, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset(self.weight, self.bias, 2 * self.stride * self.outputs)

    def forward(self, x: Tensor, state: Debt | None = None, rows: Tensor | None = None,
                valid: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return self.convolve(x)
        parts = linear(F.elu(x), self.weight.flatten(0, 1)).unflatten(-1, (2 * self.stride, self.outputs))
        return self.overlap(parts, self.bias, state, rows)

    def convolve(self, x: Tensor) -> Tensor:
        """The same as two products, of each step and of the one before, which need no addition in parts."""
        x = F.elu(x)
        before, bias = F.pad(x[:, :-1], (0, 0, 1, 0)), self.bias.repeat(self.stride)
        own, late = (half.flatten(0, 1) for half in self.weight.split(self.stride))
        out = linear(x, own, bias) + linear(before, late)
        return out.view(len(x), -1, self.outputs)


class DepthwiseTranspose(Upsampling):
    """A transposed convolution of kernel 2 * stride, every channel by itself. weight: (2 * stride, C)."""

    def __init__(self, channels: int, stride: int):
        super().__init__(channels, channels, stride)
        self.weight = nn.Parameter(torch.empty(2 * stride, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset(self.weight, None, 2 * self.stride)

    def forward(self, x: Tensor, state: Debt | None = None, rows: Tensor | None = None) -> Tensor:
        return self.overlap(x.unsqueeze(2) * self.weight, None, state, rows)


def reset(weight: Tensor, bias: Tensor | None, fan: int) -> None:
    """Uniform within fan ** -0.5, as torch's convolutions begin."""
    for parameter in (weight, bias):
        if parameter is not None:
            nn.init.uniform_(parameter, -(fan**-0.5), fan**-0.5)
