"""Parts that all Triton kernels share: loading and rotating a tile, scores, dropout.

A head is handled as two column parts. Unrotated, the first is its largest power of two and the second the rest
(80 = 64 + 16, 192 = 128 + 64), so that no width is padded to the next power; rotated on load, the parts are the two
members of each pair, so that rotating is arithmetic in registers, forwards and backwards.

Query heads that share keys are packed: row r of a tile is token r // group, head r % group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Heads(NamedTuple):
    """A (B, H, T, E) tensor and its strides; channels are adjacent."""

    data: Any
    batch: int
    head: int
    token: int


class Line(NamedTuple):
    """A (B, T) tensor and its strides."""

    data: Any
    batch: int
    token: int


class Where(NamedTuple):
    """`mm.positions.visibility.At` as the kernels read it."""

    position: Line | None
    document: Line | None
    prefix: Line | None
    end: None = None  # Triton 3.6 loses the constants of a tuple behind a None, unless another None comes last


class Rotated(NamedTuple):
    cos: Heads
    sin: Heads


@dataclass(frozen=True)
class Plan:
    """The constants that a kernel is compiled with.

    rows, keys: packed query rows and keys of a tile. group: query heads to a key head. width, value_width: channels of
    a head. k1 + k2, v1 + v2: columns of the two parts of keys and of values. left, right, chunk: the window, None
    without a limit. regular: both sides are plain runs 0..T-1, so that positions are not read. documents, prefix:
    whether there are such facts. softcap, dropout: 0 for none. q_rope, k_rope: rotated channels, 0 for none, in pairs
    side by side where `interleaved`. reach: the distance from which on a bucketed bias is constant, 0 for no such bias;
    buckets: its rows. alibi, sinks: whether there are such.
    """

    rows: int
    keys: int
    group: int
    width: int
    value_width: int
    k1: int
    k2: int
    v1: int
    v2: int
    left: int | None
    right: int | None
    chunk: int | None
    regular: bool
    documents: bool
    prefix: bool
    softcap: float
    dropout: float
    q_rope: int
    k_rope: int
    interleaved: bool
    reach: int
    buckets: int
    alibi: bool
    sinks: bool


# ------------------------------------------------------------------------------------------------ loading
@triton.jit
def wide(x):
    """Make an integer 64 bits wide."""
    return x + tl.full([], 0, tl.int64)


@triton.jit
def place(tiles):
    """Return (tile, key head, batch row) of a program in a grid (tiles * B, K): only its first axis may be long."""
    return tl.program_id(0) % tiles, tl.program_id(1), tl.program_id(0) // tiles


@triton.jit
def base(x, b, h, token):
    """Address of token `token` of a head; 64-bit, so that offsets added to it can be 32-bit."""
    return x.data + wide(b) * x.batch + wide(h) * x.head + wide(token) * x.token


@triton.jit
def columns(plan: tl.constexpr):
    """Channels of the columns of the two parts of a query or key."""
    rotated: tl.constexpr = max(plan.q_rope, plan.k_rope)
    i = tl.arange(0, plan.k1)
    j = tl.arange(0, plan.k2 if plan.k2 > 0 else plan.k1)
    if rotated == 0:
        first, second = i, plan.k1 + j
    elif plan.interleaved:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + rotated // 2
    if rotated > 0 and rotated < plan.width:
        first = tl.where(i < rotated // 2, first, i + rotated // 2)
        second = tl.where(i < rotated // 2, second, i + plan.width // 2)
    return first, second


@triton.jit
def present(plan: tl.constexpr):
    """Masks of the columns of the two parts of a query or key that exist."""
    i = tl.arange(0, plan.k1)
    j = tl.arange(0, plan.k2 if plan.k2 > 0 else plan.k1)
    if max(plan.q_rope, plan.k_rope) == 0:
        first, second = i < plan.width, plan.k1 + j < plan.width
    else:
        first, second = i < plan.width // 2, j < plan.width // 2
    return first, second


@triton.jit
def part(start, offsets, inside, column, exists, whole: tl.constexpr, masked: tl.constexpr):
    """Load a tile (len(offsets), len(column)), 0 outside."""
    at = start + offsets[:, None] + column[None, :]
    if masked:
        x = tl.load(at, mask=inside[:, None] if whole else inside[:, None] & exists[None, :], other=0.0)
    elif whole:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=exists[None, :], other=0.0)
    return x


@triton.jit
def angles(by, b, heads, tokens, inside, rotated: tl.constexpr, plan: tl.constexpr):
    """Load cos and sin (rows, k1) of each pair; pairs that are not rotated have 1 and 0."""
    first, second = columns(plan)
    pairs = inside[:, None] & (tl.arange(0, plan.k1) < rotated // 2)[None, :]
    row = wide(b) * by.cos.batch + wide(heads) * by.cos.head + wide(tokens) * by.cos.token
    cos = tl.load(by.cos.data + row[:, None] + first[None, :], mask=pairs, other=1.0)
    row = wide(b) * by.sin.batch + wide(heads) * by.sin.head + wide(tokens) * by.sin.token
    sin = tl.load(by.sin.data + row[:, None] + second[None, :], mask=pairs, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def load_keyed(start, offsets, by, b, heads, tokens, inside, rotated: tl.constexpr, masked: tl.constexpr,
               plan: tl.constexpr):
    """Load both parts of a tile of queries or keys; `rotated` channels of them are rotated by the angles in `by`."""
    first, second = columns(plan)
    has_first, has_second = present(plan)
    whole: tl.constexpr = plan.k1 + plan.k2 == plan.width
    x = part(start, offsets, inside, first, has_first, whole or plan.q_rope + plan.k_rope == 0, masked)
    y = x
    if plan.k2 > 0:
        y = part(start, offsets, inside, second, has_second, whole, masked)
    if rotated > 0:
        cos, sin = angles(by, b, heads, tokens, inside, rotated, plan)
        wide_x, wide_y = x.to(tl.float32), y.to(tl.float32)
        x, y = (wide_x * cos - wide_y * sin).to(x.dtype), (wide_y * cos + wide_x * sin).to(y.dtype)
    return x, y


@triton.jit
def rotate_back(x, y, by, b, heads, tokens, inside, rotated: tl.constexpr, plan: tl.constexpr):
    """Apply the transpose of the rotation, for gradients (float32)."""
    if rotated > 0:
        cos, sin = angles(by, b, heads, tokens, inside, rotated, plan)
        x, y = x * cos + y * sin, y * cos - x * sin
    return x, y


@triton.jit
def load_values(start, offsets, inside, masked: tl.constexpr, plan: tl.constexpr):
    """Load both parts of a tile of values (or of outputs and their gradients)."""
    i = tl.arange(0, plan.v1)
    x = part(start, offsets, inside, i, i < plan.value_width, plan.v1 <= plan.value_width, masked)
    y = x
    if plan.v2 > 0:
        j = plan.v1 + tl.arange(0, plan.v2)
        y = part(start, offsets, inside, j, j < plan.value_width, plan.v1 + plan.v2 == plan.value_width, masked)
    return x, y


@triton.jit
def store_keyed(start, offsets, inside, x, y, plan: tl.constexpr):
    first, second = columns(plan)
    has_first, has_second = present(plan)
    kind = start.dtype.element_ty
    tl.store(start + offsets[:, None] + first[None, :], x.to(kind), mask=inside[:, None] & has_first[None, :])
    if plan.k2 > 0:
        tl.store(start + offsets[:, None] + second[None, :], y.to(kind), mask=inside[:, None] & has_second[None, :])


@triton.jit
def store_values(start, offsets, inside, x, y, plan: tl.constexpr):
    kind = start.dtype.element_ty
    i = tl.arange(0, plan.v1)
    tl.store(start + offsets[:, None] + i[None, :], x.to(kind), mask=inside[:, None] & (i < plan.value_width)[None, :])
    if plan.v2 > 0:
        j = plan.v1 + tl.arange(0, plan.v2)
        exists = inside[:, None] & (j < plan.value_width)[None, :]
        tl.store(start + offsets[:, None] + j[None, :], y.to(kind), mask=exists)


@triton.jit
def rows_of(x, b, kv_head, first, plan: tl.constexpr):
    """Address a tile of packed query rows that begins at row `first`: start, and offsets, tokens, heads of its rows."""
    row = first + tl.arange(0, plan.rows)
    token, head = row // plan.group, row % plan.group
    start = base(x, b, kv_head * plan.group, first // plan.group)
    return start, (token - first // plan.group) * x.token + head * x.head, token, kv_head * plan.group + head


@triton.jit
def row_values(x, b, kv_head, head, token, T, plan: tl.constexpr):
    """Addresses of the (B, H, T) numbers of packed query rows."""
    first = kv_head * plan.group
    return x + wide(b * tl.num_programs(1) * plan.group + first) * T + ((head - first) * T + token)


# ------------------------------------------------------------------------------------------------- scores
@triton.jit
def dots(x1, x2, y1, y2, second: tl.constexpr):
    """Multiply two tiles that are given in parts."""
    if x1.dtype == tl.float32:
        s = exactly(x1, y1)
        if second > 0:
            s += exactly(x2, y2)
    else:
        s = tl.dot(x1, tl.trans(y1))
        if second > 0:
            s = tl.dot(x2, tl.trans(y2), s)
    return s


@triton.jit
def exactly(x, y):
    """Multiply two float32 tiles as such, not as TF32, 16 channels at a time: more need too many registers."""
    count: tl.constexpr = tl.cdiv(x.shape[1], 16)
    return tl.sum(tl.dot(chunked(x, count), tl.permute(chunked(y, count), (0, 2, 1)), input_precision="ieee"), 0)


@triton.jit
def chunked(x, count: tl.constexpr):
    """(rows, channels) -> (count, rows, channels / count)."""
    return tl.permute(tl.reshape(x, (x.shape[0], count, x.shape[1] // count)), (1, 0, 2))


@triton.jit
def halves(at):
    """Load float32 numbers as two 16-bit halves: the compiler leaves such narrow loads alone, and would copy a whole
    tile of wider ones into shared memory for every step ahead."""
    low, high = tl.load(at).to(tl.int32) & 0xFFFF, tl.load(at + 1).to(tl.int32) << 16
    return (low | high).to(tl.float32, bitcast=True)


@triton.jit
def finish(s, scale, q, k, head, bias, plan: tl.constexpr):
    """Turn raw products into scores in units of log 2, and the factor of the softcap in their gradients."""
    slope = s
    if plan.softcap > 0.0:
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(s * (scale * (2.0 * LOG2E / plan.softcap))))  # tanh
        slope = 1.0 - bent * bent
        s = bent * (plan.softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    if plan.reach > 0:
        offset = tl.minimum(tl.maximum(k - q, -plan.reach), plan.reach) + plan.reach
        s += halves(bias + 2 * (head * (2 * plan.reach + 1) + offset)) * LOG2E
    if plan.alibi:
        s -= tl.load(bias + head) * tl.abs(k - q).to(tl.float32) * LOG2E
    return s, slope


@triton.jit
def keeps(seed, head, token, key, plan: tl.constexpr):
    """Draw which weights dropout keeps: a function of (seed, batch and head, query, key), so it can be replayed."""
    keep = head == head
    if plan.dropout > 0.0:
        draw, _, _, _ = tl.philox(seed, key + 0 * token, token + 0 * key, head + 0 * key, 0 * key + 0 * token)
        keep = (draw >> 8).to(tl.float32) * (1.0 / 16777216.0) >= plan.dropout
    return keep
