"""How transformers names and packs experts: one tensor per expert, or all in one, gate and up side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint.family import Keys
from mm.checkpoint.tables import Rule, WeightTransform, rule
from mm.errors import InputError
from mm.spec import DecoderSpec, Moe
from mm.text.families.hf import TO_HF

STACKED = WeightTransform(lambda xs: [torch.stack(list(xs))], lambda xs: list(xs[0].unbind()))
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def halves(x: Tensor) -> list[Tensor]:
    """(X, 2 I, ...) -> gate and up (X, I, ...), one after the other."""
    return list(x.chunk(2, 1))


def joined(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(xs), 1)


def dealt(x: Tensor) -> list[Tensor]:
    """(X, 2 I, ...) -> gate and up (X, I, ...), row by row in turn."""
    return [x[:, ::2], x[:, 1::2]]


def riffled(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs), 2).flatten(1, 2)


HALVES = WeightTransform(lambda xs: halves(xs[0]), lambda xs: [joined(xs)])
HALVES_TRANSPOSED = WeightTransform(lambda xs: halves(xs[0].mT), lambda xs: [joined(xs).mT])
DEALT = WeightTransform(lambda xs: dealt(xs[0]), lambda xs: [riffled(xs)])
DEALT_TRANSPOSED = WeightTransform(lambda xs: dealt(xs[0].mT), lambda xs: [riffled(xs).mT])
TRANSPOSED = WeightTransform(lambda xs: [xs[0].mT], lambda xs: [xs[0].mT])


# Values of four bits (sign, two of exponent, one of mantissa), and how many share a scale: OCP Microscaling, MXFP4.
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SHARING = 32


def widened(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks (..., G, 16) bytes of two values each, the low half first, scales (..., G) powers of two plus 127
    -> (..., 32 G), exact in bfloat16."""
    pairs = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    values = torch.tensor(LEVELS, dtype=torch.bfloat16, device=blocks.device)[pairs.int()]
    return torch.ldexp(values, scales.int().unsqueeze(-1) - 127).to(torch.bfloat16).flatten(-2)


def packed_shapes(x: Tensor) -> list[Tensor]:
    """Empty blocks and scales of a weight (..., I): packed files are read, not written."""
    groups = -(-x.shape[-1] // SHARING)
    return [x.new_empty(*x.shape[:-1], groups, SHARING // 2), x.new_empty(*x.shape[:-1], groups)]


DEALT_MXFP4 = WeightTransform(lambda xs: dealt(widened(*xs)), lambda xs: packed_shapes(riffled(xs)))
MXFP4 = WeightTransform(lambda xs: [widened(*xs)], lambda xs: packed_shapes(xs[0]))


def expert_rules(theirs: str, ours: str, count: int, names: Mapping[str, str] = NAMES) -> list[Rule]:
    """`theirs.3.up_proj.weight`, one tensor an expert: the layout of published files, and the one that is written."""
    return [rule(tuple(f"{theirs}.{i}.{name}.weight" for i in range(count)), f"{ours}.{part}.weight", STACKED)
            for part, name in names.items()]


def fused_rules(theirs: str, ours: str, gate_up: WeightTransform = HALVES,
                down: WeightTransform | None = None) -> list[Rule]:
    """`theirs.gate_up_proj` and `theirs.down_proj`, all experts in one tensor."""
    both = (f"{ours}.gate.weight", f"{ours}.up.weight")
    last = [] if down is None else [down]
    return [rule(theirs + ".gate_up_proj", both, gate_up), rule(theirs + ".down_proj", f"{ours}.down.weight", *last)]


def mixture(spec: DecoderSpec) -> Moe:
    """The first mixture of a stack. Raises InputError where there is none, or transformers cannot name its parts."""
    found = next((layer.mlp for layer in spec.stack.layers if isinstance(layer.mlp, Moe)), None)
    if found is None or found.expert.act not in TO_HF:
        raise InputError("the hf layout of this kind has layers with experts and an activation that transformers names")
    return found


def leave_training(keys: Keys) -> None:
    """Take the keys that say how a router is trained."""
    for name in ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise"):
        keys.take(name, (bool, int, float), None)


def count_of(keys: Keys, default: Any = ...) -> int:
    """The number of experts, under either of its two names."""
    given = [keys.take(name, int, None) for name in ("num_experts", "num_local_experts")]
    told = {one for one in given if one is not None} or {default}
    if told == {...} or len(told) > 1 or min(told) < 1:
        raise InputError(f"{keys.where}: num_experts or num_local_experts should be one positive number, not {given}")
    return told.pop()
