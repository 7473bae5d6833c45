"""From tensors to kernel launches: strides, grids, memory for the results."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from mm.kernels import triton_plan as plans
from mm.kernels.triton_backward import backward_bias, backward_keys, backward_queries
from mm.kernels.triton_forward import decode, forward, join
from mm.kernels.triton_plan import KernelArgs, Tile, decode_tile, forward_tile, key_tile, plan_of, query_tile
from mm.kernels.triton_tile import Heads, Line, Plan, Rotated, Where
from mm.kernels.triton_visibility import reach_keys, reach_queries

LOG2E = math.log2(math.e)


def heads(x: Tensor) -> Heads:
    (batch, head, token, _), (batches, heads, tokens, _) = x.stride(), x.shape
    return Heads(x, batch if batches > 1 else 0, head if heads > 1 else 0, token if tokens > 1 else 0)


def line(x: Tensor | None) -> Line | None:
    return None if x is None else Line(x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1))


def where(args: KernelArgs) -> tuple[Where, Where]:
    """Facts about the tokens of queries and keys."""
    return (Where(line(args.q_position), line(args.q_document), None),
            Where(line(args.k_position), line(args.k_document), line(args.prefix)))


def rotations(args: KernelArgs) -> list[Rotated | None]:
    return [None if cos is None else Rotated(heads(cos), heads(sin))
            for cos, sin in ((args.q_cos, args.q_sin), (args.k_cos, args.k_sin))]


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **options: Any) -> None:
    """Start a kernel: the only place where that happens."""
    kernel[grid](*given, **options)


def spans(args: KernelArgs, plan: Plan, kernel: Any, tiles: int) -> Tensor | None:
    """(B, tiles, 2) ranges of the other side that each tile reaches; None for plain runs, whose ranges are arithmetic,
    and where everything reaches everything."""
    if plan.regular or (plan.left, plan.right, plan.chunk, plan.documents) == (None, None, None, False):
        return None
    batch = args.q.shape[0]
    found = torch.empty(batch, tiles, 2, dtype=torch.int32, device=args.q.device)
    launch(kernel, (tiles * batch,), found, *where(args), *args.lengths, plan=plan, num_warps=4)
    return found


def by_token(x: Tensor, width: int | None = None) -> Tensor:
    """An empty (B, H, T, width) for x (B, H, T, E), a token's heads side by side as projections read and write them."""
    batch, count, length, own = x.shape
    return x.new_empty(batch, length, count, width or own).transpose(1, 2)


def row_bytes(x: Tensor) -> int:
    return x.shape[3] * x.element_size()


# ---------------------------------------------------------------------------------------------- forward
def attention(args: KernelArgs) -> tuple[Tensor, Tensor]:
    """Run the forward pass that suits the call: (out (B, H, T, F), lse (B, H, T) float32 in units of log 2)."""
    out = by_token(args.q, args.v.shape[3])
    lse = args.q.new_empty(args.q.shape[:3], dtype=torch.float32)
    if splits(args):
        decode_in(splits(args), args, out, lse)
        return out, lse
    tile = forward_tile(args)
    tile = plans.fitted(tile, args, tile.rows * row_bytes(args.q), "keys", args.k_cos)
    over_queries(args, forward, tile, heads(args.q), heads(args.k), heads(args.v), heads(out), lse, *where(args),
                 *rotations(args), args.sinks, args.bias_table(), args.seed)
    return out, lse


def over_queries(args: KernelArgs, kernel: Any, tile: Tile, *given: Any) -> None:
    """Start a kernel over tiles of packed query rows."""
    plan = plan_of(args, tile)
    tiles = triton.cdiv(args.q.shape[2] * plan.group, plan.rows)
    launch(kernel, (tiles * len(args.q), args.k.shape[1]), *given, spans(args, plan, reach_keys, tiles), args.scale,
           *args.lengths, plan=plan, **tile.options)


def splits(args: KernelArgs) -> int:
    """Count the parts into which `decode` splits keys: as many as fill the GPU twice, where all rows are one small tile
    and keys are many; 0 where they are not."""
    tile, (length, keys) = decode_tile(args), args.lengths
    if length * args.group > tile.rows or keys < 2 * tile.keys or args.dropout:
        return 0
    processors = torch.cuda.get_device_properties(args.q.device).multi_processor_count if args.q.is_cuda else 132
    programs = args.q.shape[0] * args.k.shape[1]
    return max(1, min(2 * processors // programs, keys // (2 * tile.keys)))


def decode_in(pieces: int, args: KernelArgs, out: Tensor, lse: Tensor) -> None:
    """Run `decode` with the keys in at most this many pieces, then `join` them."""
    batch, count, length, width = out.shape
    tile = decode_tile(args)
    plan = plan_of(args, tile)
    run = triton.cdiv(triton.cdiv(args.k.shape[2], pieces), plan.keys) * plan.keys
    pieces = triton.cdiv(args.k.shape[2], run)
    parts = lse.new_empty(batch, pieces * count, length, width)
    sums = lse.new_empty(batch, pieces * count, length)
    launch(decode, (pieces * batch, args.k.shape[1]), heads(args.q), heads(args.k), heads(args.v), heads(parts), sums,
           *where(args), *rotations(args), args.sinks, args.bias_table(), args.seed, args.scale, *args.lengths, run,
           plan=plan, **tile.options)
    launch(join, (length * batch, count), heads(parts), sums, heads(out), lse, length, pieces, width=width,
           padded=plans.power(width), num_warps=1)


# --------------------------------------------------------------------------------------------- backward
def gradients(args: KernelArgs, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, sinks and bias weights; the last two are empty where there are none."""
    dq, dk, dv = (by_token(x) for x in (args.q, args.k, args.v))
    delta = torch.empty_like(lse)
    given = [heads(x) for x in (grad, args.q, args.k, args.v)]
    shared = (*where(args), *rotations(args), args.bias_table(), args.seed)
    row = row_bytes(args.q) + row_bytes(args.v)
    tile = query_tile(args)
    tile = plans.fitted(tile, args, tile.rows * row, "keys", args.k_cos)
    over_queries(args, backward_queries, tile, *given, heads(out), heads(dq), lse, delta, *shared)
    dbias = args.q.new_empty(0)
    if args.buckets is not None:
        sums = lse.new_empty(*lse.shape, len(args.bias))
        over_queries(args, backward_bias, tile, *given, lse, delta, sums, args.buckets, *shared)
        dbias = sums.sum((0, 2)).T.to(args.bias.dtype)
    tile = key_tile(args)
    tile = plans.fitted(tile, args, tile.keys * row, "rows", args.q_cos)
    plan = plan_of(args, tile)
    tiles = triton.cdiv(args.k.shape[2], plan.keys)
    launch(backward_keys, (tiles * len(args.q), args.k.shape[1]), *given, heads(dk), heads(dv), lse, delta, *shared,
           spans(args, plan, reach_queries, tiles), args.scale, *args.lengths, plan=plan, **tile.options)
    return dq, dk, dv, sink_gradient(args, lse, delta), dbias


def sink_gradient(args: KernelArgs, lse: Tensor, delta: Tensor) -> Tensor:
    """(H,): a sink takes the share exp(sink) / sum of each row, and gives nothing."""
    if args.sinks is None:
        return args.q.new_empty(0)
    share = torch.exp2(args.sinks.float()[:, None] * LOG2E - lse)
    return -(share * delta).sum((0, 2)).to(args.sinks.dtype)
