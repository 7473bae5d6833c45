"""What the recipes share: a model in training, the moving average of its weights, and checkpoints without what is
locked."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from mm.errors import InputError

from ..data.sampler import readers, torch_seed
from .optim import rate, update_average
from .plans import split
from .settings import Optim
from .shard import clip_gradients, local, separate, shard, shell, whole

DROPPING = 4  # the last number of the keys of the generators that dropout draws from
LOCKED, WAYS = "locked", "ways"  # what a checkpoint says: a digest of the weights that it leaves out; of `Recipe.ways`


class Recipe(lightning.LightningModule):
    """A model in training, held as the attribute `learner`, and in `average` the moving average of its weights."""

    learner = "module"

    def __init__(self, optim: Optim, seed: int) -> None:
        super().__init__()
        self.optim, self.seed = optim, seed
        self.locked: list[str] = []
        self.hollow: list[nn.Module] = []  # the shell of a model that is spread over processes
        self.ways = 1  # over how many processes layers are split
        self.added: list[str] = []  # parameters whose gradients are parts of a sum over processes
        self.last: dict[str, Any] = {}  # what is worth logging about the last step

    def hold(self, model: nn.Module, tune: Callable[[nn.Module], None] | None = None) -> None:
        """Trains this model; what `tune` keeps from training stays out of checkpoints."""
        setattr(self, self.learner, model)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        if tune is not None:
            tune(model)
        self.locked = [name for name, p in model.named_parameters() if id(p) in trained and not p.requires_grad]
        self.average = moving_copy(model)

    @property
    def model(self) -> nn.Module:
        return getattr(self, self.learner)

    # ------------------------------------------------------------------------------------------ processes
    def towers(self, model: nn.Module) -> Iterable[nn.Module]:
        """The parts of a model that are spread over processes, each in one piece and by block."""
        return [model]

    def configure_model(self) -> None:
        """Splits layers and spreads weights over processes where the strategy asks for that."""
        spread = self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)
        if not spread or self.hollow:
            return
        self.hollow = [shell(self.average)]
        data, tensor = (self.device_mesh[name] for name in ("data_parallel", "tensor_parallel"))
        self.ways = tensor.size()
        for model in (self.model, self.average):
            if self.ways > 1:
                self.added = split(model, tensor)
            if data.size() > 1:
                shard(self.towers(model), data)

    def total(self, x: Tensor) -> Tensor:
        """Its sum over the processes that read different rows, without gradient."""
        x = x.detach().clone()
        if readers(self.trainer)[1] > 1:
            dist.all_reduce(x, group=self.device_mesh["data_parallel"].get_group() if self.hollow else None)
        return x

    def whole_average(self) -> nn.Module:
        """The averaged model in one piece; all processes have to call it."""
        return whole(self.average, self.hollow[0]) if self.hollow else self.average

    # ---------------------------------------------------------------------------------------------- steps
    def optimizer(self) -> torch.optim.Optimizer:
        raise NotImplementedError

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, total = self.optimizer(), self.trainer.max_steps
        if self.hollow:
            separate(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total, self.optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(torch_seed(self.seed, self.global_step, readers(self.trainer)[0], DROPPING))

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        for name in self.added:
            part = local(self.model.get_parameter(name).grad)
            dist.all_reduce(part, group=self.device_mesh["tensor_parallel"].get_group())
        largest = self.optim.clip or math.inf
        self.last["gradient"] = clip_gradients(self.model.parameters(), largest).detach()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_step()
        update_average(self.average, self.model, self.optim.ema, self.global_step + 1)

    def after_step(self) -> None:
        """What else happens to the weights, before they are averaged."""

    # --------------------------------------------------------------------------------------- checkpoints
    def locked_names(self) -> list[str]:
        return [f"{model}.{name}" for model in (self.learner, "average") for name in self.locked]

    @cached_property
    def locked_digest(self) -> str:
        parameters = dict(self.model.named_parameters())
        return digest({name: parameters[name] for name in self.locked})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what is locked."""
        checkpoint[WAYS] = self.ways
        if self.locked and not self.hollow:
            for name in self.locked_names():
                checkpoint["state_dict"].pop(name)
            checkpoint[LOCKED] = self.locked_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts what is locked back. Raises InputError when this model's locked weights are not those of the run, and
        when layers are split otherwise: their rows lie in another order."""
        if checkpoint.get(WAYS, 1) != self.ways:
            raise InputError(f"the checkpoint is of a run that splits layers over {checkpoint[WAYS]} processes, not "
                             f"{self.ways}")
        if checkpoint.get(LOCKED) is None:
            return
        if checkpoint[LOCKED] != self.locked_digest:
            raise InputError("the checkpoint leaves out the locked weights, and those of this model are not the ones "
                             "that the run began with")
        own = self.state_dict()
        checkpoint["state_dict"] |= {name: own[name] for name in self.locked_names()}


def moving_copy(model: nn.Module) -> nn.Module:
    """A copy for averages, which shares what does not train."""
    locked = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, locked).requires_grad_(False)


def digest(tensors: dict[str, Tensor]) -> str:
    """Sixteen hex digits of tensors by name."""
    made = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        made.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        made.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return made.hexdigest()[:16]
