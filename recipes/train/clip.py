"""Contrastive training of a CLIP as a LightningModule."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cached_property
from itertools import combinations
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from mm.errors import InputError
from mm.schema import from_data, to_data

from ...encoders.clip import CLIP
from ...encoders.spec import CLIPSpec
from ..data.module import Batch
from ..data.sampler import torch_seed
from .gather import mean_over_processes, siglip_ring
from .gradcache import in_chunks
from .loss import clip_loss, siglip_loss
from .optim import adamw, rate, update_average
from .settings import Lock, Lora, Loss, Optim
from .shard import clip_gradients, separate, shard, shell, whole
from .tune import digest, moving_copy, tune

LARGEST_SCALE = math.log(100)
DROPPING = 4  # the last number of the keys of the generators that dropout draws from
LOCKED = "locked"  # what a checkpoint says about the weights that it leaves out


class ClipRecipe(lightning.LightningModule):
    """A CLIP in training and, in `average`, the moving average of its weights.

    The settings may be given as the dataclasses or as the plain data that a checkpoint holds, so that
    `ClipRecipe.load_from_checkpoint(path)` works; of a run with locked weights it needs `clip` too. `clip` is a model
    of that spec to go on with, if not a new one.
    """

    def __init__(self, spec: CLIPSpec | dict[str, Any], optim: Optim | dict[str, Any], loss: Loss | dict[str, Any],
                 seed: int = 0, clip: CLIP | None = None, lock: Lock | dict[str, Any] = Lock(),  # noqa: B008
                 lora: Lora | dict[str, Any] | None = None) -> None:
        super().__init__()
        self.settings = from_data(spec) if isinstance(spec, dict) else spec
        self.optim = Optim(**optim) if isinstance(optim, dict) else optim
        self.loss = Loss(**loss) if isinstance(loss, dict) else loss
        lock = Lock(**lock) if isinstance(lock, dict) else lock
        lora = Lora(**lora) if isinstance(lora, dict) else lora
        self.seed = seed
        self.save_hyperparameters({"spec": to_data(self.settings), "optim": asdict(self.optim),
                                   "loss": asdict(self.loss), "seed": seed, "lock": asdict(lock),
                                   "lora": lora and asdict(lora)})
        self.clip = clip or CLIP(self.settings)
        if self.clip.logit_bias is not None and self.loss.kind == "softmax":
            self.clip.logit_bias.requires_grad_(False)  # it moves all logits alike, which the softmax does not see
        self.dims = leading(self.loss.matryoshka, self.settings.dim)
        trained = {id(p) for p in self.clip.parameters() if p.requires_grad}
        tune(self.clip, lock, lora)
        self.locked = [name for name, p in self.clip.named_parameters() if id(p) in trained and not p.requires_grad]
        self.average = moving_copy(self.clip)
        self.hollow: list[nn.Module] = []  # the shell of a model that is spread over processes
        self.last: dict[str, Any] = {}  # what is worth logging about the last step

    def configure_model(self) -> None:
        """Spreads the weights over processes where the strategy asks for that."""
        spread = self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)
        if spread and not self.hollow:
            self.hollow = [shell(self.average)]
            for model in (self.clip, self.average):
                shard(model, self.device_mesh["data_parallel"])

    def whole_average(self) -> nn.Module:
        """The averaged model in one piece; all processes have to call it."""
        return whole(self.average, self.hollow[0]) if self.hollow else self.average

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = adamw(self.clip, self.optim)
        if self.hollow:
            separate(optimizer)
        total = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total, self.optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(torch_seed(self.seed, self.global_step, self.global_rank, DROPPING))

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

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        largest = self.optim.clip or math.inf
        self.last["gradient"] = clip_gradients(self.clip.parameters(), largest).detach()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=LARGEST_SCALE)
        update_average(self.average, self.clip, self.optim.ema, self.global_step + 1)

    # --------------------------------------------------------------------------------------- checkpoints
    def locked_names(self) -> list[str]:
        return [f"{model}.{name}" for model in ("clip", "average") for name in self.locked]

    @cached_property
    def locked_digest(self) -> str:
        parameters = dict(self.clip.named_parameters())
        return digest({name: parameters[name] for name in self.locked})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what is locked."""
        if self.locked and not self.hollow:
            for name in self.locked_names():
                checkpoint["state_dict"].pop(name)
            checkpoint[LOCKED] = self.locked_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts what is locked back. Raises InputError when this model's locked weights are not those of the run."""
        if checkpoint.get(LOCKED) is None:
            return
        if checkpoint[LOCKED] != self.locked_digest:
            raise InputError("the checkpoint leaves out the locked weights, and those of this model are not the ones "
                             "that the run began with")
        own = self.state_dict()
        checkpoint["state_dict"] |= {name: own[name] for name in self.locked_names()}


def leading(dims: tuple[int, ...], width: int) -> list[int]:
    """The numbers of leading dimensions that a loss is the mean over, all `width` of them last. Raises InputError."""
    wrong = [dim for dim in dims if not 0 < dim < width]
    if wrong:
        raise InputError(f"loss.matryoshka {wrong[0]}: expected 1 to {width - 1} of the model's {width} dimensions")
    return [*sorted(set(dims)), width]
