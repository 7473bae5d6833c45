"""The `.mimi` file: a header that says which model wrote it, then the codes of one frame after another.

`MIMI`, a version byte, the header's length (32 bits, little-endian), a JSON object, and per frame the codes of its
codebooks in order, each in ceil(log2(size)) bits, the first bit highest, filled up to whole bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mm.errors import InputError

MAGIC, VERSION, DIGITS, LONGEST = b"MIMI", 1, 15, 1 << 16


@dataclass(frozen=True)
class Header:
    """model: its name when the file was written. weights: `Mimi.fingerprint()`. rate in Hz, frame and samples in
    samples, size: entries of a codebook."""

    model: str
    weights: str
    rate: int
    frame: int
    channels: int
    codebooks: int
    size: int
    samples: int = 0

    @property
    def bits(self) -> int:
        """Bits per code."""
        return (self.size - 1).bit_length()

    @property
    def frame_bytes(self) -> int:
        return -(-self.codebooks * self.bits // 8)

    @property
    def frames(self) -> int:
        return -(-self.samples // self.frame)

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def pack(self) -> bytes:
        """Of one length for any number of samples, so that it can be written again at the end."""
        fields = asdict(self)
        text = f'{json.dumps(fields | {"samples": 0})[:-2]}{fields["samples"]:>{DIGITS}}}}'.encode()
        return MAGIC + bytes([VERSION]) + len(text).to_bytes(4, "little") + text


class Writer:
    """Codes to an open binary file that can seek."""

    def __init__(self, file: BinaryIO, header: Header):
        self.file, self.header = file, header
        file.write(header.pack())

    def write(self, codes: Tensor) -> None:
        """codes: (Q, T)"""
        h, shifts = self.header, np.arange(self.header.bits)[::-1]
        bits = (codes.T.cpu().numpy()[..., None] >> shifts & 1).astype(np.uint8)  # (T, Q, bits)
        self.file.write(np.packbits(bits.reshape(-1, h.codebooks * h.bits), axis=1).tobytes())

    def finish(self, samples: int) -> Header:
        """Writes how long the sound is."""
        done = Header(**asdict(self.header) | {"samples": samples})
        self.file.seek(0)
        self.file.write(done.pack())
        return done


class Reader:
    """A file on disk, its header read and its length checked. Raises InputError for a foreign or truncated file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.header = read_header(file, str(path))
            self.start = file.tell()
        h, held = self.header, self.path.stat().st_size - self.start
        if held != h.frames * h.frame_bytes:
            what = "truncated" if held < h.frames * h.frame_bytes else "longer than it says"
            raise InputError(f"{path} is {what}: {held} bytes of codes where {h.frames} frames take "
                             f"{h.frames * h.frame_bytes}")

    def blocks(self, frames: int) -> Iterator[Tensor]:
        """Codes (Q, T), T up to `frames`."""
        h = self.header
        weights = 1 << np.arange(h.bits)[::-1]
        with open(self.path, "rb") as file:
            file.seek(self.start)
            while data := file.read(frames * h.frame_bytes):
                packed = np.frombuffer(data, np.uint8).reshape(-1, h.frame_bytes)
                bits = np.unpackbits(packed, axis=1)[:, : h.codebooks * h.bits].reshape(-1, h.codebooks, h.bits)
                codes = torch.from_numpy(bits @ weights).T
                if int(codes.max()) >= h.size:
                    raise InputError(f"{self.path}: the code {int(codes.max())} is not in a codebook of {h.size}")
                yield codes


def read_header(file: BinaryIO, where: str) -> Header:
    head = file.read(9)
    if head[:4] != MAGIC:
        raise InputError(f"{where} is not a .mimi file")
    length = int.from_bytes(head[5:], "little")
    if len(head) == 9 and head[4] != VERSION:
        raise InputError(f"{where} is of version {head[4]} of .mimi files; this reads {VERSION}")
    text = file.read(length) if length <= LONGEST else b""
    try:
        if len(head) < 9 or len(text) < length:
            raise ValueError("it ends early")
        header = Header(**json.loads(text))
        numbers = (header.rate, header.frame, header.channels, header.codebooks, header.size - 1, header.samples)
        if not all(type(n) is int and n > 0 for n in numbers) or not isinstance(header.weights, str):
            raise ValueError("a field has no sense")
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} has a broken header ({error})") from None
    return header
