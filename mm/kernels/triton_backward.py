"""The backward pass: dQ and the gradient of a bias by tiles of queries, dK and dV by tiles of keys.

Each sum is made in one program and so always in the same order; nothing is added up by atomics. Scores are computed
again from q, k and the saved sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.triton_forward import ranges
from mm.kernels.triton_tile import (
    base,
    dots,
    finish,
    keeps,
    load_keyed,
    load_values,
    place,
    rotate_back,
    row_values,
    rows_of,
    store_keyed,
    store_values,
    wide,
)
from mm.kernels.triton_visibility import locate, sees, span


@triton.jit
def weights_of(s, seen, lse, masked: tl.constexpr):
    """Compute the weights before dropout."""
    weights = tl.exp2(s - lse)
    if masked:
        weights = tl.where(seen, weights, 0.0)
    return weights


@triton.jit
def thin(x, keep, plan: tl.constexpr):
    """Apply dropout to weights or to their gradients."""
    if plan.dropout > 0.0:
        x = tl.where(keep, x * (1.0 / (1.0 - plan.dropout)), 0.0)
    return x


@triton.jit
def bend(score_grads, slope, plan: tl.constexpr):
    """Take gradients of scores back through the softcap."""
    if plan.softcap > 0.0:
        score_grads = score_grads * slope
    return score_grads


@triton.jit
def query_step(q1, q2, g1, g2, rows, lse, delta, k, v, k_at, k_rope, bias, seed, b, kv_head, first, S, scale,
               masked: tl.constexpr, plan: tl.constexpr):
    """Compute for a tile of queries and the keys first..first + plan.keys: both parts of k, gradients of the products
    and of the scores (rows, keys), and the positions of the keys."""
    q_position, q_document, token, head, draw = rows
    local = tl.arange(0, plan.keys)
    key = first + local
    inside = key < S
    k1, k2 = load_keyed(base(k, b, kv_head, first), local * k.token, k_rope, b, kv_head, key, inside, plan.k_rope,
                        masked, plan)
    v1, v2 = load_values(base(v, b, kv_head, first), local * v.token, inside, masked, plan)
    position, document, prefix = locate(k_at, b, key, inside)
    s, slope = finish(dots(q1, q2, k1, k2, plan.k2), scale, q_position[:, None], position[None, :], head[:, None],
                      bias, plan)
    seen = sees(q_position[:, None], q_document[:, None], position[None, :], document[None, :], prefix[None, :],
                inside[None, :], plan)
    keep = keeps(seed, draw[:, None], token[:, None], key[None, :], plan)
    pull = thin(dots(g1, g2, v1, v2, plan.v2), keep, plan) - delta[:, None]
    score_grads = weights_of(s, seen, lse[:, None], masked) * pull
    return k1, k2, bend(score_grads, slope, plan), score_grads, position


@triton.jit
def backward_queries(grad, q, k, v, out, dq, lse, delta, q_at, k_at, q_rope, k_rope, bias, seed, spans, scale, T, S,
                     plan: tl.constexpr):
    """Grid (tiles of queries * B, K). Writes dq and delta (B, H, T): the sum over channels of out * grad."""
    tiles = tl.cdiv(T * plan.group, plan.rows)
    tile, kv_head, b = place(tiles)
    tile = tiles - 1 - tile
    first = tile * plan.rows
    start, offsets, token, head = rows_of(q, b, kv_head, first, plan)
    inside = token < T
    q1, q2 = load_keyed(start, offsets, q_rope, b, head, token, inside, plan.q_rope, True, plan)
    start, offsets, token, head = rows_of(grad, b, kv_head, first, plan)
    g1, g2 = load_values(start, offsets, inside, True, plan)
    start, offsets, token, head = rows_of(out, b, kv_head, first, plan)
    o1, o2 = load_values(start, offsets, inside, True, plan)
    drop = tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    if plan.v2 > 0:
        drop += tl.sum(o2.to(tl.float32) * g2.to(tl.float32), 1)
    draw = b * tl.num_programs(1) * plan.group + head
    tl.store(row_values(delta, b, kv_head, head, token, T, plan), drop, mask=inside)
    total = tl.load(row_values(lse, b, kv_head, head, token, T, plan), mask=inside, other=float("inf"))
    position, document, unprefixed = locate(q_at, b, token, inside)
    rows = (position, document, token, head, draw)
    dq1 = tl.full([plan.rows, plan.k1], 0.0, tl.float32)
    dq2 = drop if plan.k2 == 0 else tl.full([plan.rows, plan.k2], 0.0, tl.float32)
    seed = 0 if seed is None else tl.load(seed)
    begin, a, z, end = ranges(spans, b, tile, T, S, plan)
    for i in range(a, z):
        k1, k2, grads, score_grads, k_position = query_step(q1, q2, g1, g2, rows, total, drop, k, v, k_at, k_rope, bias,
                                                            seed, b, kv_head, i * plan.keys, S, scale, False, plan)
        dq1, dq2 = gather(grads, k1, k2, dq1, dq2, plan.k2)
    for i in range(begin, a + end - z):
        i = tl.where(i < a, i, i + z - a)
        k1, k2, grads, score_grads, k_position = query_step(q1, q2, g1, g2, rows, total, drop, k, v, k_at, k_rope, bias,
                                                            seed, b, kv_head, i * plan.keys, S, scale, True, plan)
        dq1, dq2 = gather(grads, k1, k2, dq1, dq2, plan.k2)
    start, offsets, token, head = rows_of(dq, b, kv_head, first, plan)
    dq1 *= scale
    if plan.k2 > 0:
        dq2 *= scale
    dq1, dq2 = rotate_back(dq1, dq2, q_rope, b, head, token, inside, plan.q_rope, plan)
    store_keyed(start, offsets, inside, dq1, dq2, plan)


@triton.jit
def gather(weights, x1, x2, sum1, sum2, second: tl.constexpr):
    """Add weights @ x to a sum, both given in parts."""
    weights = weights.to(x1.dtype)
    sum1 = tl.dot(weights, x1, sum1, input_precision="ieee")
    if second > 0:
        sum2 = tl.dot(weights, x2, sum2, input_precision="ieee")
    return sum1, sum2


@triton.jit
def key_step(dk1, dk2, dv1, dv2, k1, k2, v1, v2, keys, grad, q, lse, delta, q_at, q_rope, bias, seed, b, kv_head, first,
             T, scale, masked: tl.constexpr, plan: tl.constexpr):
    """Add the share of the packed query rows first..first + plan.rows to the gradients of a tile of keys."""
    k_position, k_document, k_prefix, key, k_inside = keys
    start, offsets, token, head = rows_of(q, b, kv_head, first, plan)
    inside = token < T
    q1, q2 = load_keyed(start, offsets, q_rope, b, head, token, inside, plan.q_rope, masked, plan)
    position, document, unprefixed = locate(q_at, b, token, inside)
    draw = b * tl.num_programs(1) * plan.group + head
    total = tl.load(row_values(lse, b, kv_head, head, token, T, plan), mask=inside, other=float("inf"))
    s, slope = finish(dots(k1, k2, q1, q2, plan.k2), scale, position[None, :], k_position[:, None], head[None, :], bias,
                      plan)
    seen = sees(position[None, :], document[None, :], k_position[:, None], k_document[:, None], k_prefix[:, None],
                k_inside[:, None], plan)
    start, offsets, token, head = rows_of(grad, b, kv_head, first, plan)
    g1, g2 = load_values(start, offsets, inside, masked, plan)
    keep = keeps(seed, draw[None, :], token[None, :], key[:, None], plan)
    weights = weights_of(s, seen, total[None, :], masked)
    dv1, dv2 = gather(thin(weights, keep, plan), g1, g2, dv1, dv2, plan.v2)
    pull = thin(dots(v1, v2, g1, g2, plan.v2), keep, plan)
    drop = tl.load(row_values(delta, b, kv_head, head, token, T, plan), mask=inside, other=0.0)  # late: few registers
    pull -= drop[None, :]
    dk1, dk2 = gather(bend(weights * pull, slope, plan), q1, q2, dk1, dk2, plan.k2)
    return dk1, dk2, dv1, dv2


@triton.jit
def reaching(spans, b, tile, T, S, plan: tl.constexpr):
    """Return the tiles of packed query rows that reach a tile of keys, as `span` gives them."""
    if plan.regular:
        first = tile * plan.keys
        last = tl.minimum(first + plan.keys, S) - 1
        start, a, z, end = span(first, last, T, plan.right, plan.left, plan.group, plan.rows, plan)
    elif spans is None:
        start, a, z, end = tile * 0, tile * 0, tile * 0, tl.cdiv(T * plan.group, plan.rows)
    else:
        here = spans + (b * tl.cdiv(S, plan.keys) + tile) * 2
        start, end = tl.load(here) * plan.group // plan.rows, tl.cdiv(tl.load(here + 1) * plan.group, plan.rows)
        a, z = start, start
    return start, a, z, end


@triton.jit
def backward_keys(grad, q, k, v, dk, dv, lse, delta, q_at, k_at, q_rope, k_rope, bias, seed, spans, scale, T, S,
                  plan: tl.constexpr):
    """Grid (tiles of keys * B, K). Query heads that share keys are summed here."""
    tile, kv_head, b = place(tl.cdiv(S, plan.keys))
    first = tile * plan.keys
    local = tl.arange(0, plan.keys)
    key = first + local
    k_inside = key < S
    k1, k2 = load_keyed(base(k, b, kv_head, first), local * k.token, k_rope, b, kv_head, key, k_inside, plan.k_rope,
                        True, plan)
    v1, v2 = load_values(base(v, b, kv_head, first), local * v.token, k_inside, True, plan)
    position, document, prefix = locate(k_at, b, key, k_inside)
    keys = (position, document, prefix, key, k_inside)
    dk1 = tl.full([plan.keys, plan.k1], 0.0, tl.float32)
    dk2 = dk1 if plan.k2 == 0 else tl.full([plan.keys, plan.k2], 0.0, tl.float32)
    dv1 = tl.full([plan.keys, plan.v1], 0.0, tl.float32)
    dv2 = dv1 if plan.v2 == 0 else tl.full([plan.keys, plan.v2], 0.0, tl.float32)
    seed = 0 if seed is None else tl.load(seed)
    begin, a, z, end = reaching(spans, b, tile, T, S, plan)
    for i in range(a, z):
        dk1, dk2, dv1, dv2 = key_step(dk1, dk2, dv1, dv2, k1, k2, v1, v2, keys, grad, q, lse, delta, q_at, q_rope,
                                      bias, seed, b, kv_head, i * plan.rows, T, scale, False, plan)
    for i in range(begin, a + end - z):
        i = tl.where(i < a, i, i + z - a)
        dk1, dk2, dv1, dv2 = key_step(dk1, dk2, dv1, dv2, k1, k2, v1, v2, keys, grad, q, lse, delta, q_at, q_rope,
                                      bias, seed, b, kv_head, i * plan.rows, T, scale, True, plan)
    dk1 *= scale
    if plan.k2 > 0:
        dk2 *= scale
    dk1, dk2 = rotate_back(dk1, dk2, k_rope, b, kv_head, key, k_inside, plan.k_rope, plan)
    store_keyed(base(dk, b, kv_head, first), local * dk.token, k_inside, dk1, dk2, plan)
    store_values(base(dv, b, kv_head, first), local * dv.token, k_inside, dv1, dv2, plan)


@triton.jit
def backward_bias(grad, q, k, v, lse, delta, sums, bucket, q_at, k_at, q_rope, k_rope, bias, seed, spans, scale, T, S,
                  plan: tl.constexpr):
    """Grid (tiles of queries * B, K): sums (B, H, T, plan.buckets) gets each query's gradient of each bucket. Only the
    buckets between the least and the greatest offset of a tile are summed: one, far from the diagonal."""
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
