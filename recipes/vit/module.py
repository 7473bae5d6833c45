"""Training of a classifier as a LightningModule: a whole ViT on pictures, or its last layer on features."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.spec.schema import from_data, to_data

from ...encoders.spec import ViTSpec
from ...encoders.vision.vit import ViT
from ..train.optim import adamw, layer_share
from ..train.recipe import Recipe
from .data import ClassBatch
from .settings import VitLoss, VitOptim


class VitRecipe(Recipe):
    """`module`, a ViT or the linear layer that classifies its features, in training and, in `average`, the moving
    average of its weights.

    The settings may be given as the dataclasses or as the plain data that a checkpoint holds, so that
    `VitRecipe.load_from_checkpoint(path)` works. `frozen` says that the linear layer alone is trained.
    """

    def __init__(self, spec: ViTSpec | dict[str, Any], optim: VitOptim | dict[str, Any],
                 loss: VitLoss | dict[str, Any], seed: int = 0, frozen: bool = False,
                 module: nn.Module | None = None) -> None:
        super().__init__(VitOptim(**optim) if isinstance(optim, dict) else optim, seed)
        self.settings = from_data(spec) if isinstance(spec, dict) else spec
        self.loss = VitLoss(**loss) if isinstance(loss, dict) else loss
        self.save_hyperparameters({"spec": to_data(self.settings), "optim": asdict(self.optim),
                                   "loss": asdict(self.loss), "seed": seed, "frozen": frozen})
        self.hold(module or (classifier(self.settings) if frozen else ViT(self.settings)))

    def optimizer(self) -> torch.optim.Optimizer:
        depth, decay, whole = len(self.settings.stack.layers), self.optim.layer_decay, isinstance(self.module, ViT)
        return adamw(self.module, self.optim, lambda name: layer_share(name, depth, decay) if whole else 1.0)

    def training_step(self, batch: ClassBatch, batch_idx: int) -> Tensor:
        logits = classify(self.module, batch.inputs).float()
        loss = F.cross_entropy(logits, batch.target, label_smoothing=self.loss.smoothing)
        self.last = {"loss": loss.detach(), "lr": self.optimizers().param_groups[0]["lr"]}
        if self.trainer.world_size > 1:
            self.last["loss"] = self.all_gather(self.last["loss"]).mean()
        return loss


def classifier(settings: ViTSpec) -> nn.Linear:
    """The layer that makes logits of a ViT's pooled features."""
    return nn.Linear(settings.head.width(settings.stack.dim), settings.head.proj.dim, bias=settings.head.proj.bias)


def classify(module: nn.Module, inputs: Tensor) -> Tensor:
    """Pixels (B, 3, h, w) or features (B, D) -> logits (B, C)."""
    return module.encode(inputs) if isinstance(module, ViT) else module(inputs)
