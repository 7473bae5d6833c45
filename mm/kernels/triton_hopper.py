"""The forward pass for Hopper: one group of warps fetches tiles by the tensor memory accelerator, two multiply.

Triton's compiler divides the work where it finds one loop, 4 warps, 128 rows and tiles that come by descriptors made in
the kernel; so every step is masked, and heads that share keys are not packed. For plain runs of 16-bit numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.triton_forward import begin, weigh
from mm.kernels.triton_tile import base, finish, place, wide
from mm.kernels.triton_window import sees, span


@triton.jit
def tokens_of(x, b, head, length, count: tl.constexpr, width: tl.constexpr):
    """A head's tokens, to be fetched `count` at a time; beyond `length` they are 0."""
    return tl.make_tensor_descriptor(base(x, b, head, 0), shape=[length, width], strides=[x.token, 1],
                                     block_shape=[count, width])


@triton.jit
def forward_hopper(q, k, v, out, lse, sinks, scale, T, S, plan: tl.constexpr):
    """Grid (tiles * B, H). out: (B, H, T, F); lse: (B, H, T) log2 of each row's sum, inf where it is 0."""
    tiles = tl.cdiv(T, plan.rows)
    tile, head, b = place(tiles)
    first = (tiles - 1 - tile) * plan.rows
    token = first + tl.arange(0, plan.rows)
    queries = tokens_of(q, b, head, T, plan.rows, plan.width).load([first, 0])
    keys = tokens_of(k, b, head // plan.group, S, plan.keys, plan.width)
    values = tokens_of(v, b, head // plan.group, S, plan.keys, plan.value_width)
    peak, total = begin(sinks, head + 0 * token, plan)
    mixed = tl.full([plan.rows, plan.value_width], 0.0, tl.float32)
    start, a, z, end = span(first, tl.minimum(first + plan.rows, T) - 1, S, plan.left, plan.right, 1, plan.keys, plan)
    for i in tl.range(start, end, warp_specialize=True):
        key = i * plan.keys + tl.arange(0, plan.keys)
        s, slope = finish(tl.dot(queries, keys.load([i * plan.keys, 0]).T), scale, token, key, head, None, plan)
        seen = sees(token[:, None], None, key[None, :], None, None, key[None, :] < S, plan)
        peak, total, weights, shrink = weigh(tl.where(seen, s, -float("inf")), peak, total)
        mixed = tl.dot(weights.to(queries.dtype), values.load([i * plan.keys, 0]), mixed * shrink[:, None])
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    channel = tl.arange(0, plan.value_width)
    start = base(out, b, head, first) + (token - first)[:, None] * out.token + channel[None, :]
    tl.store(start, mixed.to(out.data.dtype.element_ty), mask=(token < T)[:, None])
    tl.store(lse + wide(b * tl.num_programs(1) + head) * T + token,
             tl.where(total == 0.0, float("inf"), peak + tl.log2(total)), mask=token < T)
