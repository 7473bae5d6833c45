"""A sound of any rate at another, block by block: the same samples as torchaudio makes of the whole."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH = 6  # zero crossings of the filter on either side, torchaudio's default


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
