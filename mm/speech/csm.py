"""CSM, Sesame's conversational speech model (2025): a Llama over frames of text or audio, and a small Llama over the
codes of a frame."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mm import spec
from mm.checkpoint.pretrained import Pretrained
from mm.decode.sampling import GREEDY, Controls, Sampling, choose, controls
from mm.errors import InputError
from mm.nn.embed import Table
from mm.nn.linear import Linear, StepLinear
from mm.nn.state import StackState
from mm.nn.transformer import Transformer
from mm.speech.depth import DepthStack
from mm.speech.families import FAMILIES
from mm.speech.streams import NONE, CodeTables


class CSM(Pretrained):
    """codes (B, 1 + Q, T), text first -> logits (B, Q, T, card) of each frame's codes from the frames before it, NaN
    for the first. A frame is text, its codes `NONE`, or audio, its text `NONE`. The temporal stack itself scores the
    first codebook, the depth stack the others."""

    kind, families = "csm", FAMILIES

    def __init__(self, settings: spec.CSMSpec):
        super().__init__()
        s, dim, deep = settings, settings.stack.dim, settings.depth.stack.dim
        self.spec, self.count = s, s.depth.codebooks
        self.text, self.codes = Table(s.text_vocab, dim), CodeTables(self.count, s.card, dim)
        self.stack = Transformer(s.stack)
        self.head = Linear(dim, s.card, bias=False)
        self.depth_input = Linear(dim, deep, bias=False)
        self.depth = DepthStack(s.depth)
        self.depth_head = StepLinear(tuple(range(self.count - 1)), deep, s.card)

    def forward(self, codes: Tensor) -> Tensor:
        """Raises InputError on wrong shapes; values are not read."""
        hidden = self.hidden(codes)[:, :-1]
        said = codes[:, 1:, 1:]
        first = self.head(hidden).unsqueeze(1)
        logits = torch.cat([first, self.later(hidden, said)], 1)
        return torch.cat([logits.new_full((*logits.shape[:2], 1, logits.shape[3]), torch.nan), logits], 2)

    def hidden(self, codes: Tensor, *, state: StackState | None = None, rows: Tensor | None = None) -> Tensor:
        """(B, 1 + Q, T) -> (B, T, D) after the final norm."""
        self.check(codes)
        text = codes[:, 0]
        x = self.text(text.clamp(min=0)) * (text != NONE).unsqueeze(-1) + self.codes(codes[:, 1:])
        return self.stack(x, state=state, rows=rows)

    def check(self, codes: Tensor) -> None:
        if codes.ndim != 3 or codes.shape[1] != 1 + self.count or not codes.shape[2] or codes.is_floating_point():
            raise InputError(f"codes should be integers (B, {1 + self.count}, T), not {codes.dtype} "
                             f"{tuple(codes.shape)}")

    def later(self, hidden: Tensor, said: Tensor) -> Tensor:
        """Scores the codebooks after the first (B, Q - 1, T, card) from hidden (B, T, D) and the frames' own codes."""
        flat = said[:, :-1].transpose(1, 2).flatten(0, 1)
        x = torch.cat([hidden.flatten(0, 1).unsqueeze(0), self.codes.each(flat)])
        deep = self.depth(self.depth_input(x))[1:]
        return self.depth_head(deep).unflatten(1, hidden.shape[:2]).transpose(0, 1)

    def init_state(self, batch: int, *, length: int | None = None, chunk: int = 1) -> StackState:
        """Makes an empty stream for `batch` rows of up to `length` frames (default: the context)."""
        return self.stack.init_state(batch, length=length or self.spec.context, chunk=chunk)

    @torch.no_grad()
    def step(self, codes: Tensor, state: StackState, sampling: Controls, *, rows: Tensor | None = None) -> Tensor:
        """Reads frames (B, 1 + Q, T) -> the codes (B, Q) of the frame after them."""
        at = state.offset + codes.shape[2]
        hidden = self.hidden(codes, state=state, rows=rows)[:, -1]
        found = [choose(self.head(hidden), sampling, at * self.count)]
        cache = self.depth.cache(len(hidden), self.count, self.depth_input(hidden))
        self.depth.step(self.depth_input(hidden), 0, cache)
        for k in range(1, self.count):
            x = self.depth_input(self.codes.one(found[-1], k - 1))
            logits = self.depth_head.step(self.depth.step(x, k, cache), k - 1)
            found.append(choose(logits, sampling, at * self.count + k))
        return torch.stack(found, 1)

    def generate(self, codes: Tensor, sampling: Sampling = GREEDY) -> Iterator[Tensor]:
        """Yields frames (B, Q) that follow codes (B, 1 + Q, T), one after the other. A row ends with a frame of
        `spec.end` in all codebooks, and stays there. At most `sampling.max_tokens` frames. Raises InputError on wrong
        shapes and for more frames than the context."""
        self.check(codes)
        if codes.shape[2] > self.spec.context:
            raise InputError(f"codes of {codes.shape[2]} frames are longer than the context, {self.spec.context}")
        state, settings = self.init_state(len(codes), chunk=codes.shape[2]), controls([sampling] * len(codes),
                                                                                    codes.device)
        ended = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
        for _ in range(min(sampling.max_tokens, self.spec.context - codes.shape[2] + 1)):
            frame = self.step(codes, state, settings).masked_fill(ended[:, None], self.spec.end)
            yield frame
            ended = ended | (frame == self.spec.end).all(1)
            if bool(ended.all()):
                return
            codes = torch.cat([torch.full_like(frame[:, :1], NONE), frame], 1).unsqueeze(2)
