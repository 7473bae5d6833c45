"""Sound files of whatever format libsndfile knows, in blocks, and never half of one without a word."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.checkpoint.files import replacing
from mm.errors import InputError

if TYPE_CHECKING:
    from soundfile import SoundFile

BLOCK = 1 << 16  # samples read at a time
UNKNOWN = 0xFFFFFFFF  # the size in WAV files that were written to a pipe
LAST_PAGE = 4  # flag of an Ogg page
WIDTH = 6  # zero crossings of the resampling filter on either side, torchaudio's default


class Resampler:
    """`push` blocks (C, n) at `source` Hz, take what is ready at `target` Hz, and the rest from `flush`. A block waits
    for the samples that the filter sees after it."""

    def __init__(self, source: int, target: int, channels: int):
        common = math.gcd(source, target)
        self.source, self.target = source // common, target // common
        reach = math.ceil(WIDTH * self.source / (0.99 * min(self.source, self.target)))
        self.margin = math.ceil((reach + self.source) / self.source) * self.source  # whole periods of both rates
        self.waiting = torch.zeros(channels, self.margin)  # silence before the first sample
        self.heard = 0

    def push(self, block: Tensor) -> Tensor:
        if self.source == self.target:
            return block
        self.heard += block.shape[1]
        whole = torch.cat([self.waiting, block], 1)
        ready = (whole.shape[1] - 2 * self.margin) // self.source * self.source
        if ready <= 0:
            self.waiting = whole
            return block[:, :0]
        self.waiting = whole[:, ready:]
        return self.convert(whole[:, : ready + 2 * self.margin])

    def flush(self) -> Tensor:
        """The last samples: in all, ceil(samples * target / source)."""
        if self.source == self.target:
            return self.waiting[:, :0]
        left = self.waiting.shape[1] - self.margin
        wanted = math.ceil(left * self.target / self.source)
        whole = F.pad(self.waiting, (0, self.margin + -left % self.source))
        return self.convert(whole)[:, :wanted]

    def convert(self, x: Tensor) -> Tensor:
        """x: (C, n) with margins on both sides, n whole periods -> what lies between them."""
        from torchaudio.functional import resample

        cut = self.margin // self.source * self.target
        out = resample(x, self.source, self.target, lowpass_filter_width=WIDTH)
        return out[:, cut : out.shape[1] - cut]


@dataclass(frozen=True)
class Sound:
    """A file whose header was read. `samples` per channel, at `rate` Hz."""

    path: Path
    rate: int
    samples: int
    channels: int

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def blocks(self, rate: int, channels: int) -> Iterator[Tensor]:
        """(C, n) float32 at `rate` Hz; several channels become the mean for one. Raises InputError that names the file
        when it is damaged, ends early, or holds samples that are not finite."""
        import soundfile

        if channels not in (1, self.channels):
            raise InputError(f"{self.path} has {self.channels} channels, the model {channels}")
        resampler, heard = Resampler(self.rate, rate, channels), 0
        try:
            with soundfile.SoundFile(self.path) as file:
                for block in file.blocks(BLOCK, dtype="float32", always_2d=True):
                    heard += len(block)
                    x = torch.from_numpy(block.copy()).T
                    if not bool(torch.isfinite(x).all()):
                        raise InputError(f"{self.path}: the sound holds samples that are not finite")
                    yield resampler.push(x.mean(0, keepdim=True) if channels == 1 else x)
        except (soundfile.LibsndfileError, OSError) as error:
            raise InputError(f"{self.path}: the sound is damaged ({error})") from None
        if heard < self.samples:
            raise InputError(f"{self.path} is truncated: it holds {heard} of {self.samples} samples")
        yield resampler.flush()


def open_sound(path: str | Path) -> Sound:
    """Raises InputError for a file that is absent, no sound, empty or cut off."""
    import soundfile

    path = Path(path)
    try:
        with soundfile.SoundFile(path) as file:
            found = Sound(path, file.samplerate, file.frames, file.channels)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise InputError(f"{path}: the sound cannot be read ({error})") from None
    if cut_off(path):
        raise InputError(f"{path} is truncated: its last part is missing")
    if not found.samples:
        raise InputError(f"{path}: the sound is empty")
    return found


@contextmanager
def new_sound(path: Path, rate: int, channels: int) -> Iterator[SoundFile]:
    """A file to write samples (L, C) at `rate` Hz to, in the format that its suffix names; it is there once the block
    has ended well. Raises InputError for formats that are not known or take no such sound, and where nothing can be
    written."""
    import soundfile

    kind = path.suffix[1:].upper()
    if kind not in soundfile.available_formats():
        raise InputError(f"{path}: {path.suffix or 'no suffix'} is not a sound format; "
                         "write to .wav, .flac, .ogg or .mp3")
    with replacing(path) as part:
        try:
            file = soundfile.SoundFile(part, "w", rate, channels, format=kind)
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            raise InputError(f"{path}: {kind} takes no {channels} channel(s) at {rate} Hz ({error})") from None
        with file:
            yield file


def cut_off(path: Path) -> bool:
    """Whether a WAV file is shorter than it says, or an Ogg file lacks its last page; libsndfile reads both."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            return riff_cut(file, size)
        if head[:4] == b"OggS":
            file.seek(max(0, size - (1 << 17)))
            return ogg_cut(file.read())
    return False


def ogg_cut(tail: bytes) -> bool:
    """Whether the last page in the end of an Ogg file is another than the stream's last, or not whole."""
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or not page[5] & LAST_PAGE:
        return True
    segments = page[27 : 27 + page[26]]
    return len(segments) < page[26] or len(page) < 27 + page[26] + sum(segments)


def riff_cut(file: BinaryIO, size: int) -> bool:
    """Walks the chunks of a WAV file up to its samples."""
    while len(head := file.read(8)) == 8:
        name, length = head[:4], int.from_bytes(head[4:], "little")
        if name == b"data":
            return length != UNKNOWN and file.tell() + length > size
        file.seek(length + length % 2, 1)
    return True
