"""Contrastive training of a CLIP as a LightningModule."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from mm.errors import InputError
from mm.spec.schema import from_data, to_data

from ...encoders.clip import CLIP
from ...encoders.spec import CLIPSpec
from ..train.optim import adamw
from ..train.recipe import Recipe
from ..train.settings import Optim
from ..train.shard import mean_over_processes
from .data import Batch
from .loss import clip_loss, siglip_loss
from .settings import Lock, Loss, TowerLora
from .tune import tune
from .whole_batch import in_chunks, siglip_ring

LARGEST_SCALE = math.log(100)


class ClipRecipe(Recipe):
    """A CLIP in training and, in `average`, the moving average of its weights.

    The settings may be given as the dataclasses or as the plain data that a checkpoint holds, so that
    `ClipRecipe.load_from_checkpoint(path)` works; of a run with locked weights it needs `clip` too. `clip` is a model
    of that spec to go on with, if not a new one.
    """

    learner = "clip"

    def __init__(self, spec: CLIPSpec | dict[str, Any], optim: Optim | dict[str, Any], loss: Loss | dict[str, Any],
                 seed: int = 0, clip: CLIP | None = None, lock: Lock | dict[str, Any] = Lock(),  # noqa: B008
                 lora: TowerLora | dict[str, Any] | None = None) -> None:
        super().__init__(Optim(**optim) if isinstance(optim, dict) else optim, seed)
        self.settings = from_data(spec) if isinstance(spec, dict) else spec
        self.loss = Loss(**loss) if isinstance(loss, dict) else loss
        lock = Lock(**lock) if isinstance(lock, dict) else lock
        lora = TowerLora(**lora) if isinstance(lora, dict) else lora
        self.save_hyperparameters({"spec": to_data(self.settings), "optim": asdict(self.optim),
                                   "loss": asdict(self.loss), "seed": seed, "lock": asdict(lock),
                                   "lora": lora and asdict(lora)})
        clip = clip or CLIP(self.settings)
        if clip.logit_bias is not None and self.loss.kind == "softmax":
            clip.logit_bias.requires_grad_(False)  # it moves all logits alike, which the softmax does not see
        self.dims = leading(self.loss.matryoshka, self.settings.dim)
        self.hold(clip, lambda clip: tune(clip, lock, lora))

    def towers(self, model: nn.Module) -> list[nn.Module]:
        """Scale and offset stay whole."""
        return [tower for tower in (model.image, model.text, model.audio) if tower is not None]

    def optimizer(self) -> torch.optim.Optimizer:
        return adamw(self.clip, self.optim)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the whole batch over all processes or, of a siglip loss, this process's share of it."""
        group = batch.group
        if self.loss.positives == "pair":
            group = torch.arange(len(group), device=group.device) + len(group) * self.global_rank
        features = {name: self.encode(name, x) for name, x in batch.inputs().items()}
        if not self.rings:
            features, group = {name: self.gathered(x) for name, x in features.items()}, self.gathered(group)
        loss = self.objective(features, group)
        self.last = {"loss": mean_over_processes(loss) if self.rings else loss.detach(),
                     "lr": self.optimizers().param_groups[0]["lr"], "scale": self.clip.logit_scale.detach().exp()}
        return loss

    @property
    def rings(self) -> bool:
        """Whether texts go round from process to process."""
        return self.loss.kind == "siglip" and self._trainer is not None and self.trainer.world_size > 1

    def encode(self, name: str, x: Tensor) -> Tensor:
        """One tower's features (B, E) of this process's rows; `chunk` rows at a time."""
        return in_chunks(getattr(self.clip, f"encode_{name}"), x, self.loss.chunk)

    def objective(self, features: dict[str, Tensor], group: Tensor) -> Tensor:
        """The mean over every two towers, and over the leading dimensions that should serve alone; rows of a `group`
        are right for each other."""
        with torch.autocast(group.device.type, enabled=False):
            losses = [self.contrast(a[:, :dim], b[:, :dim], group)
                      for a, b in combinations(features.values(), 2) for dim in self.dims]
            return torch.stack(losses).mean()

    def contrast(self, a: Tensor, b: Tensor, group: Tensor) -> Tensor:
        scale, bias = self.clip.logit_scale, self.clip.logit_bias
        if self.loss.kind == "softmax":
            return clip_loss(a, b, scale, group, self.loss.smoothing)
        return (siglip_ring if self.rings else siglip_loss)(a, b, scale, bias, group)

    def gathered(self, x: Tensor) -> Tensor:
        """The rows of all processes, in order, with gradient: that of every process's loss is summed here and averaged
        over processes by DDP, which gives the gradient of the one loss."""
        if self.trainer.world_size == 1:
            return x
        return self.all_gather(x, sync_grads=x.is_floating_point()).flatten(0, 1)

    def on_after_backward(self) -> None:
        """What is not spread is averaged here, as FSDP does with the rest."""
        for parameter in (self.clip.logit_scale, self.clip.logit_bias):
            if self.hollow and parameter is not None and parameter.grad is not None:
                parameter.grad = mean_over_processes(parameter.grad)

    def after_step(self) -> None:
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=LARGEST_SCALE)


def leading(dims: tuple[int, ...], width: int) -> list[int]:
    """The numbers of leading dimensions that a loss is the mean over, all `width` of them last. Raises InputError."""
    wrong = [dim for dim in dims if not 0 < dim < width]
    if wrong:
        raise InputError(f"loss.matryoshka {wrong[0]}: expected 1 to {width - 1} of the model's {width} dimensions")
    return [*sorted(set(dims)), width]
