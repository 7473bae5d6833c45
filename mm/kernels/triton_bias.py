"""The gradient of a bias by distance: sums over buckets of offsets, one row a query, added up in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.triton_backward import query_step
from mm.kernels.triton_forward import ranges
from mm.kernels.triton_tile import load_keyed, load_values, place, row_values, rows_of, wide
from mm.kernels.triton_window import locate


@triton.jit
def backward_bias(grad, q, k, v, lse, delta, sums, bucket, q_at, k_at, q_rope, k_rope, bias, seed, spans, scale, T, S,
                  plan: tl.constexpr):
    """Grid (tiles of queries * B, K): sums (B, H, T, plan.buckets) gets each query's gradient of each bucket. Only the
    buckets between the least and the greatest offset of a tile are looked at: one, far from the diagonal."""
    tile, kv_head, b = place(tl.cdiv(T * plan.group, plan.rows))
    first = tile * plan.rows
    start, offsets, token, head = rows_of(q, b, kv_head, first, plan)
    inside = token < T
    q1, q2 = load_keyed(start, offsets, q_rope, b, head, token, inside, plan.q_rope, True, plan)
    start, offsets, token, head = rows_of(grad, b, kv_head, first, plan)
    g1, g2 = load_values(start, offsets, inside, True, plan)
    draw = b * tl.num_programs(1) * plan.group + head
    total = tl.load(row_values(lse, b, kv_head, head, token, T, plan), mask=inside, other=float("inf"))
    drop = tl.load(row_values(delta, b, kv_head, head, token, T, plan), mask=inside, other=0.0)
    position, document, unprefixed = locate(q_at, b, token, inside)
    rows = (position, document, token, head, draw)
    column = tl.arange(0, triton.next_power_of_2(plan.buckets))
    gathered = tl.full([plan.rows, triton.next_power_of_2(plan.buckets)], 0.0, tl.float32)
    seed = 0 if seed is None else tl.load(seed)
    begin, a, z, end = ranges(spans, b, tile, T, S, plan)
    for i in range(begin, end):
        k1, k2, product_grads, grads, k_position = query_step(q1, q2, g1, g2, rows, total, drop, k, v, k_at, k_rope,
                                                              bias, seed, b, kv_head, i * plan.keys, S, scale, True,
                                                              plan)
        offset = tl.minimum(tl.maximum(k_position[None, :] - position[:, None], -plan.reach), plan.reach) + plan.reach
        found = tl.load(bucket + offset)
        for j in range(tl.min(found), tl.max(found) + 1):
            share = tl.sum(tl.where(found == j, grads, 0.0), 1)
            gathered += tl.where(column[None, :] == j, share[:, None], 0.0)
    tl.store(sums + (wide(draw) * T + token)[:, None] * plan.buckets + column[None, :], gathered,
             mask=inside[:, None] & (column < plan.buckets)[None, :])
