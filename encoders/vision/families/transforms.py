"""How tensors of several families change on the way from their layouts to ours and back."""

from __future__ import annotations

import torch

from mm.checkpoint.tables import SCALAR, WeightTransform

from ...spec import Patches, PrefixPool

BATCHED = WeightTransform(lambda xs: [xs[0][0]], lambda xs: [xs[0][None]])
ONE = WeightTransform(SCALAR.load, lambda xs: [xs[0].reshape(1)], loose=True)
HALVES = WeightTransform(lambda xs: list(xs[0].chunk(2)), lambda xs: [torch.cat(list(xs))])

# A class token and a distillation token, each with a classifier; the model's answer is the mean of both.
TWO_HEADS = PrefixPool(tokens=2, join="concat")
TWO_TOKENS = WeightTransform(lambda xs: [torch.cat([x[0] for x in xs])], lambda xs: [row[None, None] for row in xs[0]])
HALF_EACH = WeightTransform(lambda xs: [torch.cat(list(xs), 1) / 2],
                            lambda xs: [2 * half for half in xs[0].chunk(2, 1)])
MEAN_OF_BOTH = WeightTransform(lambda xs: [(xs[0] + xs[1]) / 2], lambda xs: [xs[0], xs[0].clone()])


def flattened(patches: Patches) -> WeightTransform:
    """Patch weights over values in the order row, column, channel, where ours are channel, row, column."""
    (height, width), channels = patches.size, patches.channels
    return WeightTransform(lambda xs: [xs[0].unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)],
               lambda xs: [xs[0].permute(0, 2, 3, 1).flatten(1)])
