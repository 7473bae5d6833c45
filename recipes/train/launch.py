"""What the runs of all recipes begin and end with."""

from __future__ import annotations

import ctypes
import logging
import math
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from mm.spec.schema import require

from ..common.machine import machine
from .run import WholeFiles, begin
from .settings import FREE, Trainer
from .watch import CURVES, Watch

MODEL, METRICS = "model", "metrics.json"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


class Job(Protocol):
    """What the settings of every kind of run, a dataclass, have: its directory, what it reads and how long it goes."""

    out: str
    data: Any
    trainer: Trainer


def start(job: Job) -> tuple[Path, Path | None]:
    """The directory of a run and the checkpoint to go on from, if there is one; the process is set up for it."""
    require(job.data.workers >= 0, f"data.workers must not be negative, not {job.data.workers}")
    quiet()
    keep_memory()
    out = Path(job.out)
    checkpoint = begin(out, asdict(job), FREE)
    if job.trainer.threads:
        torch.set_num_threads(job.trainer.threads)
    return out, checkpoint


def keep_memory() -> None:
    """Asks glibc to keep the memory of large tensors for the next ones. By default it returns each to the system, which
    clears it page by page when it is wanted again: a fifth of a small model's step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def quiet() -> None:
    """Lightning's remarks about hardware, and about loaders that it cannot know to start at the right step."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    known = "not resumable|does not have many workers|LeafSpec|all_gather is deprecated|in eval mode at the start"
    warnings.filterwarnings("ignore", message=f".*({known}).*")


def lightning_trainer(settings: Trainer, watch: Watch, strategy: str | ModelParallelStrategy = "ddp"
                      ) -> lightning.Trainer:
    gpu = torch.cuda.is_available() and settings.accelerator in ("auto", "gpu", "cuda")
    precision = ("bf16-mixed" if gpu else "32-true") if settings.precision == "auto" else settings.precision
    return lightning.Trainer(
        accelerator=settings.accelerator, devices=settings.devices, precision=precision,
        strategy=strategy if settings.devices > 1 else "auto", max_steps=settings.max_steps, max_epochs=-1,
        callbacks=[watch], plugins=[WholeFiles()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0)


def export(model: nn.Module, folder: Path, dtype: str) -> None:
    model.to(getattr(torch, dtype)).eval().save_pretrained(folder)


def conclude(out: Path, watch: Watch) -> None:
    """Says what the last evaluation measured, if there was one, and what a run wrote."""
    measured = ", ".join(f"{name} {value:.3f}" for name, value in watch.measured.items())
    lines = [f"on what was held out: {measured}"] if measured else []
    print("\n".join([*lines, f"wrote {out / MODEL}, {out / METRICS} and {out / CURVES}"]), file=sys.stderr)


def facts(job: Job, recipe: lightning.LightningModule, watch: Watch) -> dict[str, Any]:
    """What METRICS says of every run: its length, seconds of training, machine and last evaluation."""
    gpu = torch.cuda.get_device_name() if recipe.device.type == "cuda" else None
    return {"steps": job.trainer.max_steps, "batch_size": job.data.batch_size, "seconds": round(watch.seconds, 1),
            "machine": gpu or machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "validation": {name: value if math.isfinite(value) else None for name, value in watch.measured.items()}}
