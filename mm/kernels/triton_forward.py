"""The forward passes, all by an online softmax over the keys that a tile can reach.

`forward`: one program per tile of packed query rows. `decode` and `join`: few queries over many keys, which are split
between programs, so that the whole GPU reads the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.triton_tile import (
    LOG2E,
    base,
    dots,
    finish,
    keeps,
    load_keyed,
    load_values,
    place,
    row_values,
    rows_of,
    store_values,
    wide,
)
from mm.kernels.triton_visibility import locate, sees, span


@triton.jit
def weigh(s, peak, total):
    """Take one step of the online softmax: new maximum, new sum, weights, and the factor for earlier sums."""
    higher = tl.maximum(peak, tl.max(s, 1))
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(peak - safe)
    return higher, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def step(out1, out2, peak, total, q1, q2, rows, k, v, k_at, k_rope, bias, seed, b, kv_head, first, S, scale,
         masked: tl.constexpr, plan: tl.constexpr):
    """Add the keys first..first + plan.keys to the outputs of a tile of queries."""
    q_position, q_document, token, head = rows
    local = tl.arange(0, plan.keys)
    key = first + local
    inside = key < S
    k1, k2 = load_keyed(base(k, b, kv_head, first), local * k.token, k_rope, b, kv_head, key, inside, plan.k_rope,
                        masked, plan)
    position, document, prefix = locate(k_at, b, key, inside)
    s, _ = finish(dots(q1, q2, k1, k2, plan.k2), scale, q_position[:, None], position[None, :], head[:, None], bias,
                  plan)
    if masked:
        s = tl.where(sees(q_position[:, None], q_document[:, None], position[None, :], document[None, :],
                          prefix[None, :], inside[None, :], plan), s, -float("inf"))
    peak, total, weights, shrink = weigh(s, peak, total)
    if plan.dropout > 0.0:
        draw = b * tl.num_programs(1) * plan.group + head
        keep = keeps(seed, draw[:, None], token[:, None], key[None, :], plan)
        weights = tl.where(keep, weights * (1.0 / (1.0 - plan.dropout)), 0.0)
    v1, v2 = load_values(base(v, b, kv_head, first), local * v.token, inside, masked, plan)
    weights = weights.to(v1.dtype)
    out1 = tl.dot(weights, v1, out1 * shrink[:, None], input_precision="ieee")
    if plan.v2 > 0:
        out2 = tl.dot(weights, v2, out2 * shrink[:, None], input_precision="ieee")
    return out1, out2, peak, total


@triton.jit
def begin(sinks, head, plan: tl.constexpr):
    """Start the maximum and the sum before any key: a sink's weight, or nothing."""
    peak = tl.full([plan.rows], -float("inf"), tl.float32)
    total = tl.full([plan.rows], 0.0, tl.float32)
    if plan.sinks:
        peak = tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    return peak, total


