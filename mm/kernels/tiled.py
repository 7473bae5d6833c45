"""Attention in tiles of query rows: what SDPA cannot say in one call, without ever keeping T x S scores.

Each tile is recomputed in the backward pass. Tiles of one plain run read only the keys that their window can reach.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm.kernels.problem import Problem

ROWS = 256


def tiled(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """q (B, H, T, E), k (B, K, S, E), v (B, K, S, F), already rotated -> (B, H, T, F). A program that is exported for
    any length is one tile."""
    length = q.shape[2]
    if torch.compiler.is_exporting() or length <= ROWS:
        return tile(q, k, v, problem)
    again = torch.is_grad_enabled()
    out = []
    for start in range(0, length, ROWS):
        rows = (start, min(start + ROWS, length))
        keys = reachable(problem, rows, k.shape[2])
        args = (q[:, :, slice(*rows)], k[:, :, slice(*keys)], v[:, :, slice(*keys)], problem.tile(rows, keys))
        out.append(checkpoint(tile, *args, use_reentrant=False, preserve_rng_state=problem.dropout > 0) if again
                   else tile(*args))
    return torch.cat(out, 2)


def reachable(problem: Problem, rows: tuple[int, int], keys: int) -> tuple[int, int]:
    """The range of keys that these rows may see; all of them unless both sides are the same plain run."""
    window = problem.window
    if not problem.aligned:
        return 0, keys
    start, stop = 0, keys
    if window.left is not None and not window.first:
        start = max(start, rows[0] - window.left)
    if window.right is not None and problem.k_at.prefix is None:
        stop = min(stop, rows[1] + window.right)
    if window.chunk is not None:
        start = max(start, rows[0] // window.chunk * window.chunk)
        stop = min(stop, -(-rows[1] // window.chunk) * window.chunk)
    return start, stop


def tile(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """One tile; heads that share keys are grouped, so that keys and values are never copied."""
    if not problem.softcap and problem.sinks is None and not slow_backward(q):
        return by_sdpa(q, k, v, problem)
    mask = problem.mask()
    groups = (q.shape[1] // k.shape[1], q.shape[2])
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, K, G * T, E): one product per key head
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = ((grouped @ k.transpose(-1, -2)).to(wide) * problem.scale).unflatten(2, groups)
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.bias is not None:
        scores = scores + problem.bias(problem.q_at, problem.k_at).unflatten(1, (k.shape[1], -1))
    scores = scores.masked_fill(mask.added[:, None, None] < 0, -torch.inf)
    if problem.sinks is not None:
        column = problem.sinks.to(wide).view(1, k.shape[1], -1, 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat([scores, column], -1)
    weights = mask.zero_empty(torch.softmax(scores, -1))[..., : k.shape[2]]
    weights = F.dropout(weights, problem.dropout) if problem.dropout else weights
    if torch.compiler.is_exporting():  # a product over G * T rows would tie the exported length to its example
        return torch.einsum("bkgts,bksf->bkgtf", weights.to(v.dtype), v).flatten(1, 2)
    return (weights.to(v.dtype).flatten(2, 3) @ v).unflatten(2, groups).flatten(1, 2)


def slow_backward(q: Tensor) -> bool:
    """Whether SDPA's backward pass is slower than plain products: of half precision on a CPU, three times."""
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and q.requires_grad


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """One tile through SDPA with a mask; rows that see nothing give 0."""
    mask = problem.mask()
    added = mask.added.to(q.dtype).unsqueeze(1)
    if problem.bias is not None:
        added = problem.bias(problem.q_at, problem.k_at).to(q.dtype).masked_fill(added < 0, -torch.inf)
    shared = q.shape[1] != k.shape[1]
    if shared and problem.bias is None and not torch.compiler.is_exporting() and q.shape[2] == 1:
        rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # heads that share keys read them once, as rows of one head
        out = F.scaled_dot_product_attention(rows, k, v, added, problem.dropout, scale=problem.scale)
        return mask.zero_empty(out.unsqueeze(3).flatten(1, 2))
    out = F.scaled_dot_product_attention(q, k, v, added, problem.dropout, scale=problem.scale, enable_gqa=shared)
    return mask.zero_empty(out)
