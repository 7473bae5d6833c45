"""The forward pass: one program per tile of packed query rows, online softmax over the keys that it can reach."""

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
)
from mm.kernels.triton_window import locate, sees, span


@triton.jit
def weigh(s, peak, total):
    """One step of the online softmax: new maximum, new sum, weights, and what earlier sums shrink by."""
    higher = tl.maximum(peak, tl.max(s, 1))
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(peak - safe)
    return higher, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def step(out1, out2, peak, total, q1, q2, rows, k, v, k_at, k_rope, bias, seed, b, kv_head, first, S, scale,
         masked: tl.constexpr, plan: tl.constexpr):
    """Take in the keys first..first + plan.keys."""
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
    """Maximum and sum before any key: a sink's weight, or nothing."""
    peak = tl.full([plan.rows], -float("inf"), tl.float32)
    total = tl.full([plan.rows], 0.0, tl.float32)
    if plan.sinks:
        peak = tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    return peak, total


@triton.jit
def ranges(spans, b, tile, T, S, plan: tl.constexpr):
    """Tiles of keys that a tile of queries reaches, as `span` gives them."""
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
