"""Decoding: few queries, many keys. The keys of one head are split between programs, so that the whole GPU reads the
cache; a second kernel joins the parts. Keys of a cache are rotated already, only the new queries are turned here."""

from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.triton_forward import begin, step
from mm.kernels.triton_tile import load_keyed, place, rows_of, store_values, wide
from mm.kernels.triton_window import locate


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
    """Grid (T * B, H): the parts of one row, weighted by their sums."""
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
