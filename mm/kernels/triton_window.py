"""Who sees whom, as every Triton kernel asks it: where tokens are, masks, the tiles that a plain run reaches."""

from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.triton_tile import wide


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
    """`mm.positions.visibility.visible` for positions that broadcast against each other."""
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
