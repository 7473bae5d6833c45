"""The text encoder: a language model that reads from both sides, and the sentence vectors that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec
from mm.checkpoint.pretrained import Pretrained
from mm.errors import InputError
from mm.lazy import imported
from mm.nn.embed import Embedding, LMHead
from mm.nn.linear import Linear
from mm.nn.transformer import Transformer
from mm.positions.visibility import At, along, packed, padded
from mm.text.families import FAMILIES


class TextEncoder(Pretrained):
    """ids (B, T) -> (B, T, D), after the final norm where there is one."""

    kind, families = "encoder", FAMILIES

    def __init__(self, settings: spec.EncoderSpec):
        super().__init__()
        self.spec = settings
        dim = settings.stack.dim
        self.embed = Embedding(dim, settings.embed)
        self.stack = Transformer(settings.stack)
        self.head = LMHead(dim, settings.embed.vocab, settings.head) if settings.head else None
        self.pooling = SentencePooling(settings.pooling) if settings.pooling else None

    def forward(self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None, *,
                documents: Tensor | None = None) -> Tensor:
        """mask: (B, T) bool, False for padding on either side; positions count real tokens only. types: (B, T) token
        types, 0 by default. documents: (B, T) ids of packed documents, -1 for padding, which do not see each other.
        Raises InputError on wrong shapes, and for more tokens than there are learned positions."""
        self.check(ids, mask, types, documents)
        at = where(ids, mask, documents)
        return self.stack(self.embed(ids, at, types=types), at)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), for masked-language modelling. Raises InputError without a head."""
        if self.head is None:
            raise InputError("this encoder has no head that scores the vocabulary")
        return self.head(hidden, self.embed.tokens.weight)

    @property
    def dim(self) -> int:
        """The width of sentence vectors."""
        projection = self.spec.pooling and self.spec.pooling.projection
        return projection.outputs if projection else self.spec.stack.dim

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden (B, T, D), mask (B, T) bool -> sentence vectors (B, E). Raises InputError without pooling."""
        if self.pooling is None:
            raise InputError("this encoder makes no sentence vectors: its directory has no modules.json with a pooling")
        return self.pooling(hidden, mask)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 32) -> Tensor:
        """Texts -> (N, E) on the CPU, in their order; texts of similar length share a batch. A text that is too long
        loses its end. Raises InputError without a tokenizer or a pooling."""
        if isinstance(texts, str):
            raise InputError("encode takes a list of texts, not one text")
        device = self.embed.tokens.weight.device
        out = torch.empty(len(texts), self.dim, dtype=self.embed.tokens.weight.dtype)
        rows = self.tokenize(texts)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids, mask = collate([rows[i] for i in chosen], self.tokenizer.pad_id)
            ids, mask = ids.to(device), mask.to(device)
            out[chosen] = self.pool(self(ids, mask), mask).cpu()
        return out

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text with what surrounds it, cut to the length of the pooling or the context."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InputError("this encoder has no tokenizer beside its weights")
        room = self.room
        return [[*tokenizer.prefix, *tokenizer.encode(text)[:room], *tokenizer.suffix] for text in texts]

    @property
    def room(self) -> int:
        """The number of tokens of a text that the model reads, beside those that its tokenizer puts around it."""
        pooling, around = self.spec.pooling, (*self.tokenizer.prefix, *self.tokenizer.suffix)
        return min(self.spec.context, (pooling and pooling.length) or self.spec.context) - len(around)

    def check_files(self, where: str) -> None:
        if self.tokenizer is not None:
            self.tokenizer.check_fits(self.spec.embed.vocab, where)

    def write_beside(self, folder: Path, layout: str) -> None:
        if layout == "hf" and self.spec.pooling is not None:
            imported("mm.text.families.sentence:write_modules")(folder, self.spec)

    def check(self, ids: Tensor, mask: Tensor | None, types: Tensor | None, documents: Tensor | None) -> None:
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"ids should be integers (B, T), not {ids.dtype} {tuple(ids.shape)}")
        for name, value in (("mask", mask), ("types", types), ("documents", documents)):
            if value is not None and value.shape != ids.shape:
                raise InputError(f"{name} {tuple(value.shape)} do not fit ids {tuple(ids.shape)}")
        if mask is not None and documents is not None:
            raise InputError("packed documents mark padding by document -1, not by a mask")
        table = self.spec.embed.positions
        if table is not None and documents is None and ids.shape[1] > table.rows:
            raise InputError(f"{ids.shape[1]} tokens are more than the {table.rows} positions of this encoder")
        if types is not None and self.embed.types is None:
            raise InputError("this encoder has no token types")


class SentencePooling(nn.Module):
    """hidden (B, T, D), mask (B, T) bool -> (B, E). Reimers & Gurevych, 2019."""

    def __init__(self, settings: spec.SentencePooling):
        super().__init__()
        self.settings, p = settings, settings.projection
        self.projection = Linear(p.inputs, p.outputs, bias=p.bias) if p else None

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        s, real = self.settings, mask.unsqueeze(-1)
        if s.over == "mean":
            x = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
        elif s.over == "max":
            x = hidden.masked_fill(~real, float("-inf")).amax(1)
        else:
            x = hidden[torch.arange(len(hidden), device=hidden.device), mask.int().argmax(1)]
        if self.projection is not None:
            x = self.projection(x)
            x = torch.tanh(x) if s.projection.act == "tanh" else x
        return F.normalize(x, dim=-1) if s.normalise else x


def where(ids: Tensor, mask: Tensor | None, documents: Tensor | None) -> At:
    if documents is not None:
        return packed(documents)
    return along(*ids.shape, device=ids.device) if mask is None else padded(mask)


def collate(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids (B, T) padded on the right, mask (B, T) bool."""
    longest = max(max(map(len, rows)), 1)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = True
    return ids, mask
