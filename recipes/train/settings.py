"""What can be set about a training run, as plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and a schedule.

    Args:
        lr: the highest learning rate.
        weight_decay: AdamW's weight decay, applied to matrices.
        beta1: AdamW's decay of the mean of gradients.
        beta2: AdamW's decay of the mean of squared gradients.
        eps: AdamW's epsilon.
        warmup: steps in which the learning rate rises from 0 to `lr`.
        schedule: after the warm-up the learning rate falls as a cosine, or (wsd) stays and then falls linearly.
        decay: the share of all steps in which it falls (wsd).
        final: the share of `lr` that is left at the end.
        clip: the largest gradient norm (0: any).
        ema: the decay of the averaged weights that are evaluated and exported (0: the weights themselves).
    """

    lr: float = 5e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    warmup: int = 100
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: float = 0.2
    final: float = 0.0
    clip: float = 1.0
    ema: float = 0.999

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optim.{name} must lie in [0, 1), not {getattr(self, name)}")
        if not 0 < self.decay <= 1:
            raise InputError(f"optim.decay must lie in (0, 1], not {self.decay}")
        if self.lr <= 0:
            raise InputError(f"optim.lr must be positive, not {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How long a run is, and on what.

    Args:
        max_steps: how many steps the optimizer takes.
        seed: fixes the order of the data, new weights and every random draw.
        accelerator: cpu, gpu, or auto.
        devices: processes, on one GPU each.
        precision: auto is bf16-mixed on a GPU, 32-true elsewhere.
        threads: CPU threads (none: PyTorch's choice).
        log: steps between two lines of the log.
        evaluate: steps between two evaluations; there is one at the end as well.
        save: steps between two checkpoints; there is one at the end as well.
    """

    max_steps: int = 1000
    seed: int = 0
    accelerator: str = "auto"
    devices: int = 1
    precision: str = "auto"
    threads: int | None = None
    log: int = 10
    evaluate: int = 500
    save: int = 500

    def __post_init__(self) -> None:
        for name in ("max_steps", "devices", "log", "evaluate", "save"):
            if getattr(self, name) < 1:
                raise InputError(f"trainer.{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Export:
    """The model directory written at the end.

    Args:
        dtype: the type of its weights.
    """

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank changes, merged into the exported model, are all that trains.

    Args:
        rank: the rank of the changes.
        alpha: the changes are multiplied by alpha / rank.
        layers: ends of the names of the linear layers to change, such as qkv or mlp.up (none: all of them).
    """

    rank: int = 8
    alpha: float = 16.0
    layers: tuple[str, ...] = ()


# What may change when a run goes on.
FREE = frozenset(("trainer.max_steps", "trainer.devices", "trainer.threads", "trainer.log", "trainer.evaluate",
                  "trainer.save", "data.workers", "export.dtype", "loss.adversarial_from"))
