"""From tensors to kernel launches: strides, grids, memory for what comes out."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from mm.kernels.triton_backward import backward_keys, backward_queries
from mm.kernels.triton_bias import backward_bias
from mm.kernels.triton_decode import decode, join
from mm.kernels.triton_forward import forward
from mm.kernels.triton_hopper import forward_hopper
from mm.kernels.triton_plan import (
    HOPPER_IS_FASTER,
    HOPPER_TILE,
    Call,
    Tile,
    decode_tile,
    fitted,
    forward_tile,
    key_tile,
    plan_of,
    power,
    query_tile,
    row_bytes,
    suits_hopper,
    tiles_of,
)
from mm.kernels.triton_reach import reach_keys, reach_queries
from mm.kernels.triton_tile import Heads, Line, Plan, Rotated, Where

LOG2E = math.log2(math.e)


def heads(x: Tensor) -> Heads:
    (batch, head, token, _), (batches, heads, tokens, _) = x.stride(), x.shape
    return Heads(x, batch if batches > 1 else 0, head if heads > 1 else 0, token if tokens > 1 else 0)


def line(x: Tensor | None) -> Line | None:
    return None if x is None else Line(x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1))


def where(call: Call) -> tuple[Where, Where]:
    return (Where(line(call.q_position), line(call.q_document), None),
            Where(line(call.k_position), line(call.k_document), line(call.prefix)))


def rotated(call: Call) -> list[Rotated | None]:
    return [None if cos is None else Rotated(heads(cos), heads(sin))
            for cos, sin in ((call.q_cos, call.q_sin), (call.k_cos, call.k_sin))]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """The only place where kernels start."""
    kernel[grid](*args, **options)


def spans(call: Call, plan: Plan, kernel: Any, tiles: int) -> Tensor | None:
    """Ranges of the other side that each tile reaches; None for plain runs, whose ranges are arithmetic, and where
    everything reaches everything."""
    if plan.regular or (plan.left, plan.right, plan.chunk, plan.documents) == (None, None, None, False):
        return None
    batch = call.q.shape[0]
    found = torch.empty(batch, tiles, 2, dtype=torch.int32, device=call.q.device)
    launch(kernel, (tiles * batch,), found, *where(call), *call.lengths, plan=plan, num_warps=4)
    return found


def by_token(x: Tensor, width: int | None = None) -> Tensor:
    """An empty (B, H, T, width) for x (B, H, T, E), a token's heads side by side as projections read and write them."""
    batch, count, length, own = x.shape
    return x.new_empty(batch, length, count, width or own).transpose(1, 2)


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """(out (B, H, T, F), lse (B, H, T) float32 in units of log 2)."""
    batch, count, length, _ = call.q.shape
    out = by_token(call.q, call.v.shape[3])
    lse = call.q.new_empty(batch, count, length, dtype=torch.float32)
    pieces = splits(call)
    if pieces:
        decode_in(pieces, call, out, lse)
        return out, lse
    if HOPPER_IS_FASTER and suits_hopper(call) and torch.cuda.get_device_capability(call.q.device) == (9, 0):
        forward_on_hopper(call, out, lse)
        return out, lse
    tile = forward_tile(call)
    tile = fitted(tile, call, tile.rows * row_bytes(call.q), "keys", call.k_cos)
    plan = plan_of(call, tile)
    tiles = tiles_of(length * plan.group, plan.rows)
    reached = spans(call, plan, reach_keys, tiles)
    launch(forward, (tiles * batch, call.k.shape[1]), heads(call.q), heads(call.k), heads(call.v), heads(out), lse,
           *where(call), *rotated(call), call.sinks, call.table(), call.seed, reached, call.scale, *call.lengths,
           plan=plan, **tile.options)
    return out, lse


