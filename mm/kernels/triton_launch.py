"""From tensors to kernel launches: strides, column parts, tile sizes by head width, grids."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from .triton_backward import backward_keys, backward_queries
from .triton_bias import backward_bias
from .triton_decode import decode, join
from .triton_forward import forward
from .triton_reach import reach_keys, reach_queries
from .triton_tile import Heads, Line, Plan, Turned, Where

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Call:
    """The arguments of `mm::attention`, in its order (see `operator`)."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    bias: Tensor | None
    buckets: Tensor | None
    seed: Tensor | None
    q_position: Tensor | None
    k_position: Tensor | None
    q_document: Tensor | None
    k_document: Tensor | None
    prefix: Tensor | None
    q_cos: Tensor | None
    q_sin: Tensor | None
    k_cos: Tensor | None
    k_sin: Tensor | None
    interleaved: bool
    regular: bool
    left: int  # -1: without limit, as in the next two
    right: int
    chunk: int
    scale: float
    softcap: float
    dropout: float

    @property
    def lengths(self) -> tuple[int, int]:
        return self.q.shape[2], self.k.shape[2]

    @property
    def plain(self) -> bool:
        """Whether tiles carry nothing but scores: no positions to read, no rotation, no bias, no softcap."""
        return self.regular and self.q_cos is None and self.k_cos is None and self.bias is None and not self.softcap

    def table(self) -> Tensor | None:
        """What the kernels read a bias from: (H, 2 * reach + 1) values by offset as int16 halves, or (H,) slopes."""
        if self.buckets is None:
            return None if self.bias is None else self.bias.float().contiguous()
        return self.bias.float()[self.buckets].T.contiguous().view(torch.int16)


