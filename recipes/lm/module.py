"""Training of a language model as a LightningModule."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mm.nn.balance import balance_loss, load, move_corrections, z_loss
from mm.nn.lora import add_lora
from mm.nn.moe import Route
from mm.nn.transformer import Transformer
from mm.spec import DecoderSpec, EncoderSpec, Seq2SeqSpec
from mm.spec.schema import from_data, to_data
from mm.text.decoder import TextDecoder
from mm.text.seq2seq import Seq2Seq

from ..data.sampler import readers
from ..train.optim import adamw
from ..train.recipe import Recipe
from ..train.settings import Lora
from .loss import decoder_loss
from .muon import muon
from .objectives import NONE, LmBatch, SpanBatch
from .settings import LmLoss, LmOptim
from .start import MODELS, Model


class LmRecipe(Recipe):
    """A language model in training and, in `average`, the moving average of its weights.

    The settings may be given as the dataclasses or as the plain data that a checkpoint holds, so that
    `LmRecipe.load_from_checkpoint(path)` works; of a run with low-rank changes it needs `module` too. `module` is a
    model of that spec to go on with, if not a new one.
    """

    def __init__(self, spec: DecoderSpec | EncoderSpec | Seq2SeqSpec | dict[str, Any],
                 optim: LmOptim | dict[str, Any], loss: LmLoss | dict[str, Any], seed: int = 0,
                 module: Model | None = None, lora: Lora | dict[str, Any] | None = None, checkpointing: int = 0,
                 compiled: bool = False) -> None:
        super().__init__(LmOptim(**optim) if isinstance(optim, dict) else optim, seed)
        self.settings = from_data(spec) if isinstance(spec, dict) else spec
        self.loss = LmLoss(**loss) if isinstance(loss, dict) else loss
        lora = Lora(**lora) if isinstance(lora, dict) else lora
        self.save_hyperparameters({"spec": to_data(self.settings), "optim": asdict(self.optim),
                                   "loss": asdict(self.loss), "seed": seed, "lora": lora and asdict(lora),
                                   "checkpointing": checkpointing, "compiled": compiled})
        self.hold(module or MODELS[type(self.settings)](self.settings),
                  lora and (lambda model: add_lora(model, lora.rank, lora.alpha, lora.layers)))
        self.loads: list[Tensor] = []  # how often each expert was chosen in the last step, by layer
        for stack in (part for part in self.module.modules() if isinstance(part, Transformer)):
            stack.checkpoint_blocks(checkpointing)
            for block in stack.blocks if compiled else ():
                block.compile()

    def optimizer(self) -> torch.optim.Optimizer:
        return (muon if self.optim.kind == "muon" else adamw)(self.module, self.optim)

    def on_train_batch_start(self, batch: LmBatch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.began, self.tokens = time.perf_counter(), int((batch.documents >= 0).sum()) * readers(self.trainer)[1]

    def training_step(self, batch: LmBatch, batch_idx: int) -> Tensor:
        """This process's share of the mean over all targets of the batch."""
        routes: list[Route] = []
        share, world = self.share(batch.targets), readers(self.trainer)[1]
        loss, entropy = losses(self.module, batch, self.loss, routes)
        loss = loss * (share * world)
        if routes:
            loss = loss + self.routing(routes, batch.documents >= 0)
        self.last = {"loss": self.total(loss) / world, "perplexity": self.total(entropy * share).exp(),
                     "lr": self.optimizers().param_groups[0]["lr"]}
        return loss

    def routing(self, routes: list[Route], real: Tensor) -> Tensor:
        """What the losses of this process's routes come to, the mean over layers; their loads are kept."""
        self.loads = [self.total(load(route, real)) for route in routes]
        each = [self.loss.balance * balance_loss(route, real) + self.loss.router_z_loss * z_loss(route, real)
                for route in routes]
        return torch.stack(each).mean()

    def share(self, targets: Tensor) -> Tensor:
        """() How many of the batch's targets are this process's."""
        count = (targets != NONE).sum().float()
        return count / self.total(count).clamp(min=1)

    def after_step(self) -> None:
        if self.loads:
            move_corrections(self.module.stack, self.loads, self.optim.correction)
        self.last["tokens/s"] = self.tokens / (time.perf_counter() - self.began)


def losses(model: Model, batch: LmBatch | SpanBatch, settings: LmLoss, routes: list[Route] | None = None
           ) -> tuple[Tensor, Tensor]:
    """(loss, cross-entropy without gradient), means over the targets of a batch, whose packed documents do not see each
    other. routes: a list that gets those of a decoder's mixtures of experts."""
    if isinstance(model, Seq2Seq):
        memory = model.remember(batch.ids, documents=batch.documents)
        hidden = model.decoder.hidden(batch.inputs, documents=batch.target_documents, memory=memory)
        model, targets = model.decoder, batch.targets
    elif isinstance(model, TextDecoder):
        hidden, targets = model.hidden(batch.ids, documents=batch.documents, routes=routes), batch.targets
    else:  # few tokens are masked, and only they are scored
        kept = batch.targets != NONE
        hidden, targets = model(batch.ids, documents=batch.documents)[kept], batch.targets[kept]
    return decoder_loss(model, hidden, targets, settings.z_loss, settings.rows)
