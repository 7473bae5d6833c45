"""What a call is compiled with: tile sizes by head width, column parts, features."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mm.kernels.triton_tile import Plan


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


HOPPER_TILE = Tile(128, 128, 4, 2)
HOPPER_IS_FASTER = False  # than `forward`: nobody has measured it yet (`mm bench attention` does)


def widest(call: Call) -> int:
    return max(call.q.shape[3], call.v.shape[3])


def forward_tile(call: Call) -> Tile:
    """The largest that spill no registers, by `mm bench attention --suite compile`; so are the next three."""
    if call.q.dtype == torch.float32:
        return Tile(16, 32, 8, 1)
    width = widest(call)
    if width <= 96:
        return Tile(128, 128 if call.plain else 64, 8, 3 if width <= 64 else 2)
    return Tile(128, 32 if width > 192 or call.bias is not None else 64, 8, 3)


def suits_hopper(call: Call) -> bool:
    """Whether `forward_hopper` can do it: plain runs of 16-bit heads, 64 or 128 wide, where descriptors can point."""
    heads = (call.q, call.k, call.v)
    return (call.regular and call.q_cos is None and call.k_cos is None and call.bias is None and not call.dropout
            and call.q.element_size() == 2 and call.q.shape[3] == call.v.shape[3] and call.q.shape[3] in (64, 128)
            and call.q.shape[2] >= HOPPER_TILE.rows
            and all(x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3]) for x in heads))


def decode_tile(call: Call) -> Tile:
    """All rows at once; keys as they stream in from memory."""
    if call.q.dtype == torch.float32:
        return Tile(16, 32, 8, 2)
    rows = power(call.q.shape[2] * (call.q.shape[1] // call.k.shape[1]))
    return Tile(min(rows, 64), 64 if widest(call) <= 128 else 32, 4, 3)


def query_tile(call: Call) -> Tile:
    """Of dQ and of the gradient of a bias."""
    if call.q.dtype == torch.float32:
        return Tile(16, 32, 8, 1)
    width = widest(call)
    if width <= 128:
        return Tile(128, 32 if width > 64 and call.bias is not None else 64, 8, 2)
    return Tile(64, 64 if width <= 192 and call.plain else 32, 8, 2)


def key_tile(call: Call) -> Tile:
    """Of dK and dV."""
    if call.q.dtype == torch.float32:
        return Tile(16, 16, 8 if widest(call) <= 128 else 16, 1)
    width = widest(call)
    if width <= 128:
        rotated = width > 64 and call.q_cos is not None
        return Tile(64 if width <= 64 or call.plain and not call.dropout else 32, 64 if rotated else 128, 8, 2)
    return Tile(32 if width <= 192 else 16, 64, 8, 2)


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; an H100's where the device is not a GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232448


def fitted(tile: Tile, call: Call, kept: int, streamed: str, rotated: Tensor | None) -> Tile:
    """Fewer stages, then smaller steps, until a program fits the GPU. kept: bytes that it holds throughout; streamed:
    the side that passes by, "rows" or "keys", with angles where `rotated`."""
    size = (call.q.shape[3] + call.v.shape[3]) * call.q.element_size()
    size += 0 if rotated is None else 4 * rotated.shape[3]
    room = shared_memory(call.q.device) - 4096 - kept
    while tile.stages > 1 and tile.stages * getattr(tile, streamed) * size > room:
        tile = replace(tile, stages=tile.stages - 1)
    while getattr(tile, streamed) > 16 and getattr(tile, streamed) * size > room:
        tile = replace(tile, **{streamed: getattr(tile, streamed) // 2})
    return tile


def row_bytes(x: Tensor) -> int:
    return x.shape[3] * x.element_size()


def power(x: int) -> int:
    """The next power of two, at least what a product takes."""
    return max(16, 1 << (x - 1).bit_length())


def tiles_of(count: int, size: int) -> int:
    return -(-count // size)


def parts(width: int, most: int) -> tuple[int, int]:
    """Columns of the two parts of a head that is not rotated: its largest power of two up to `most`, and the rest."""
    first = min(power(width) if power(width) == width else power(width) // 2, most)
    return first, power(width - first) if width > first else 0


def plan_of(call: Call, tile: Tile) -> Plan:
    """What is fixed at compile time; fewer rows where there are not as many."""
    group, width, value_width = call.q.shape[1] // call.k.shape[1], call.q.shape[3], call.v.shape[3]
    q_rope, k_rope = (0 if cos is None else cos.shape[-1] for cos in (call.q_cos, call.k_cos))
    widest_part = 128 if call.q.dtype == torch.float32 else 256
    k1, k2 = (power(width // 2),) * 2 if q_rope or k_rope else parts(width, widest_part)
    v1, v2 = parts(value_width, widest_part)
    left, right, chunk = (None if far < 0 else far for far in (call.left, call.right, call.chunk))
    reach = 0 if call.buckets is None else len(call.buckets) // 2
    return Plan(
        rows=min(tile.rows, power(call.q.shape[2] * group)), keys=tile.keys, group=group, width=width,
        value_width=value_width, k1=k1, k2=k2, v1=v1, v2=v2, left=left, right=right, chunk=chunk, regular=call.regular,
        documents=call.q_document is not None, prefix=call.prefix is not None, softcap=call.softcap,
        dropout=call.dropout, q_rope=q_rope, k_rope=k_rope, interleaved=call.interleaved, reach=reach,
        buckets=0 if call.bias is None else len(call.bias), alibi=call.bias is not None and reach == 0,
        sinks=call.sinks is not None)