@dataclass(frozen=True)
class Tile:
    """Packed query rows and keys of a tile, warps, and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def widest(call: Call) -> int:
    return max(call.q.shape[3], call.v.shape[3])


def forward_tile(call: Call) -> Tile:
    """The largest that spill no registers, by `mm bench attention --suite compile`; so are the next three."""
    if call.q.dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    width = widest(call)
    if width <= 96:
        return Tile(128, 128 if call.plain else 64, 8, 3 if width <= 64 else 2)
    return Tile(128, 32 if width > 192 or call.bias is not None else 64, 8, 3)


def decode_tile(call: Call) -> Tile:
    """All rows at once; keys as they stream in from memory."""
    rows = power(call.q.shape[2] * (call.q.shape[1] // call.k.shape[1]))
    return Tile(min(rows, 64), 64 if widest(call) <= 128 else 32, 4, 3)


def query_tile(call: Call) -> Tile:
    """Of dQ and of the gradient of a bias."""
    if call.q.dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    width = widest(call)
    if width <= 128:
        return Tile(128, 32 if width > 64 and call.bias is not None else 64, 8, 2)
    return Tile(64, 64 if width <= 192 and call.plain else 32, 8, 2)


def key_tile(call: Call) -> Tile:
    """Of dK and dV."""
    if call.q.dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    width = widest(call)
    if width <= 128:
        turned = width > 64 and call.q_cos is not None
        light = width <= 64 or call.plain and call.right >= 0  # 64 rows of a full run spill 48 bytes
        return Tile(64 if light else 32, 64 if turned else 128, 8, 2)
    return Tile(32 if width <= 192 else 16, 64, 8, 2)


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; an H100's where the device is not a GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232448


def fitted(tile: Tile, call: Call, kept: int, streamed: str, turned: Tensor | None) -> Tile:
    """Fewer stages, then smaller steps, until a program fits the GPU. kept: bytes that it holds throughout; streamed:
    the side that passes by, "rows" or "keys", with angles where `turned`."""
    size = (call.q.shape[3] + call.v.shape[3]) * call.q.element_size() + (0 if turned is None else 4 * turned.shape[3])
    room = shared_memory(call.q.device) - 4096 - kept
    while tile.stages > 1 and tile.stages * getattr(tile, streamed) * size > room:
        tile = replace(tile, stages=tile.stages - 1)
    while getattr(tile, streamed) > 16 and getattr(tile, streamed) * size > room:
        tile = replace(tile, **{streamed: getattr(tile, streamed) // 2})
    return tile


def power(x: int) -> int:
    """The next power of two, at least what a product takes."""
    return max(16, triton.next_power_of_2(x))


def parts(width: int, turned: bool) -> tuple[int, int]:
    """Columns of the two parts of a head."""
    if turned:
        return power(width // 2), power(width // 2)
    first = power(width) if power(width) == width else power(width) // 2
    return first, power(width - first) if width > first else 0


def plan_of(call: Call, tile: Tile) -> Plan:
    """What is fixed at compile time; fewer rows where there are not as many."""
    group, width, value_width = call.q.shape[1] // call.k.shape[1], call.q.shape[3], call.v.shape[3]
    q_turn, k_turn = (0 if cos is None else cos.shape[-1] for cos in (call.q_cos, call.k_cos))
    k1, k2 = parts(width, max(q_turn, k_turn) > 0)
    v1, v2 = parts(value_width, False)
    left, right, chunk = (None if far < 0 else far for far in (call.left, call.right, call.chunk))
    reach = 0 if call.buckets is None else len(call.buckets) // 2
    return Plan(
        rows=min(tile.rows, power(call.q.shape[2] * group)), keys=tile.keys, group=group, width=width,
        value_width=value_width, k1=k1, k2=k2, v1=v1, v2=v2, left=left, right=right, chunk=chunk, regular=call.regular,
        documents=call.q_document is not None, prefix=call.prefix is not None, softcap=call.softcap,
        dropout=call.dropout, q_turn=q_turn, k_turn=k_turn, interleaved=call.interleaved, reach=reach,
        buckets=0 if call.bias is None else len(call.bias), alibi=call.bias is not None and reach == 0,
        sinks=call.sinks is not None)


def heads(x: Tensor) -> Heads:
    strides = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return Heads(x, *strides)


def line(x: Tensor | None) -> Line | None:
    return None if x is None else Line(x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1))


def where(call: Call) -> tuple[Where, Where]:
    return (Where(line(call.q_position), line(call.q_document), None),
            Where(line(call.k_position), line(call.k_document), line(call.prefix)))


def turned(call: Call) -> list[Turned | None]:
    return [None if cos is None else Turned(heads(cos), heads(sin))
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
    launch(kernel, (tiles, batch), found, *where(call), *call.lengths, plan=plan, num_warps=4)
    return found


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """(out (B, H, T, F), lse (B, H, T) float32 in units of log 2)."""
    batch, count, length, _ = call.q.shape
    out = call.q.new_empty(batch, count, length, call.v.shape[3])
    lse = call.q.new_empty(batch, count, length, dtype=torch.float32)
    pieces = splits(call)
    if pieces > 1:
        decode_in(pieces, call, out, lse)
        return out, lse
    tile = forward_tile(call)
    tile = fitted(tile, call, tile.rows * call.q[0, 0, 0].nbytes, "keys", call.k_cos)
    plan = plan_of(call, tile)
    tiles = triton.cdiv(length * plan.group, plan.rows)
    reached = spans(call, plan, reach_keys, tiles)
    launch(forward, (tiles, call.k.shape[1], batch), heads(call.q), heads(call.k), heads(call.v), heads(out), lse,
           *where(call), *turned(call), call.sinks, call.table(), call.seed, reached, call.scale, *call.lengths,
           plan=plan, **tile.options)
    return out, lse


def splits(call: Call) -> int:
    """Into how many parts keys are split: as many as fill the GPU twice, where all rows are one small tile."""
    tile, (length, keys) = decode_tile(call), call.lengths
    group = call.q.shape[1] // call.k.shape[1]
    if length * group > tile.rows or call.dropout:
        return 1
    processors = torch.cuda.get_device_properties(call.q.device).multi_processor_count if call.q.is_cuda else 132
    programs = call.q.shape[0] * call.k.shape[1]
    return max(1, min(2 * processors // max(programs, 1), keys // (2 * tile.keys)))


def decode_in(pieces: int, call: Call, out: Tensor, lse: Tensor) -> None:
    batch, count, length, width = out.shape
    tile = decode_tile(call)
    plan = plan_of(call, tile)
    run = triton.cdiv(triton.cdiv(call.k.shape[2], pieces), plan.keys) * plan.keys
    parts = lse.new_empty(batch, pieces * count, length, width)
    sums = lse.new_empty(batch, pieces * count, length)
    launch(decode, (pieces, call.k.shape[1], batch), heads(call.q), heads(call.k), heads(call.v), heads(parts), sums,
           *where(call), *turned(call), call.sinks, call.table(), call.seed, call.scale, *call.lengths, run, plan=plan,
           **tile.options)
    launch(join, (length, count, batch), heads(parts), sums, heads(out), lse, length, pieces, width=width,
           padded=power(width), num_warps=1)


def gradients(call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v, sinks and bias weights; the last two are empty where there are none."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.q, call.k, call.v))
    delta = torch.empty_like(lse)
    given = [heads(x) for x in (grad, call.q, call.k, call.v)]
    shared = (*where(call), *turned(call), call.table(), call.seed)
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
    row = call.q[0, 0, 0].nbytes + call.v[0, 0, 0].nbytes
    tile = fitted(tile, call, (tile.keys if over_keys else tile.rows) * row, "rows" if over_keys else "keys",
                  call.q_cos if over_keys else call.k_cos)
    plan = plan_of(call, tile)
    tiles = triton.cdiv(*((call.k.shape[2], plan.keys) if over_keys else (call.q.shape[2] * plan.group, plan.rows)))
    reached = spans(call, plan, reach_queries if over_keys else reach_keys, tiles)
    launch(kernel, (tiles, call.k.shape[1], call.q.shape[0]), *args, reached, call.scale, *call.lengths, plan=plan,
           **tile.options)


def sink_gradient(call: Call, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink takes the share exp(sink) / sum of each row, and gives nothing."""
    if call.sinks is None:
        return call.q.new_empty(0)
    share = torch.exp2(call.sinks.float()[:, None] * LOG2E - lse)
    return -(share * delta).sum((0, 2)).to(call.sinks.dtype)
