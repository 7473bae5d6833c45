"""Visibility in the Triton kernels: where tokens are, masks, and the tiles of the other side that a tile can reach.

For plain runs the reached tiles follow from arithmetic (`span`). Otherwise `reach_keys` and `reach_queries` find them
from the positions and documents: a tile is summed up by the least and greatest position and document in it, then the
other side is read once. What lies outside the range found is never loaded. All of it stays on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.triton_tile import place, wide

BLOCK: tl.constexpr = tl.constexpr(1024)  # tokens of the other side that one step reads


# ------------------------------------------------------------------------------------------ positions, masks
@triton.jit
def read(line, b, index, inside, other: tl.constexpr):
    return tl.load(line.data + wide(b) * line.batch + wide(index) * line.token, mask=inside, other=other)


@triton.jit
def locate(at, b, index, inside):
    """Load positions, documents and prefix flags of tokens; a fact that is not given is the position again."""
    position = index
    if at.position is not None:
        position = read(at.position, b, index, inside, -1).to(tl.int32)
    document, prefix = position, position
    if at.document is not None:
        document = read(at.document, b, index, inside, -1)
    if at.prefix is not None:
        prefix = read(at.prefix, b, index, inside, 0).to(tl.int32)
    return position, document, prefix


@triton.jit
def sees(q, q_document, k, k_document, k_prefix, k_inside, plan: tl.constexpr):
    """Compute `mm.positions.visibility.visible` for positions that broadcast against each other."""
    seen = k_inside if plan.regular else k >= 0
    if plan.right is not None:
        near = k <= q + plan.right
        if plan.prefix:
            near = near | (k_prefix != 0)
        seen = seen & near
    if plan.left is not None:
        seen = seen & (k >= q - plan.left)
    if plan.chunk is not None:  # one chunk further, since division rounds negative positions towards 0
        seen = seen & ((k + plan.chunk) // plan.chunk == (q + plan.chunk) // plan.chunk)
    if plan.documents:
        seen = seen & (q_document == k_document)
    if not plan.regular:
        seen = seen | (k == -2)
    return seen


@triton.jit
def span(first, last, length, back, ahead, per, step, plan: tl.constexpr):
    """Compute the tiles that a plain run of tokens first..last reaches on the other side: (start, a, z, end), where
    every token sees all of a..z. They reach `back` and `ahead` tokens far; a token takes `per` rows on the other side,
    and a tile has `step` rows."""
    low, high, inner_low, inner_high = first * 0, length, first * 0, length
    if back is not None:
        low, inner_low = tl.maximum(low, first - back), tl.maximum(inner_low, last - back)
    if ahead is not None:
        high, inner_high = tl.minimum(high, last + ahead + 1), tl.minimum(inner_high, first + ahead + 1)
    if plan.chunk is not None:
        low = tl.maximum(low, first // plan.chunk * plan.chunk)
        inner_low = tl.maximum(inner_low, last // plan.chunk * plan.chunk)
        high = tl.minimum(high, (last // plan.chunk + 1) * plan.chunk)
        inner_high = tl.minimum(inner_high, (first // plan.chunk + 1) * plan.chunk)
    start, end = low * per // step, tl.cdiv(tl.maximum(high, low) * per, step)
    a = tl.minimum(tl.cdiv(inner_low * per, step), end)
    return start, a, tl.maximum(tl.minimum(inner_high * per // step, end), a), end


# -------------------------------------------------------------------------- reach by positions and documents
@triton.jit
def least(x, where):
    return tl.min(tl.where(where, x, 2147483647), 0)


@triton.jit
def greatest(x, where):
    return tl.max(tl.where(where, x, -2147483647), 0)


@triton.jit
def chunks(x, plan: tl.constexpr):
    """Number the chunks; one further, since division rounds negative positions towards 0."""
    return (x + plan.chunk) // plan.chunk


@triton.jit
def within(x, low, high, back, ahead, unlimited, plan: tl.constexpr):
    """Test whether positions x lie from `back` before `low` to `ahead` after `high` and in one of their chunks."""
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
