"""Contrastive losses whose B x B logits are never kept, forward or backward: made and used in tiles of rows.

The softmax loss of CLIP (Radford et al., 2021) and the sigmoid loss of SigLIP (Zhai et al., 2023), with several right
answers for rows of one group. What the right answers add is linear in the features and needs no logits at all; a tile
is made for the rest only, and made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 1 << 19  # logits at a time


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor, group: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean over both directions, at least in float32.

    image, text: (B, E), of any length. logit_scale: (), the logarithm. group: (B,), rows of one group are each
    other's positives and share the target evenly. smoothing: the share of the target spread over the whole batch.
    """
    x, y = directions(image, text, logit_scale)
    sums, counts = group_sums(y, group)
    right = (torch.linalg.vecdot(x, sums) / counts).sum()
    spread = x.sum(0) @ y.sum(0) / len(y)
    return LogSumExps.apply(x, y) / (2 * len(x)) - ((1 - smoothing) * right + smoothing * spread) / len(x)


def siglip_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, group: Tensor,
                text_group: Tensor | None = None) -> Tensor:
    """The mean over rows of the summed sigmoid losses of all pairs, at least in float32.

    image: (B, E), text: (N, E). logit_scale, logit_bias: (). group: (B,), text_group: (N,) (None: the same rows): pairs
    of one group are right.
    """
    x, y = directions(image, text, logit_scale)
    bias = logit_bias.to(x.dtype)
    sums, counts = group_sums(y, group, text_group)
    right = torch.linalg.vecdot(x, sums).sum() + bias * counts.sum()
    return (Softplus.apply(x, y, bias) - right) / len(x)


def directions(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors, those of the images times the scale: their products are the logits."""
    wide = torch.promote_types(image.dtype, torch.float32)
    x, y = F.normalize(image.to(wide), dim=-1), F.normalize(text.to(wide), dim=-1)
    return x * logit_scale.to(wide).exp(), y


def group_sums(y: Tensor, group: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each row of `group` (B,) the sum (B, E) of the rows of y (N, E) whose group, `own` (N,), is the same, and
    their number (B,)."""
    own = group if own is None else own
    names, index = torch.cat([group, own]).unique(return_inverse=True)
    ours, theirs = index.split((len(group), len(own)))
    sums = y.new_zeros(len(names), y.shape[1]).index_add(0, theirs, y)
    counts = y.new_zeros(len(names)).index_add(0, theirs, y.new_ones(len(own)))
    return sums[ours], counts[ours]


def tiles(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x (B, E) and their products (rows, N) with y (N, E), in memory that the next tile takes over."""
    rows = max(1, TILE // max(len(y), 1))
    room = x.new_empty(min(rows, len(x)), len(y))
    for start in range(0, len(x), rows):
        part = slice(start, min(start + rows, len(x)))
        yield part, torch.mm(x[part], y.T, out=room[: part.stop - start])


class LogSumExps(torch.autograd.Function):
    """x (B, E), y (N, E) -> (): log sum exp of the logits over each row and over each column, all added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        rows, other = x.new_empty(len(x)), None
        most, total = y.new_full((len(y),), -torch.inf), y.new_zeros(len(y))
        for part, logits in tiles(x, y):
            other = torch.empty_like(logits) if other is None else other[: len(logits)]
            top = logits.amax(1)
            rows[part] = top + torch.sub(logits, top[:, None], out=other).exp_().sum(1).log()
            new = torch.maximum(most, logits.amax(0))
            total = total * (most - new).exp() + logits.sub_(new).exp_().sum(0)
            most = new
        columns = most + total.log()
        ctx.save_for_backward(x, y, rows, columns)
        return rows.sum() + columns.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y, rows, columns = ctx.saved_tensors
        dx, dy, other = torch.empty_like(x), torch.zeros_like(y), None
        for part, logits in tiles(x, y):
            other = torch.empty_like(logits) if other is None else other[: len(logits)]
            torch.sub(logits, rows[part, None], out=other).exp_()
            both = logits.sub_(columns).exp_().add_(other)
            torch.mm(both, y, out=dx[part])
            dy.addmm_(both.T, x[part])
        return dx.mul_(grad), dy.mul_(grad)


class Softplus(torch.autograd.Function):
    """x (B, E), y (N, E), bias () -> (): log(1 + exp(logit + bias)), all added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, bias)
        total = x.new_zeros((), dtype=torch.float64)
        for _, logits in tiles(x, y):
            total += F.softplus(logits.add_(bias)).sum()
        return total.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, bias = ctx.saved_tensors
        dx, dy, offset = torch.empty_like(x), torch.zeros_like(y), torch.zeros_like(bias, dtype=torch.float64)
        for part, logits in tiles(x, y):
            share = logits.add_(bias).sigmoid_()
            offset += share.sum()
            torch.mm(share, y, out=dx[part])
            dy.addmm_(share.T, x[part])
        return dx.mul_(grad), dy.mul_(grad), offset.to(bias.dtype).mul_(grad)
