"""What Mimi's layouts share: where each weight lies, told once, and the names that each layout gives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mm.checkpoint.family import Keys
from mm.checkpoint.tables import SAME, Rule, Table, WeightTransform, rule
from mm.errors import InputError

from ..spec import MimiSpec

# Theirs, then ours: (D, C, kernel), (D, kernel, C); (C, D, kernel), (kernel, D, C); (C, 1, kernel), (kernel, C);
# (D, C, 1), (D, C).
WINDOWS = WeightTransform(lambda xs: [xs[0].transpose(1, 2)], lambda xs: [xs[0].transpose(1, 2)])
TURNED = WeightTransform(lambda xs: [xs[0].permute(2, 1, 0)], lambda xs: [xs[0].permute(2, 1, 0)])
DEPTHWISE = WeightTransform(lambda xs: [xs[0][:, 0].T], lambda xs: [xs[0].T[:, None]])
POINTWISE = WeightTransform(lambda xs: [xs[0][..., 0]], lambda xs: [xs[0][..., None]])


def table_of(spec: MimiSpec, n: Mapping[str, Any]) -> Table:
    """n: the names of a layout, `attention` among them: its rules for one layer, given both prefixes."""
    rules = [rule(n["downsample"], "downsample.weight", WINDOWS), rule(n["upsample"], "upsample.weight", DEPTHWISE)]
    for side, stack in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        rules += [r for theirs, ours, transform in seanet(spec, side, n) for r in affine(theirs, ours, transform)]
        heads = stack.layers[0].mixer.heads
        rules += block(n[f"{side}_stack"] + "layers.{n}.", f"{side}_stack.blocks.{{n}}.", n, heads)
    for part in ("semantic", "acoustic"):
        theirs, ours = n[part], f"quantizer.{part}."
        rules += [rule(f"{theirs}input_proj.weight", ours + "down.weight", POINTWISE),
                  rule(f"{theirs}output_proj.weight", ours + "up.weight", POINTWISE)]
        rules += [rule(f"{theirs}{n['codebook']}.{n[name]}", f"{ours}codebooks.{{n}}.{name}")
                  for name in ("initialized", "usage", "sum")]
    return Table(tuple(rules))


def affine(theirs: str, ours: str, transform: WeightTransform) -> list[Rule]:
    return [rule(f"{theirs}.weight", f"{ours}.weight", transform), rule(f"{theirs}.bias", f"{ours}.bias")]


def seanet(spec: MimiSpec, side: str, n: Mapping[str, Any]) -> Iterator[tuple[str, str, WeightTransform]]:
    """(theirs, ours, way) for every convolution; their lists count activations too."""
    blocks = ["block"] * spec.seanet.residuals
    stage = [*blocks, "conv"] if side == "encoder" else ["transposed", *blocks]
    at = 0
    for i, kind in enumerate(["first", *stage * len(spec.seanet.ratios), "conv"]):
        at += {"first": 0, "block": 1}.get(kind, 2)
        theirs, ours = f"{n[side]}{at}", f"{side}.layers.{i}"
        if kind == "block":
            yield f"{theirs}.block.1.{n['conv']}", f"{ours}.narrow", WINDOWS
            yield f"{theirs}.block.3.{n['conv']}", f"{ours}.wide", WINDOWS
        else:
            transposed = kind == "transposed"
            yield f"{theirs}.{n['transposed' if transposed else 'conv']}", ours, TURNED if transposed else WINDOWS


def block(theirs: str, ours: str, n: Mapping[str, Any], heads: int) -> list[Rule]:
    names = {"mixer.out.weight": "out", "mlp.up.weight": "mlp_up", "mlp.down.weight": "mlp_down",
             "mixer_norm.{x}": "mixer_norm", "mlp_norm.{x}": "mlp_norm", "mixer_scale": "mixer_scale",
             "mlp_scale": "mlp_scale"}
    projections, transform = n["qkv"], n["qkv_way"](heads)
    return [rule(tuple(theirs + name for name in projections), ours + "mixer.qkv.weight", transform),
            *(rule(theirs + n[name], ours + mine) for mine, name in names.items())]


def halved(heads: int) -> WeightTransform:
    """Separate projections whose query and key rows hold rotary pairs as two halves per head; ours are interleaved."""
    def riffle(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def deal(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def load(xs):
        return [torch.cat([riffle(xs[0]), riffle(xs[1]), xs[2]])]

    def save(xs):
        q, k, v = xs[0].chunk(3)
        return [deal(q), deal(k), v]
    return WeightTransform(load, save)


def together(heads: int) -> WeightTransform:
    return SAME


def fixed(keys: Keys, **wanted: Any) -> None:
    """Keys whose value must be this one, where they are given at all."""
    for name, value in wanted.items():
        given = keys.left.pop(name, value)
        if given != value:
            raise InputError(f"{keys.where}: {name} should be {value!r}, not {given!r}: nothing else is supported")


def steps_per_frame(rate: int, hop: int, frame_rate: float, where: str) -> int:
    """Raises InputError unless frames are a whole number, above one, of encoder steps."""
    stride = rate / hop / frame_rate if frame_rate > 0 else 0
    if stride < 2 or abs(stride - round(stride)) > 1e-6:
        raise InputError(f"{where}: {frame_rate} frames a second are not a whole fraction of {rate / hop:g} steps")
    return round(stride)
