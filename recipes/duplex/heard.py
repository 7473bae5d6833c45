"""Codes that are heard as what they stand for: in training, the tables of the streams that a duplex model hears are a
learned projection of the codec's own vectors, so that codes which sound alike are alike to it. A table of its own per
code learns little of those that few voices use. When training is done, plain tables are left."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.speech.duplex import DuplexLM
from mm.speech.streams import CodeTables

from ...codecs.mimi import Mimi


class HeardTables(CodeTables):
    """`said` (streams, rows, D) are the tables of the model's own voice. Of each codebook that is heard, `vectors`
    (Q, size, E) @ `projection` (Q, E, D) is the table, but for its last row in `first` (Q, 1, D), which stands before
    the first code."""

    @property
    def weight(self) -> Tensor:
        with torch.autocast(self.said.device.type, enabled=False):
            made = torch.bmm(self.vectors, self.projection)
        return torch.cat([self.said, torch.cat([made, self.first], 1)])


@torch.no_grad()
def hear_vectors(model: DuplexLM, codec: Mimi) -> None:
    """Replaces the tables of the streams that a new model hears."""
    tables, vectors = model.codes, vectors_of(codec, model.spec.heard)
    weight, (count, _, width) = tables._parameters.pop("weight").detach(), vectors.shape
    dim, semantic = weight.shape[2], min(count, codec.spec.quantizer.semantic)
    maps = torch.randn(2, width, dim) * dim ** -0.5  # codebooks whose vectors are added up begin with one projection
    tables.__class__ = HeardTables
    tables.said, tables.first = (nn.Parameter(part.clone()) for part in (weight[:-count], weight[-count:, -1:]))
    tables.projection = nn.Parameter(torch.cat([maps[:1].expand(semantic, -1, -1),
                                                maps[1:].expand(count - semantic, -1, -1)]).contiguous())
    tables.register_buffer("vectors", vectors)


@torch.no_grad()
def hear_codes(model: DuplexLM) -> None:
    """Plain tables again, with the same rows."""
    tables = model.codes
    if isinstance(tables, HeardTables):
        weight = tables.weight
        del tables.said, tables.first, tables.projection, tables.vectors
        tables.__class__ = CodeTables
        tables.weight = nn.Parameter(weight, requires_grad=False)


def vectors_of(codec: Mimi, count: int) -> Tensor:
    """(count, size, E) of the codec's first codebooks, centred; those of the first semantic and of the first acoustic
    one are of length 1 on average, later ones as much shorter as they are."""
    quantizer, made = codec.quantizer, []
    for part in (quantizer.semantic, quantizer.acoustic):
        tables = [book.table.float() - book.table.float().mean(0) for book in part.codebooks]
        made += [table / tables[0].square().sum(1).mean().sqrt() for table in tables]
    return torch.stack(made[:count])
