"""The text decoder: a language model that reads from left to right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from mm import spec
from mm.checkpoint.pretrained import Pretrained
from mm.decode.generation import GenerateOptions, Output, generate, stream
from mm.decode.requests import Prompts
from mm.decode.sampling import GREEDY, Sampling
from mm.errors import InputError
from mm.nn.embed import Embedding, LMHead
from mm.nn.memory import Memory
from mm.nn.moe import Route
from mm.nn.multi_token import AheadHead, look_ahead
from mm.nn.state import StackState
from mm.nn.transformer import Transformer
from mm.positions.visibility import At, along, packed, padded
from mm.text.families import FAMILIES


class TextDecoder(Pretrained):
    """ids (B, T) -> logits (B, T, V)."""

    kind, families = "decoder", FAMILIES

    def __init__(self, settings: spec.DecoderSpec):
        super().__init__()
        self.spec = settings
        dim = settings.stack.dim
        self.embed = Embedding(dim, settings.embed)
        self.stack = Transformer(settings.stack)
        self.head = LMHead(dim, settings.embed.vocab, settings.head)
        self.ahead = nn.ModuleList(AheadHead(dim, layer) for layer in settings.ahead)

    def check_files(self, where: str) -> None:
        if self.tokenizer is not None:
            self.tokenizer.check_fits(self.spec.embed.vocab, where)

    def forward(self, ids: Tensor | None = None, *, embeddings: Tensor | None = None, positions: Tensor | None = None,
                documents: Tensor | None = None, mask: Tensor | None = None, state: StackState | None = None,
                rows: Tensor | None = None, memory: Tensor | Memory | None = None) -> Tensor:
        """Logits (B, T, V); see `hidden` for the arguments."""
        return self.logits(self.hidden(ids, embeddings=embeddings, positions=positions, documents=documents, mask=mask,
                                       state=state, rows=rows, memory=memory))

    def hidden(self, ids: Tensor | None = None, *, embeddings: Tensor | None = None, positions: Tensor | None = None,
               documents: Tensor | None = None, mask: Tensor | None = None, state: StackState | None = None,
               rows: Tensor | None = None, memory: Tensor | Memory | None = None,
               routes: list[Route] | None = None, within: int | None = None) -> Tensor:
        """(B, T, D) after the final norm.

        embeddings: (B, T, D) in place of ids (`embed.look_up` makes those of text). positions: (B, T), -1 for padding,
        or coordinates (B, T, A) of a rope of several axes. documents: (B, T) ids of packed documents, -1 for padding,
        which do not see each other. mask: (B, T) bool, False for padding on either side. state: continue a stream;
        rows: (B,) bool, those that advance. memory: (B, S, M) of an encoder, or `remember` of it, once for many steps.
        routes: a list that gets the route of every mixture of experts (`nn.balance`). within: a bound on all positions
        in the state and the call, where the caller knows one, so that no more slots are read. Raises InputError on
        wrong shapes or dtypes; values are not read.
        """
        shape = self.check(ids, embeddings, positions, documents, mask)
        at = self.where(shape, positions, documents, mask, state, within)
        return self.stack(self.embed(ids, at, embeddings), at, state=state, rows=rows, memory=memory, routes=routes,
                          within=within)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) after the final norm -> (..., V)."""
        return self.head(hidden, self.embed.tokens.weight)

    def look_ahead(self, ids: Tensor, hidden: Tensor, *, positions: Tensor | None = None,
                   documents: Tensor | None = None, mask: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Run the multi-token heads k = 1, 2, ... on ids (B, T) and the output of `hidden` for the same arguments:
        (hidden (B, T - k, D), rows that exist (B, T - k) bool) each. `logits` of row t are for the token at t + k + 1.
        """
        at = self.where(self.check(ids, None, positions, documents, mask), positions, documents, mask)
        return look_ahead(self.ahead, self.embed, ids, hidden, at)

    def init_state(self, batch: int, *, length: int | None = None, chunk: int = 1, dtype: torch.dtype | None = None,
                   device: torch.device | str | None = None, cache: Literal["full", "int8"] = "full") -> StackState:
        """An empty stream for `batch` rows of up to `length` tokens (default: the context)."""
        length = self.spec.context if length is None else length
        return self.stack.init_state(batch, length=length, chunk=chunk, dtype=dtype, device=device, cache=cache)

    def where(self, shape: tuple[int, int], positions: Tensor | None, documents: Tensor | None, mask: Tensor | None,
              state: StackState | None = None, within: int | None = None) -> At:
        """Locate the tokens of a call; without a state, rows begin at position 0."""
        device = self.embed.tokens.weight.device
        coords = positions if positions is not None and positions.ndim == 3 else None
        if positions is not None and coords is None:
            return At(positions, document=documents)
        if state is not None and mask is not None:
            steps = padded(mask).position
            return At(torch.where(steps < 0, steps, state.offset[:, None] + steps), documents, coords=coords)
        if state is not None and (within != shape[1] or documents is not None):
            steps = torch.arange(shape[1], device=device)
            return At(state.offset[:, None] + steps, documents, coords=coords, whole=True)
        if documents is not None:
            at = packed(documents)
            return At(at.position, documents, coords=coords)
        if mask is not None:
            return At(padded(mask).position, coords=coords)
        return along(*shape, device=device, coords=coords)

    def generate(self, prompts: Prompts, sampling: Sampling | Sequence[Sampling] = GREEDY,
                 **options: Unpack[GenerateOptions]) -> list[Output]:
        """Write a text after each prompt: see `mm.decode.generate` for the options. Raises InputError for prompts that
        do not fit."""
        return generate(self, prompts, sampling, **options)

    def stream(self, prompt: str | Sequence[int], sampling: Sampling = GREEDY) -> Iterator[str]:
        """Yield the pieces of one text as they are written."""
        return stream(self, prompt, sampling)

    def check(self, ids: Tensor | None, embeddings: Tensor | None, positions: Tensor | None, documents: Tensor | None,
              mask: Tensor | None) -> tuple[int, int]:
        if (ids is None) == (embeddings is None):
            raise InputError("a decoder reads either ids or embeddings")
        if ids is not None and (ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool):
            raise InputError(f"ids should be integers (B, T), not {ids.dtype} {tuple(ids.shape)}")
        dim = self.spec.stack.dim
        if embeddings is not None and (embeddings.ndim != 3 or embeddings.shape[-1] != dim):
            raise InputError(f"embeddings should be (B, T, {dim}), not {tuple(embeddings.shape)}")
        shape = tuple((ids if embeddings is None else embeddings).shape[:2])
        for name, value in (("positions", positions), ("documents", documents), ("mask", mask)):
            if value is not None and tuple(value.shape[:2]) != shape:
                raise InputError(f"{name} {tuple(value.shape)} do not fit tokens {shape}")
        table = self.spec.embed.positions
        if table is not None and positions is None and documents is None and shape[1] > table.rows:
            raise InputError(f"{shape[1]} tokens are more than the {table.rows} positions of this decoder")
        if mask is not None and documents is not None:
            raise InputError("packed documents mark padding by document -1, not by a mask")
        return shape
