"""A forward pass for Hopper with specialised warps, on trial: nobody has measured yet whether it is faster than ours.

One group of warps fetches tiles by the tensor memory accelerator, two multiply. Triton's compiler divides the work
where it finds one loop, 4 warps, 128 rows and tiles that come by descriptors made in the kernel; so every step is
masked, and heads that share keys are not packed. For plain runs of 16-bit numbers. Where `mm bench attention` finds it
faster, it belongs into `mm.kernels`. Importing this file imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm.kernels import triton_launch
from mm.kernels.triton_forward import begin, weigh
from mm.kernels.triton_plan import KernelArgs, Tile, plan_of
from mm.kernels.triton_tile import base, finish, place, wide
from mm.kernels.triton_visibility import sees, span

TILE = Tile(128, 128, 4, 2)


def suits_hopper(args: KernelArgs) -> bool:
    """Whether `forward_hopper` can do it: plain runs of 16-bit heads, 64 or 128 wide, where descriptors can point."""
    heads = (args.q, args.k, args.v)
    return (args.regular and args.q_cos is None and args.k_cos is None and args.bias is None and not args.dropout
            and args.q.element_size() == 2 and args.q.shape[3] == args.v.shape[3] and args.q.shape[3] in (64, 128)
            and args.q.shape[2] >= TILE.rows
            and all(x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3]) for x in heads))


def forward_on_hopper(args: KernelArgs, out: Tensor, lse: Tensor) -> None:
    """Write out (B, H, T, F) and lse (B, H, T) as `triton_launch.attention` returns them."""
    plan, device = plan_of(args, TILE), args.q.device
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
    grid = (triton.cdiv(args.q.shape[2], plan.rows) * len(out), out.shape[1])
    triton_launch.launch(forward_hopper, grid, *map(triton_launch.heads, (args.q, args.k, args.v, out)), lse,
                         args.sinks, args.scale, *args.lengths, plan=plan, **TILE.options)


@triton.jit
def tokens_of(x, b, head, length, count: tl.constexpr, width: tl.constexpr):
    """Describe a head's tokens, to be fetched `count` at a time; beyond `length` they are 0."""
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
