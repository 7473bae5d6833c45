"""Arguments of the Triton kernels, and the constants that each is compiled with: tile sizes, column parts, features."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mm.kernels.triton_tile import Plan


@dataclass(frozen=True)
class KernelArgs:
    """The arguments of `mm::attention`, in the order of its schema: tensors first.

    q (B, H, T, E), k (B, K, S, E), v (B, K, S, F); sinks (H,); bias and buckets as in `ByOffset`; seed (1,) of dropout;
    positions and documents (B, T) or (B, S), prefix (B, S), None for plain runs; cos and sin (B or 1, H or 1, T, R) of
    rotations that are left to the kernel. left, right, chunk: the window, -1 without a limit.
    """

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
    left: int
    right: int
    chunk: int
    scale: float
    softcap: float
    dropout: float

    @property
    def lengths(self) -> tuple[int, int]:
        return self.q.shape[2], self.k.shape[2]

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def widest(self) -> int:
        return max(self.q.shape[3], self.v.shape[3])

    @property
    def exact(self) -> bool:
        """Whether products are of float32 numbers as such, which need small tiles."""
        return self.q.dtype == torch.float32

    @property
    def plain(self) -> bool:
        """Whether tiles carry nothing but scores: no positions to read, no rotation, no bias, no softcap."""
        return self.regular and self.q_cos is None and self.k_cos is None and self.bias is None and not self.softcap

    def bias_table(self) -> Tensor | None:
        """The bias as the kernels read it: (H, 2 * reach + 1) values by offset as int16 halves, or (H,) slopes."""
        if self.buckets is None:
            return None if self.bias is None else self.bias.float().contiguous()
        return self.bias.float()[self.buckets].T.contiguous().view(torch.int16)


# ------------------------------------------------------------------------------------------------- tiles
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


def forward_tile(args: KernelArgs) -> Tile:
    """The largest that spills no registers, by `mm bench attention --suite compile`; so are the next three."""
    if args.exact:
        return Tile(16, 32, 8, 1)
    if args.widest <= 96:
        return Tile(128, 128 if args.plain else 64, 8, 3 if args.widest <= 64 else 2)
    return Tile(128, 32 if args.widest > 192 or args.bias is not None else 64, 8, 3)


def decode_tile(args: KernelArgs) -> Tile:
    """All rows at once; keys as they stream in from memory."""
    if args.exact:
        return Tile(16, 32, 8, 2)
    return Tile(min(power(args.q.shape[2] * args.group), 64), 64 if args.widest <= 128 else 32, 4, 3)


def query_tile(args: KernelArgs) -> Tile:
    """For `backward_queries` and `backward_bias`."""
    if args.exact:
        return Tile(16, 32, 8, 1)
    if args.widest <= 128:
        return Tile(128, 32 if args.widest > 64 and args.bias is not None else 64, 8, 2)
    return Tile(64, 64 if args.widest <= 192 and args.plain else 32, 8, 2)


def key_tile(args: KernelArgs) -> Tile:
    """For `backward_keys`."""
    if args.exact:
        return Tile(16, 16, 8 if args.widest <= 128 else 16, 1)
    if args.widest <= 128:
        rotated = args.widest > 64 and args.q_cos is not None
        return Tile(64 if args.widest <= 64 or args.plain and not args.dropout else 32, 64 if rotated else 128, 8, 2)
    return Tile(32 if args.widest <= 192 else 16, 64, 8, 2)


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; an H100's where the device is not a GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232448


def fitted(tile: Tile, args: KernelArgs, kept: int, streamed: str, rotated: Tensor | None) -> Tile:
    """Take fewer stages, then smaller steps, until a program fits the GPU. kept: bytes that it holds throughout;
    streamed: the side that passes by, "rows" or "keys", with angles where `rotated`."""
    size = (args.q.shape[3] + args.v.shape[3]) * args.q.element_size()
    size += 0 if rotated is None else 4 * rotated.shape[3]
    room = shared_memory(args.q.device) - 4096 - kept
    while tile.stages > 1 and tile.stages * getattr(tile, streamed) * size > room:
        tile = replace(tile, stages=tile.stages - 1)
    while getattr(tile, streamed) > 16 and getattr(tile, streamed) * size > room:
        tile = replace(tile, **{streamed: getattr(tile, streamed) // 2})
    return tile


# -------------------------------------------------------------------------------------------------- plan
def power(x: int) -> int:
    """The next power of two, at least the 16 that a matrix product takes."""
    return max(16, 1 << (x - 1).bit_length())


def parts(width: int, most: int) -> tuple[int, int]:
    """Columns of the two parts of a head that is not rotated: its largest power of two up to `most`, and the rest."""
    first = min(power(width) if power(width) == width else power(width) // 2, most)
    return first, power(width - first) if width > first else 0


def plan_of(args: KernelArgs, tile: Tile) -> Plan:
    """The constants of a kernel for a call; fewer rows where the call has not as many."""
    width, value_width = args.q.shape[3], args.v.shape[3]
    q_rope, k_rope = (0 if cos is None else cos.shape[-1] for cos in (args.q_cos, args.k_cos))
    widest_part = 128 if args.exact else 256
    k1, k2 = (power(width // 2),) * 2 if q_rope or k_rope else parts(width, widest_part)
    v1, v2 = parts(value_width, widest_part)
    left, right, chunk = (None if far < 0 else far for far in (args.left, args.right, args.chunk))
    reach = 0 if args.buckets is None else len(args.buckets) // 2
    return Plan(
        rows=min(tile.rows, power(args.q.shape[2] * args.group)), keys=tile.keys, group=args.group, width=width,
        value_width=value_width, k1=k1, k2=k2, v1=v1, v2=v2, left=left, right=right, chunk=chunk, regular=args.regular,
        documents=args.q_document is not None, prefix=args.prefix is not None, softcap=args.softcap,
        dropout=args.dropout, q_rope=q_rope, k_rope=k_rope, interleaved=args.interleaved, reach=reach,
        buckets=0 if args.bias is None else len(args.bias), alibi=args.bias is not None and reach == 0,
        sinks=args.sinks is not None)
