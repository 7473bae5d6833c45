"""Contrastive training of a CLIP as a LightningModule."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from typing import Any

import lightning
import torch
from torch import Tensor

from mm.schema import from_data, to_data

from ...encoders.clip import CLIP
from ...encoders.spec import CLIPSpec
from ..data.module import Batch
from ..data.sampler import torch_seed
from .loss import clip_loss
from .optim import adamw, rate, update_average
from .settings import Loss, Optim

LARGEST_SCALE = math.log(100)
DROPPING = 4  # the last number of the keys of the generators that dropout draws from


class ClipRecipe(lightning.LightningModule):
    """A CLIP in training and, in `average`, the moving average of its weights.

    The settings may be given as the dataclasses or as the plain data that a checkpoint holds, so that
    `ClipRecipe.load_from_checkpoint(path)` works. `clip` is a model of that spec to go on with, if not a new one.
    """

    def __init__(self, spec: CLIPSpec | dict[str, Any], optim: Optim | dict[str, Any], loss: Loss | dict[str, Any],
                 seed: int = 0, clip: CLIP | None = None) -> None:
        super().__init__()
        self.settings = from_data(spec) if isinstance(spec, dict) else spec
        self.optim = Optim(**optim) if isinstance(optim, dict) else optim
        self.loss = Loss(**loss) if isinstance(loss, dict) else loss
        self.seed = seed
        self.save_hyperparameters({"spec": to_data(self.settings), "optim": asdict(self.optim),
                                   "loss": asdict(self.loss), "seed": seed})
        self.clip = clip or CLIP(self.settings)
        if self.clip.logit_bias is not None:  # it moves all logits alike, which the softmax does not see
            self.clip.logit_bias.requires_grad_(False)
        self.average = copy.deepcopy(self.clip).requires_grad_(False)
        self.last: dict[str, Any] = {}  # what is worth logging about the last step

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = adamw(self.clip, self.optim)
        total = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total, self.optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(torch_seed(self.seed, self.global_step, self.global_rank, DROPPING))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the whole batch, over all processes."""
        image, text = self.clip(batch.pixels, batch.ids)
        image, text, group = (self.gathered(x) for x in (image, text, batch.group))
        loss = self.objective(image, text, group)
        self.last = {"loss": loss.detach(), "lr": self.optimizers().param_groups[0]["lr"],
                     "scale": self.clip.logit_scale.detach().exp()}
        return loss

    def objective(self, image: Tensor, text: Tensor, group: Tensor) -> Tensor:
        return clip_loss(image, text, self.clip.logit_scale, group, self.loss.smoothing)

    def gathered(self, x: Tensor) -> Tensor:
        """The rows of all processes, in order, with gradient: that of every process's loss is summed here and averaged
        over processes by DDP, which gives the gradient of the one loss."""
        if self.trainer.world_size == 1:
            return x
        return self.all_gather(x, sync_grads=x.is_floating_point()).flatten(0, 1)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        largest = self.optim.clip or math.inf
        self.last["gradient"] = torch.nn.utils.clip_grad_norm_(self.clip.parameters(), largest).detach()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=LARGEST_SCALE)
        update_average(self.average, self.clip, self.optim.ema, self.global_step + 1)
