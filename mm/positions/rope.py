"""Rotary positions of any rank, computed from positions and never from a table with a maximum length.

Su et al., 2021. One rule for text, pictures and sound: angle j of a head is `coordinate[axis(j)] * frequency(j)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mm import spec
from mm.errors import InputError
from mm.spec import Rope
from mm.tree import register


@dataclass(frozen=True)
class Rotation:
    """Rotations to apply. cos, sin: (B, 1 or H, T, R), each angle already laid out over the R rotated channels;
    `sin` carries the sign of the pair's partner, so that the rotation is `x * cos + partner(x) * sin`."""

    cos: Tensor
    sin: Tensor
    layout: str

    @cached_property
    def circle(self) -> Tensor:
        """(B, 1 or H, T, R / 2) complex, of interleaved pairs."""
        return torch.complex(self.cos[..., ::2], self.sin[..., 1::2])


register(Rotation, meta=("layout",))


def rotation(positions: Tensor, rope: Rope, head_dim: int, learned: Tensor | None = None) -> Rotation:
    """Rotations for positions (B, T) or (B, T, A); `learned` (A, H, R/2) holds the frequencies of `Mixed` axes.

    Raises InputError when a rope of several axes meets positions of another rank."""
    width = rope.dim or head_dim
    check_axes(positions, rope)
    at = positions.to(torch.promote_types(positions.dtype, torch.float32))
    if learned is not None:
        half = sum(at[:, None, :, axis, None] * bands[:, None] for axis, bands in enumerate(learned.to(at.dtype)))
        gain = 1.0
    else:
        frequency, gain = frequencies(rope, width, positions)
        half = (spread(at, rope, width) * frequency.to(at.dtype)).unsqueeze(1)
    half = half * rope.frequency if rope.frequency != 1.0 else half
    cos, sin = half.cos() * gain, half.sin() * gain
    if rope.layout == "half":
        return Rotation(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1), rope.layout)
    return Rotation(cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2), rope.layout)


