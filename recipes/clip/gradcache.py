"""The gradient of a large batch at the memory of a small one (GradCache, Gao et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(tower: Callable[[Tensor], Tensor], x: Tensor, chunk: int | None) -> Tensor:
    """tower(x), `chunk` rows at a time (None: all), of which the backward pass keeps the features alone.

    Whatever loss follows sees all rows at once, and its backward pass runs the tower again on each chunk, under the
    random numbers that it had: every gradient, of the loss's own parameters too, is that of the whole batch. The last
    chunk is kept as it is, since its backward pass comes first.
    """
    parts = x.split(chunk or len(x))
    if not torch.is_grad_enabled() or len(parts) == 1:
        return torch.cat([tower(part) for part in parts])
    again = [checkpoint(tower, part, use_reentrant=False) for part in parts[:-1]]
    return torch.cat([*again, tower(parts[-1])])