def forward_on_hopper(call: Call, out: Tensor, lse: Tensor) -> None:
    plan, device = plan_of(call, HOPPER_TILE), call.q.device
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
    grid = (tiles_of(call.q.shape[2], plan.rows) * len(out), out.shape[1])
    launch(forward_hopper, grid, heads(call.q), heads(call.k), heads(call.v), heads(out), lse, call.sinks, call.scale,
           *call.lengths, plan=plan, **HOPPER_TILE.options)


def splits(call: Call) -> int:
    """Into how many parts `decode` splits keys: as many as fill the GPU twice, where all rows are one small tile and
    keys are many; 0 where they are not."""
    tile, (length, keys) = decode_tile(call), call.lengths
    group = call.q.shape[1] // call.k.shape[1]
    if length * group > tile.rows or keys < 2 * tile.keys or call.dropout:
        return 0
    processors = torch.cuda.get_device_properties(call.q.device).multi_processor_count if call.q.is_cuda else 132
    programs = call.q.shape[0] * call.k.shape[1]
    return max(1, min(2 * processors // programs, keys // (2 * tile.keys)))


def decode_in(pieces: int, call: Call, out: Tensor, lse: Tensor) -> None:
    batch, count, length, width = out.shape
    tile = decode_tile(call)
    plan = plan_of(call, tile)
    run = tiles_of(tiles_of(call.k.shape[2], pieces), plan.keys) * plan.keys
    pieces = tiles_of(call.k.shape[2], run)
    parts = lse.new_empty(batch, pieces * count, length, width)
    sums = lse.new_empty(batch, pieces * count, length)
    launch(decode, (pieces * batch, call.k.shape[1]), heads(call.q), heads(call.k), heads(call.v), heads(parts), sums,
           *where(call), *rotated(call), call.sinks, call.table(), call.seed, call.scale, *call.lengths, run, plan=plan,
           **tile.options)
    launch(join, (length * batch, count), heads(parts), sums, heads(out), lse, length, pieces, width=width,
           padded=power(width), num_warps=1)


def gradients(call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v, sinks and bias weights; the last two are empty where there are none."""
    dq, dk, dv = (by_token(x) for x in (call.q, call.k, call.v))
    delta = torch.empty_like(lse)
    given = [heads(x) for x in (grad, call.q, call.k, call.v)]
    shared = (*where(call), *rotated(call), call.table(), call.seed)
    back(call, backward_queries, query_tile(call), *given, heads(out), heads(dq), lse, delta, *shared)
    back(call, backward_keys, key_tile(call), *given, heads(dk), heads(dv), lse, delta, *shared)
    dbias = call.q.new_empty(0)
    if call.buckets is not None:
        sums = lse.new_empty(*lse.shape, len(call.bias))
        back(call, backward_bias, query_tile(call), *given, lse, delta, sums, call.buckets, *shared)
        dbias = sums.sum((0, 2)).T.to(call.bias.dtype)
    return dq, dk, dv, sink_gradient(call, lse, delta), dbias


def back(call: Call, kernel: Any, tile: Tile, *args: Any) -> None:
    """One kernel of the backward pass, over tiles of keys or of packed query rows."""
    over_keys = kernel is backward_keys
    row = row_bytes(call.q) + row_bytes(call.v)
    tile = fitted(tile, call, (tile.keys if over_keys else tile.rows) * row, "rows" if over_keys else "keys",
                  call.q_cos if over_keys else call.k_cos)
    plan = plan_of(call, tile)
    tiles = tiles_of(*(call.k.shape[2], plan.keys) if over_keys else (call.q.shape[2] * plan.group, plan.rows))
    reached = spans(call, plan, reach_queries if over_keys else reach_keys, tiles)
    launch(kernel, (tiles * call.q.shape[0], call.k.shape[1]), *args, reached, call.scale, *call.lengths, plan=plan,
           **tile.options)


def sink_gradient(call: Call, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink takes the share exp(sink) / sum of each row, and gives nothing."""
    if call.sinks is None:
        return call.q.new_empty(0)
    share = torch.exp2(call.sinks.float()[:, None] * LOG2E - lse)
    return -(share * delta).sum((0, 2)).to(call.sinks.dtype)