@triton.jit
def ranges(spans, b, tile, T, S, plan: tl.constexpr):
    """Return the tiles of keys that a tile of queries reaches, as `span` gives them."""
    if plan.regular:
        first = tile * plan.rows // plan.group
        last = tl.minimum((tile * plan.rows + plan.rows - 1) // plan.group, T - 1)
        start, a, z, end = span(first, last, S, plan.left, plan.right, 1, plan.keys, plan)
    elif spans is None:
        start, a, z, end = tile * 0, tile * 0, tile * 0, tl.cdiv(S, plan.keys)
    else:
        here = spans + (b * tl.cdiv(T * plan.group, plan.rows) + tile) * 2
        start, end = tl.load(here) // plan.keys, tl.cdiv(tl.load(here + 1), plan.keys)
        a, z = start, start
    return start, a, z, end


@triton.jit
def forward(q, k, v, out, lse, q_at, k_at, q_rope, k_rope, sinks, bias, seed, spans, scale, T, S, plan: tl.constexpr):
    """Grid (tiles * B, K). out: (B, H, T, F); lse: (B, H, T) log2 of each row's sum, inf where it is 0."""
    tiles = tl.cdiv(T * plan.group, plan.rows)
    tile, kv_head, b = place(tiles)
    tile = tiles - 1 - tile  # the longest causal rows begin first
    first = tile * plan.rows
    start, offsets, token, head = rows_of(q, b, kv_head, first, plan)
    inside = token < T
    q1, q2 = load_keyed(start, offsets, q_rope, b, head, token, inside, plan.q_rope, True, plan)
    position, document, _ = locate(q_at, b, token, inside)
    rows = (position, document, token, head)
    peak, total = begin(sinks, head, plan)
    out1 = tl.full([plan.rows, plan.v1], 0.0, tl.float32)
    out2 = peak if plan.v2 == 0 else tl.full([plan.rows, plan.v2], 0.0, tl.float32)
    seed = 0 if seed is None else tl.load(seed)
    begin_at, a, z, end = ranges(spans, b, tile, T, S, plan)
    for i in range(a, z):
        out1, out2, peak, total = step(out1, out2, peak, total, q1, q2, rows, k, v, k_at, k_rope, bias, seed, b,
                                       kv_head, i * plan.keys, S, scale, False, plan)
    for i in range(begin_at, a + end - z):
        i = tl.where(i < a, i, i + z - a)
        out1, out2, peak, total = step(out1, out2, peak, total, q1, q2, rows, k, v, k_at, k_rope, bias, seed, b,
                                       kv_head, i * plan.keys, S, scale, True, plan)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    start, offsets, token, head = rows_of(out, b, kv_head, first, plan)
    if plan.v2 > 0:
        out2 *= share[:, None]
    store_values(start, offsets, inside, out1 * share[:, None], out2, plan)
    tl.store(row_values(lse, b, kv_head, head, token, T, plan),
             tl.where(total == 0.0, float("inf"), peak + tl.log2(total)), mask=inside)


# ---------------------------------------------------------------------------------------------- decoding
@triton.jit
def decode(q, k, v, parts, sums, q_at, k_at, q_rope, k_rope, sinks, bias, seed, scale, T, S, run,
           plan: tl.constexpr):
    """Grid (splits * B, K), all rows in one tile. Split i takes the keys i * run..(i + 1) * run and writes its output
    to parts (B, splits * H, T, F) and its log2 of sums to sums (B, splits * H, T), both float32."""
    splits = tl.cdiv(S, run)
    split, kv_head, b = place(splits)
    start, offsets, token, head = rows_of(q, b, kv_head, 0, plan)
    inside = token < T
    q1, q2 = load_keyed(start, offsets, q_rope, b, head, token, inside, plan.q_rope, True, plan)
    position, document, _ = locate(q_at, b, token, inside)
    rows = (position, document, token, head)
    peak, total = begin(sinks, head, plan)
    if plan.sinks:  # a sink counts once
        peak, total = tl.where(split == 0, peak, -float("inf")), tl.where(split == 0, total, 0.0)
    out1 = tl.full([plan.rows, plan.v1], 0.0, tl.float32)
    out2 = peak if plan.v2 == 0 else tl.full([plan.rows, plan.v2], 0.0, tl.float32)
    seed = 0 if seed is None else tl.load(seed)
    for first in range(split * run, tl.minimum(split * run + run, S), plan.keys):
        out1, out2, peak, total = step(out1, out2, peak, total, q1, q2, rows, k, v, k_at, k_rope, bias, seed, b,
                                       kv_head, first, S, scale, True, plan)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    heads = tl.num_programs(1) * plan.group
    start, offsets, token, head = rows_of(parts, b, kv_head, 0, plan)
    if plan.v2 > 0:
        out2 *= share[:, None]
    store_values(start + split * heads * parts.head, offsets, inside, out1 * share[:, None], out2, plan)
    here = wide((b * splits + split) * heads + head) * T + token
    tl.store(sums + here, tl.where(total == 0.0, -float("inf"), peak + tl.log2(total)), mask=inside)


@triton.jit
def join(parts, sums, out, lse, T, splits, width: tl.constexpr, padded: tl.constexpr):
    """Grid (T * B, H). Add up the parts of one row, weighted by their sums."""
    token, head, b = place(T)
    heads = tl.num_programs(1)
    column = tl.arange(0, padded)
    total, peak, mixed = 0.0, -float("inf"), tl.full([padded], 0.0, tl.float32)
    for split in range(splits):
        here = wide((b * splits + split) * heads + head)
        part = tl.load(parts.data + here * parts.head + token * parts.token + column, mask=column < width, other=0.0)
        s = tl.load(sums + here * T + token)
        higher = tl.maximum(peak, s)
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weight, shrink = tl.exp2(s - safe), tl.exp2(peak - safe)
        mixed, total, peak = mixed * shrink + part * weight, total * shrink + weight, higher
    mixed /= tl.where(total == 0.0, 1.0, total)
    at = out.data + wide(b) * out.batch + head * out.head + token * out.token + column
    tl.store(at, mixed.to(out.data.dtype.element_ty), mask=column < width)
    tl.store(lse + wide(b * heads + head) * T + token, tl.where(total == 0.0, float("inf"), peak + tl.log2(total)))
