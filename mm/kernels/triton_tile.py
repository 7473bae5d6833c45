"""What every Triton kernel shares: loading and rotating a tile, who sees whom, scores, dropout, ranges of tiles.

A head is handled as two column parts. Unrotated, the first is its largest power of two and the second what is left
(80 = 64 + 16, 192 = 128 + 64), so that no width is padded to the next power; rotated on load, the parts are the two
members of each pair, so that turning is arithmetic in registers in both directions.

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
    """`mm.visibility.At` as the kernels read it."""

    position: Line | None
    document: Line | None
    prefix: Line | None


class Turned(NamedTuple):
    cos: Heads
    sin: Heads


@dataclass(frozen=True)
class Plan:
    """Everything that is fixed when a kernel is compiled. rows: packed query rows of a tile, keys: keys of a tile;
    k1 + k2 and v1 + v2: columns of the parts of keys and values; q_turn, k_turn: rotated channels (0: none);
    reach: distance from which on a bucketed bias is constant (0: no such bias)."""

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
    q_turn: int
    k_turn: int
    interleaved: bool
    reach: int
    buckets: int
    alibi: bool
    sinks: bool


# ------------------------------------------------------------------------------------------------ loading
@triton.jit
def wide(x):
    """A 64-bit integer."""
    return x + tl.full([], 0, tl.int64)


@triton.jit
def base(x, b, h, token):
    """Where token `token` of a head begins; 64-bit, so that what is added to it can be 32-bit."""
    return x.data + wide(b) * x.batch + wide(h) * x.head + wide(token) * x.token


@triton.jit
def columns(plan: tl.constexpr):
    """Channel of each column of the two parts of a query or key."""
    turned: tl.constexpr = max(plan.q_turn, plan.k_turn)
    i = tl.arange(0, plan.k1)
    j = tl.arange(0, plan.k2 if plan.k2 > 0 else plan.k1)
    if turned == 0:
        first, second = i, plan.k1 + j
    elif plan.interleaved:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + turned // 2
    if turned > 0 and turned < plan.width:
        first = tl.where(i < turned // 2, first, i + turned // 2)
        second = tl.where(i < turned // 2, second, i + plan.width // 2)
    return first, second


@triton.jit
def present(plan: tl.constexpr):
    """Which columns of the two parts of a query or key exist."""
    i = tl.arange(0, plan.k1)
    j = tl.arange(0, plan.k2 if plan.k2 > 0 else plan.k1)
    if max(plan.q_turn, plan.k_turn) == 0:
        first, second = i < plan.width, plan.k1 + j < plan.width
    else:
        first, second = i < plan.width // 2, j < plan.width // 2
    return first, second


@triton.jit
def part(start, offsets, inside, column, exists, whole: tl.constexpr, masked: tl.constexpr):
    """A tile (len(offsets), len(column)), 0 where nothing is."""
    at = start + offsets[:, None] + column[None, :]
    if masked:
        x = tl.load(at, mask=inside[:, None] if whole else inside[:, None] & exists[None, :], other=0.0)
    elif whole:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=exists[None, :], other=0.0)
    return x


@triton.jit
def angles(by, b, heads, tokens, inside, turned: tl.constexpr, plan: tl.constexpr):
    """cos and sin (rows, k1) of each pair; pairs that do not turn have 1 and 0."""
    first, second = columns(plan)
    turns = inside[:, None] & (tl.arange(0, plan.k1) < turned // 2)[None, :]
    row = wide(b) * by.cos.batch + wide(heads) * by.cos.head + wide(tokens) * by.cos.token
    cos = tl.load(by.cos.data + row[:, None] + first[None, :], mask=turns, other=1.0)
    row = wide(b) * by.sin.batch + wide(heads) * by.sin.head + wide(tokens) * by.sin.token
    sin = tl.load(by.sin.data + row[:, None] + second[None, :], mask=turns, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def load_keyed(start, offsets, by, b, heads, tokens, inside, turned: tl.constexpr, masked: tl.constexpr,
               plan: tl.constexpr):
    """Both parts of a tile of queries or keys, rotated where `turned` says so."""
    first, second = columns(plan)
    has_first, has_second = present(plan)
    whole: tl.constexpr = plan.k1 + plan.k2 == plan.width
    x = part(start, offsets, inside, first, has_first, whole or plan.q_turn + plan.k_turn == 0, masked)
    y = x
    if plan.k2 > 0:
        y = part(start, offsets, inside, second, has_second, whole, masked)
    if turned > 0:
        cos, sin = angles(by, b, heads, tokens, inside, turned, plan)
        wide_x, wide_y = x.to(tl.float32), y.to(tl.float32)
        x, y = (wide_x * cos - wide_y * sin).to(x.dtype), (wide_y * cos + wide_x * sin).to(y.dtype)
    return x, y


@triton.jit
def turn_back(x, y, by, b, heads, tokens, inside, turned: tl.constexpr, plan: tl.constexpr):
    """The transpose of the rotation, for gradients (float32)."""
    if turned > 0:
        cos, sin = angles(by, b, heads, tokens, inside, turned, plan)
        x, y = x * cos + y * sin, y * cos - x * sin
    return x, y


@triton.jit
def load_values(start, offsets, inside, masked: tl.constexpr, plan: tl.constexpr):
    """Both parts of a tile of values (or of outputs and their gradients)."""
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
    """A tile of packed query rows that begins at row `first`: where it starts, offset of each row, tokens, heads."""
    row = first + tl.arange(0, plan.rows)
    token, head = row // plan.group, row % plan.group
    start = base(x, b, kv_head * plan.group, first // plan.group)
    return start, (token - first // plan.group) * x.token + head * x.head, token, kv_head * plan.group + head


@triton.jit
def row_values(x, b, kv_head, head, token, T, plan: tl.constexpr):
    """Where (B, H, T) numbers of packed query rows lie."""
    first = kv_head * plan.group
    return x + wide(b * tl.num_programs(1) * plan.group + first) * T + ((head - first) * T + token)


# ------------------------------------------------------------------------------------------- who sees whom
@triton.jit
def read(line, b, index, inside, other: tl.constexpr):
    return tl.load(line.data + wide(b) * line.batch + wide(index) * line.token, mask=inside, other=other)


@triton.jit
def locate(at, b, index, inside):
    """Positions, documents and prefix flags of tokens; what is not given is the position again."""
    position = index
    if at.position is not None:
        position = read(at.position, b, index, inside, -1).to(tl.int32)
    document, prefix = position, position
    if at.document is not None:
        document = read(at.document, b, index, inside, -1)
    if at.prefix is not None:
        prefix = read(at.prefix, b, index, inside, 0).to(tl.int32)
    return position, document, prefix


@triton.jit
def sees(q, q_document, k, k_document, k_prefix, k_inside, plan: tl.constexpr):
    """`mm.visibility.visible` for positions that broadcast against each other."""
    seen = k_inside if plan.regular else k >= 0
    if plan.right is not None:
        near = k <= q + plan.right
        if plan.prefix:
            near = near | (k_prefix != 0)
        seen = seen & near
    if plan.left is not None:
        seen = seen & (k >= q - plan.left)
    if plan.chunk is not None:  # one chunk further, since division rounds negative positions towards 0
        seen = seen & ((k + plan.chunk) // plan.chunk == (q + plan.chunk) // plan.chunk)
    if plan.documents:
        seen = seen & (q_document == k_document)
    if not plan.regular:
        seen = seen | (k == -2)
    return seen


@triton.jit
def span(first, last, length, back, ahead, per, step, plan: tl.constexpr):
    """Tiles that a plain run of tokens first..last reaches on the other side: (start, a, z, end), where a..z are seen
    whole by every token. `back` and `ahead` say how far they reach, `per` rows a token takes there, `step` a tile."""
    low, high, inner_low, inner_high = first * 0, length, first * 0, length
    if back is not None:
        low, inner_low = tl.maximum(low, first - back), tl.maximum(inner_low, last - back)
    if ahead is not None:
        high, inner_high = tl.minimum(high, last + ahead + 1), tl.minimum(inner_high, first + ahead + 1)
    if plan.chunk is not None:
        low = tl.maximum(low, first // plan.chunk * plan.chunk)
        inner_low = tl.maximum(inner_low, last // plan.chunk * plan.chunk)
        high = tl.minimum(high, (last // plan.chunk + 1) * plan.chunk)
        inner_high = tl.minimum(inner_high, (first // plan.chunk + 1) * plan.chunk)
    start, end = low * per // step, tl.cdiv(tl.maximum(high, low) * per, step)
    a = tl.minimum(tl.cdiv(inner_low * per, step), end)
    return start, a, tl.maximum(tl.minimum(inner_high * per // step, end), a), end


# ------------------------------------------------------------------------------------------------- scores
@triton.jit
def dots(x1, x2, y1, y2, second: tl.constexpr):
    """Products of two tiles given in parts; float32 is multiplied as such, not as TF32."""
    s = tl.dot(x1, tl.trans(y1), input_precision="ieee")
    if second > 0:
        s = tl.dot(x2, tl.trans(y2), s, input_precision="ieee")
    return s


@triton.jit
def halves(at):
    """float32 from two 16-bit halves: loads as narrow as these are left alone, while the compiler would copy a whole
    tile of wider ones into shared memory for every step ahead."""
    low, high = tl.load(at).to(tl.int32) & 0xFFFF, tl.load(at + 1).to(tl.int32) << 16
    return (low | high).to(tl.float32, bitcast=True)


@triton.jit
def finish(s, scale, q, k, head, bias, plan: tl.constexpr):
    """Raw products -> scores in units of log 2, and what the softcap multiplies their gradients by."""
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
    """Which weights dropout keeps: a function of (seed, batch and head, query, key), so that it can be replayed."""
    keep = head == head
    if plan.dropout > 0.0:
        draw, _, _, _ = tl.philox(seed, key + 0 * token, token + 0 * key, head + 0 * key, 0 * key + 0 * token)
        keep = (draw >> 8).to(tl.float32) * (1.0 / 16777216.0) >= plan.dropout
    return keep