def apply(x: Tensor, by: Rotation) -> Tensor:
    """x: (B, H, T, E) -> (B, H, T, E); the first R channels turn, at least in float32."""
    width = by.cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([apply(x[..., :width], by), x[..., width:]], -1)
    wide = x.to(torch.promote_types(x.dtype, by.cos.dtype))
    if by.layout == "interleaved" and not torch.compiler.is_compiling() and x.stride(-1) == 1:
        return spun(wide, by).to(x.dtype)
    half = by.layout == "half"
    partner = wide.roll(width // 2, -1) if half else wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * by.cos, partner, by.sin).to(x.dtype)


def spun(x: Tensor, by: Rotation) -> Tensor:
    """Neighbouring channels turned as complex numbers: one pass over x, where compilers prefer real ones."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * by.circle).flatten(-2)


def check_axes(positions: Tensor, rope: Rope) -> None:
    given = 1 if positions.ndim == 2 else positions.shape[-1]
    match rope.axes:
        case spec.Axial(axes=axes) | spec.Mixed(axes=axes):
            holds = positions.ndim == 3 and given == axes
        case spec.Sections(sizes=sizes):
            axes = len(sizes)
            holds = given == axes or positions.ndim == 2  # plain text: the same position on every axis
        case None:
            return
    if not holds:
        raise InputError(f"a rope of {axes} axes needs coordinates (B, T, {axes}), not {tuple(positions.shape)}")


def spread(positions: Tensor, rope: Rope, width: int) -> Tensor:
    """The coordinate that each of the width/2 angles turns by: (B, T, width/2), or (B, T, 1) when there is one axis."""
    match rope.axes:
        case _ if positions.ndim == 2:
            return positions.unsqueeze(-1)
        case None:
            return positions[..., :1]
        case spec.Axial(axes=axes):
            return positions.repeat_interleave(width // 2 // axes, -1)
        case spec.Sections():
            return positions[..., section_axes(rope.axes, positions.device)]
    raise AssertionError(rope.axes)


def section_axes(sections: spec.Sections, device: torch.device) -> Tensor:
    """Which coordinate each angle of an M-RoPE head reads: in runs (Qwen2-VL), or 0 1 2 0 1 2 ... 0 0 (Qwen3-VL)."""
    axes = [axis for axis, size in enumerate(sections.sizes) for _ in range(size)]
    if sections.interleaved:
        axes = [0] * len(axes)
        for axis, size in list(enumerate(sections.sizes))[1:]:
            axes[axis:size * len(sections.sizes):len(sections.sizes)] = [axis] * size
    return torch.tensor(axes, device=device)


# ----------------------------------------------------------------------------------------- frequencies
def frequencies(rope: Rope, width: int, positions: Tensor) -> tuple[Tensor, float]:
    """((width/2,) or (B, 1, width/2) radians per position, gain on cos and sin)."""
    shares = rope.axes.axes if isinstance(rope.axes, spec.Axial) else 1
    count = width // 2 // shares
    exponent = torch.arange(count, device=positions.device, dtype=torch.float32) / count
    period = rope.theta ** exponent
    plain = 1.0 / period
    match rope.scaling:
        case None:
            scaled, gain = plain, 1.0
        case spec.LinearScaling(factor=factor):
            scaled, gain = plain / factor, 1.0
        case spec.DynamicNTK() as ntk:
            scaled, gain = dynamic_ntk(ntk, rope.theta, exponent, width, positions), 1.0
        case spec.Llama3Scaling() as scaling:
            scaled, gain = llama3(scaling, plain), 1.0
        case spec.Yarn() as yarn:
            scaled, gain = yarn_blend(yarn, rope.theta, plain, width), yarn_gain(yarn)
        case spec.LongRope() as long:
            scaled, gain = long_rope(long, period, positions), long_gain(long)
    return scaled.repeat(*[1] * (scaled.ndim - 1), shares), gain


def reach(positions: Tensor) -> Tensor:
    """Length of each row so far: (B, 1, 1)."""
    first = positions if positions.ndim == 2 else positions[..., 0]
    return (first.amax(1) + 1).to(torch.float32)[:, None, None]


def dynamic_ntk(ntk: spec.DynamicNTK, theta: float, exponent: Tensor, width: int, positions: Tensor) -> Tensor:
    """The base grows once a row is longer than the original context (each row by its own length)."""
    length = reach(positions).clamp(min=ntk.original)
    base = theta * (ntk.factor * length / ntk.original - (ntk.factor - 1)) ** (width / (width - 2))
    return 1.0 / base ** exponent


def llama3(scaling: spec.Llama3Scaling, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended (Llama 3.1)."""
    rotations = scaling.original * plain / (2 * math.pi)
    keep = ((rotations - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor


def yarn_blend(yarn: spec.Yarn, theta: float, plain: Tensor, width: int) -> Tensor:
    """Fast angles extrapolate, slow ones interpolate, with a linear ramp over the index (Peng et al., 2023)."""
    def index(rotations: float) -> float:
        return width * math.log(yarn.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
    low, high = index(yarn.beta_fast), index(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, device=plain.device) - low) / max(high - low, 1e-3)
    keep = 1 - ramp.clamp(0, 1)
    return keep * plain + (1 - keep) * plain / yarn.factor


def yarn_gain(yarn: spec.Yarn) -> float:
    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    if yarn.gain is not None:
        return yarn.gain
    return gain(yarn.mscale) / gain(yarn.mscale_all) if yarn.mscale and yarn.mscale_all else gain(1.0)


def long_rope(long: spec.LongRope, period: Tensor, positions: Tensor) -> Tensor:
    """One divisor per angle, from the long list once a row is longer than the original context (Phi-3)."""
    pick = torch.where(reach(positions) > long.original, period.new_tensor(long.long), period.new_tensor(long.short))
    return 1.0 / (pick * period)


def long_gain(long: spec.LongRope) -> float:
    if long.gain is not None:
        return long.gain
    return math.sqrt(1 + math.log(long.factor) / math.log(long.original)) if long.factor > 1 else 1.0
