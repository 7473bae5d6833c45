"""Attention in plain torch: tiles of query rows for what SDPA cannot express in one call, and the oracle of the tests.

Each tile is recomputed in the backward pass, so that T x S scores are never kept. Tiles of one plain run read only the
keys that their window can reach.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm.kernels.options import AttentionOptions
from mm.positions import rope as rotary

ROWS = 256  # queries of a tile


def tiled(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """q (B, H, T, E), k (B, K, S, E), v (B, K, S, F), already rotated -> (B, H, T, F). A program that is exported for
    any length is one tile."""
    length = q.shape[2]
    if torch.compiler.is_exporting() or length <= ROWS:
        return tile(q, k, v, options)
    out = []
    for start in range(0, length, ROWS):
        rows = (start, min(start + ROWS, length))
        keys = reachable(options, rows, k.shape[2])
        args = (q[:, :, slice(*rows)], k[:, :, slice(*keys)], v[:, :, slice(*keys)], options.tile(rows, keys))
        out.append(checkpoint(tile, *args, use_reentrant=False, preserve_rng_state=options.dropout > 0)
                   if torch.is_grad_enabled() else tile(*args))
    return torch.cat(out, 2)


def reachable(options: AttentionOptions, rows: tuple[int, int], keys: int) -> tuple[int, int]:
    """The range of keys that these rows may see; all of them unless both sides are the same plain run."""
    window = options.window
    if not options.aligned:
        return 0, keys
    start, stop = 0, keys
    if window.left is not None and not window.first:
        start = max(start, rows[0] - window.left)
    if window.right is not None and options.k_at.prefix is None:
        stop = min(stop, rows[1] + window.right)
    if window.chunk is not None:
        start = max(start, rows[0] // window.chunk * window.chunk)
        stop = min(stop, -(-rows[1] // window.chunk) * window.chunk)
    return start, stop


def tile(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """Compute one tile; heads that share keys are grouped, so that keys and values are never copied."""
    if not options.softcap and options.sinks is None and not slow_backward(q):
        return by_sdpa(q, k, v, options)
    mask = options.full_mask()
    groups = (q.shape[1] // k.shape[1], q.shape[2])
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, K, G * T, E): one product per key head
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = ((grouped @ k.transpose(-1, -2)).to(wide) * options.scale).unflatten(2, groups)
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.bias is not None:
        scores = scores + options.bias(options.q_at, options.k_at).unflatten(1, (k.shape[1], -1))
    scores = scores.masked_fill(mask.added[:, None, None] < 0, -torch.inf)
    if options.sinks is not None:
        column = options.sinks.to(wide).view(1, k.shape[1], -1, 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat([scores, column], -1)
    weights = mask.zero_empty(torch.softmax(scores, -1))[..., : k.shape[2]]
    weights = F.dropout(weights, options.dropout) if options.dropout else weights
    if torch.compiler.is_exporting():  # a product over G * T rows would tie the exported length to its example
        return torch.einsum("bkgts,bksf->bkgtf", weights.to(v.dtype), v).flatten(1, 2)
    return (weights.to(v.dtype).flatten(2, 3) @ v).unflatten(2, groups).flatten(1, 2)


def slow_backward(q: Tensor) -> bool:
    """Whether SDPA's backward pass is slower than plain products: in half precision on a CPU it is, three times."""
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and q.requires_grad


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """Compute one tile by SDPA with a mask; rows that see no key give 0."""
    mask = options.full_mask()
    added = mask.added.to(q.dtype).unsqueeze(1)
    if options.bias is not None:
        added = options.bias(options.q_at, options.k_at).to(q.dtype).masked_fill(added < 0, -torch.inf)
    shared = q.shape[1] != k.shape[1]
    if shared and options.bias is None and not torch.compiler.is_exporting() and q.shape[2] == 1:
        rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # heads that share keys read them once, as rows of one head
        out = F.scaled_dot_product_attention(rows, k, v, added, options.dropout, scale=options.scale)
        return mask.zero_empty(out.unsqueeze(3).flatten(1, 2))
    out = F.scaled_dot_product_attention(q, k, v, added, options.dropout, scale=options.scale, enable_gqa=shared)
    return mask.zero_empty(out)


def reference(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """Attention written down plainly, the oracle of every test: any dtype up to float64, all T x S scores kept.

    q (B, H, T, E), k (B, K, S, E), v (B, K, S, F) -> (B, H, T, F). A row that sees no key gives 0."""
    if options.q_rope is not None:
        q = rotary.apply(q, options.q_rope)
    if options.k_rope is not None:
        k = rotary.apply(k, options.k_rope)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.bias is not None:
        scores = scores + options.bias(options.q_at, options.k_at)
    seen = options.visible().unsqueeze(1)
    scores = scores.masked_fill(~seen, -torch.inf)
    if options.sinks is not None:
        scores = torch.cat([scores, options.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)[..., : k.shape[2]]
    weights = F.dropout(weights, options.dropout) if options.dropout else weights
    return weights @ v
