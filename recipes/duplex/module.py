"""Training of a duplex model as a LightningModule."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mm.nn.lora import add_lora
from mm.spec import DuplexSpec
from mm.spec.schema import from_data, to_data
from mm.speech.duplex import DuplexLM

from ..data.sampler import readers, torch_seed
from ..lm.settings import LmLora
from ..train.optim import adamw
from ..train.recipe import Recipe
from .data import DuplexBatch
from .loss import losses_of, some_frames
from .settings import DuplexLoss, DuplexOptim

DEPTH = 12  # the last number of the key of the generator that chooses frames for the depth transformer


class DuplexRecipe(Recipe):
    """A duplex model in training and, in `average`, the moving average of its weights. Settings may be given as plain
    data, as a checkpoint holds them; `module` is a model to go on with."""

    def __init__(self, spec: DuplexSpec | dict[str, Any], optim: DuplexOptim | dict[str, Any],
                 loss: DuplexLoss | dict[str, Any], seed: int = 0, module: DuplexLM | None = None,
                 lora: LmLora | dict[str, Any] | None = None, checkpointing: int = 0, compiled: bool = False) -> None:
        super().__init__(DuplexOptim(**optim) if isinstance(optim, dict) else optim, seed)
        self.settings = from_data(spec) if isinstance(spec, dict) else spec
        self.loss = DuplexLoss(**loss) if isinstance(loss, dict) else loss
        lora = LmLora(**lora) if isinstance(lora, dict) else lora
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
