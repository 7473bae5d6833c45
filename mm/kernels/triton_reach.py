"""Which keys a tile of queries can reach at all, and the reverse, from the positions and documents themselves.

A tile is summed up by the least and greatest position and document in it; the other side is then read once. What lies
outside the range found is never loaded by the kernels. All of it stays on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.triton_tile import place
from mm.kernels.triton_window import locate

BLOCK: tl.constexpr = tl.constexpr(1024)  # tokens of the other side that are looked at in one step


@triton.jit
def least(x, where):
    return tl.min(tl.where(where, x, 2147483647), 0)


@triton.jit
def greatest(x, where):
    return tl.max(tl.where(where, x, -2147483647), 0)


@triton.jit
def chunks(x, plan: tl.constexpr):
    """Numbers of chunks; one further, since division rounds negative positions towards 0."""
    return (x + plan.chunk) // plan.chunk


@triton.jit
def within(x, low, high, back, ahead, unlimited, plan: tl.constexpr):
    """Whether positions x lie from `back` before `low` to `ahead` after `high` and in one of their chunks."""
    near = x == x
    if ahead is not None:
        near = near & (x <= high + ahead)
    if back is not None:
        near = near & (x >= low - back)
    near = near | unlimited
    if plan.chunk is not None:
        near = near & (chunks(x, plan) >= chunks(low, plan)) & (chunks(x, plan) <= chunks(high, plan))
    return near


@triton.jit
def reach_keys(spans, q_at, k_at, T, S, plan: tl.constexpr):
    """Grid (tiles of queries * B,): spans (B, tiles, 2) gets the first key that some row may see and the one after the
    last."""
    tiles = tl.cdiv(T * plan.group, plan.rows)
    tile, every_head, b = place(tiles)
    token = (tile * plan.rows + tl.arange(0, plan.rows)) // plan.group
    inside = token < T
    q, document, _ = locate(q_at, b, token, inside)
    low, high = least(q, inside), greatest(q, inside)
    start, end = S, S * 0
    for first in range(0, S, BLOCK):
        key = first + tl.arange(0, BLOCK)
        k, k_document, prefix = locate(k_at, b, key, key < S)
        near = within(k, low, high, plan.left, plan.right, (prefix != 0) if plan.prefix else key < 0, plan) & (k >= 0)
        if plan.documents:
            near = near & (k_document >= least(document, inside)) & (k_document <= greatest(document, inside))
        near = near | (k == -2)
        start = tl.minimum(start, tl.min(tl.where(near, key, S), 0))
        end = tl.maximum(end, tl.max(tl.where(near, key + 1, 0), 0))
    here = spans + (b * tiles + tile) * 2
    tl.store(here, tl.minimum(start, end))
    tl.store(here + 1, end)


@triton.jit
def reach_queries(spans, q_at, k_at, T, S, plan: tl.constexpr):
    """Grid (tiles of keys * B,): spans (B, tiles, 2) gets the first query that may see some key and the one after the
    last."""
    tiles = tl.cdiv(S, plan.keys)
    tile, every_head, b = place(tiles)
    key = tile * plan.keys + tl.arange(0, plan.keys)
    k, document, prefix = locate(k_at, b, key, key < S)
    exists = k >= 0
    low, high = least(k, exists), greatest(k, exists)
    everyone = tl.max((k == -2).to(tl.int32), 0) > 0
    start, end = T, T * 0
    for first in range(0, T, BLOCK):
        token = first + tl.arange(0, BLOCK)
        inside = token < T
        q, q_document, _ = locate(q_at, b, token, inside)
        shared = tl.max((exists & (prefix != 0)).to(tl.int32), 0) > 0 if plan.prefix else low > high
        near = within(q, low, high, plan.right, plan.left, shared, plan) & (low <= high)
        if plan.documents:
            near = near & (q_document >= least(document, exists)) & (q_document <= greatest(document, exists))
        near = (near | everyone) & inside
        start = tl.minimum(start, tl.min(tl.where(near, token, T), 0))
        end = tl.maximum(end, tl.max(tl.where(near, token + 1, 0), 0))
    here = spans + (b * tiles + tile) * 2
    tl.store(here, tl.minimum(start, end))
    tl.store(here + 1, end)
