"""Training of a classifier as a LightningModule: a whole ViT on pictures, or its last layer on features."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.schema import from_data, to_data

from ...encoders.spec import ViTSpec
from ...encoders.vit import ViT
from ..data.classes import ClassBatch
from ..data.sampler import torch_seed
from .optim import adamw, layer_share, rate, update_average
from .vit_settings import VitLoss, VitOptim

DROPPING = 4  # the last number of the keys of the generators that dropout draws from


class VitRecipe(lightning.LightningModule):
    """`module`, a ViT or the linear layer that classifies its features, in training and, in `average`, the moving
    average of its weights.

    The settings may be given as the dataclasses or as the plain data that a checkpoint holds, so that
    `VitRecipe.load_from_checkpoint(path)` works. `frozen` says that the linear layer alone is trained.
    """

    def __init__(self, spec: ViTSpec | dict[str, Any], optim: VitOptim | dict[str, Any],
                 loss: VitLoss | dict[str, Any], seed: int = 0, frozen: bool = False,
                 module: nn.Module | None = None) -> None:
        super().__init__()
        self.settings = from_data(spec) if isinstance(spec, dict) else spec
        self.optim = VitOptim(**optim) if isinstance(optim, dict) else optim
        self.loss = VitLoss(**loss) if isinstance(loss, dict) else loss
        self.seed = seed
        self.save_hyperparameters({"spec": to_data(self.settings), "optim": asdict(self.optim),
                                   "loss": asdict(self.loss), "seed": seed, "frozen": frozen})
        self.module = module or (classifier(self.settings) if frozen else ViT(self.settings))
        self.average = copy.deepcopy(self.module).requires_grad_(False)
        self.last: dict[str, Any] = {}  # what is worth logging about the last step

    def configure_optimizers(self) -> dict[str, Any]:
        depth, decay, whole = len(self.settings.stack.layers), self.optim.layer_decay, isinstance(self.module, ViT)
        optimizer = adamw(self.module, self.optim,
                          lambda name: layer_share(name, depth, decay) if whole else 1.0)
        total = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total, self.optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: ClassBatch, batch_idx: int) -> None:
        torch.manual_seed(torch_seed(self.seed, self.global_step, self.global_rank, DROPPING))

    def training_step(self, batch: ClassBatch, batch_idx: int) -> Tensor:
        logits = classify(self.module, batch.inputs).float()
        loss = F.cross_entropy(logits, batch.target, label_smoothing=self.loss.smoothing)
        self.last = {"loss": loss.detach(), "lr": self.optimizers().param_groups[0]["lr"]}
        if self.trainer.world_size > 1:
            self.last["loss"] = self.all_gather(self.last["loss"]).mean()
        return loss

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        largest = self.optim.clip or math.inf
        self.last["gradient"] = torch.nn.utils.clip_grad_norm_(self.module.parameters(), largest).detach()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        update_average(self.average, self.module, self.optim.ema, self.global_step + 1)


def classifier(settings: ViTSpec) -> nn.Linear:
    """The layer that makes logits of a ViT's pooled features."""
    return nn.Linear(settings.head.width(settings.stack.dim), settings.head.proj.dim, bias=settings.head.proj.bias)


def classify(module: nn.Module, inputs: Tensor) -> Tensor:
    """Pixels (B, 3, h, w) or features (B, D) -> logits (B, C)."""
    return module.encode(inputs) if isinstance(module, ViT) else module(inputs)
