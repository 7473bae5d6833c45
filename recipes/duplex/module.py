"""Training of a duplex model as a LightningModule."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mm.nn.lora import add_lora
from mm.spec import DuplexSpec
from mm.spec.schema import from_data, to_data
from mm.speech.duplex import DuplexLM
from mm.speech.streams import CodeTables

from ...codecs.mimi import Mimi
from ..data.sampler import readers, torch_seed
from ..train.optim import adamw
from ..train.recipe import Recipe
from ..train.settings import Lora
from .data import DuplexBatch
from .loss import losses_of, some_frames
from .settings import DuplexLoss, DuplexOptim

DEPTH = 12  # the last number of the key of the generator that chooses frames for the depth transformer


class DuplexRecipe(Recipe):
    """A duplex model in training and, in `average`, the moving average of its weights. Settings may be given as plain
    data, as a checkpoint holds them; `module` is a model to go on with."""

    def __init__(self, spec: DuplexSpec | dict[str, Any], optim: DuplexOptim | dict[str, Any],
                 loss: DuplexLoss | dict[str, Any], seed: int = 0, module: DuplexLM | None = None,
                 lora: Lora | dict[str, Any] | None = None, checkpointing: int = 0, compiled: bool = False) -> None:
        super().__init__(DuplexOptim(**optim) if isinstance(optim, dict) else optim, seed)
        self.settings = from_data(spec) if isinstance(spec, dict) else spec
        self.loss = DuplexLoss(**loss) if isinstance(loss, dict) else loss
        lora = Lora(**lora) if isinstance(lora, dict) else lora
        self.save_hyperparameters({"spec": to_data(self.settings), "optim": asdict(self.optim),
                                   "loss": asdict(self.loss), "seed": seed, "lora": lora and asdict(lora),
                                   "checkpointing": checkpointing, "compiled": compiled})
        self.hold(module or DuplexLM(self.settings),
                  lora and (lambda model: add_lora(model, lora.rank, lora.alpha, lora.layers)))
        self.module.stack.checkpoint_blocks(checkpointing)
        for block in self.module.stack.blocks if compiled else ():
            block.compile()

    def optimizer(self) -> torch.optim.Optimizer:
        return adamw(self.module, self.optim)

    def on_train_batch_start(self, batch: DuplexBatch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.began, self.frames = time.perf_counter(), int((batch.documents >= 0).sum()) * readers(self.trainer)[1]

    def training_step(self, batch: DuplexBatch, batch_idx: int) -> Tensor:
        """This process's share of the means over all targets of the batch."""
        made = losses_of(self.module, batch, self.loss, self.deep(batch))
        world = readers(self.trainer)[1]
        weight = self.total(made.weight)
        text, audio = (part / whole.clamp(min=1e-9) for part, whole in zip(made[:2], weight, strict=True))
        right, said = self.total(made.right), self.total(made.said).clamp(min=1)
        self.last = {"loss": self.total(text + audio), "text": self.total(text), "audio": self.total(audio),
                     "perplexity": (self.total(made.entropy) / self.total(made.words).clamp(min=1)).exp(),
                     "right": (right / said).mean() if len(right) else right.sum(),
                     "lr": self.optimizers().param_groups[0]["lr"]}
        return (text + audio) * world

    def deep(self, batch: DuplexBatch) -> Tensor | None:
        """The frames that the depth transformer learns from in this step."""
        seed = torch_seed(self.seed, self.global_step, readers(self.trainer)[0], DEPTH)
        return some_frames(batch.codes[:, 1], self.loss, torch.Generator().manual_seed(seed))

    def after_step(self) -> None:
        self.last["frames/s"] = self.frames / (time.perf_counter() - self.began)


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
