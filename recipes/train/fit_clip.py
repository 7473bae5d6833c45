"""One run of `mm train clip`, from settings to a model directory."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn

from mm.checkpoint import write_json
from mm.errors import InputError

from ...encoders.clip import CLIP
from ..bench.report import machine
from ..data.module import Input, PairsModule
from ..data.pairs import Pairs, read_pairs
from ..evaluate import Meter, flat, open_source
from .clip import ClipRecipe
from .run import WholeFiles, begin
from .settings import FREE, ClipJob, Trainer
from .shape import can_trim, new_clip
from .watch import CURVES, Watch

MODEL, METRICS = "model", "metrics.json"


def fit(job: ClipJob) -> None:
    """Trains, or goes on with what `job.out` holds, and writes the averaged weights to `job.out`/model."""
    quiet()
    out = Path(job.out)
    checkpoint = begin(out, asdict(job), FREE)
    if job.trainer.threads:
        torch.set_num_threads(job.trainer.threads)
    pairs = read_pairs(job.data.path, job.data.templates)
    clip = starting_model(job, pairs)
    watch = Watch(out, job.trainer, measure_with(job))
    trainer = lightning_trainer(job.trainer, watch)
    if trainer.is_global_zero:
        introduce(job, pairs, clip, checkpoint)
    recipe = ClipRecipe(clip.spec, job.optim, job.loss, job.trainer.seed, clip)
    data = PairsModule(pairs, model_input(clip), job.data, job.augment, job.trainer.seed)
    trainer.fit(recipe, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        export(recipe.average, out / MODEL, job.export.dtype)
        write_json(out / METRICS, account(job, pairs, recipe, watch))
        conclude(out, watch)


def quiet() -> None:
    """Lightning's remarks about hardware, and about loaders that it cannot know to start at the right step."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    known = "not resumable|does not have many workers|LeafSpec|all_gather is deprecated"
    warnings.filterwarnings("ignore", message=f".*({known}).*")


def starting_model(job: ClipJob, pairs: Pairs) -> CLIP:
    """The checkpoint to fine-tune, in float32, or a new model: the same one for the same seed and captions."""
    if job.model:
        clip = CLIP.from_pretrained(job.model, dtype=torch.float32)
        if clip.tokenizer is None:
            raise InputError(f"{job.model} has no tokenizer, which training needs")
        return clip.train()
    torch.manual_seed(job.trainer.seed)
    return new_clip(job.shape, (text for pair in pairs.items for text in pair.captions))


def model_input(clip: CLIP) -> Input:
    return Input(preprocess=clip.preprocessing, tokenizer=clip.tokenizer, context=clip.spec.text.context,
                 trim=can_trim(clip.spec.text))


def measure_with(job: ClipJob) -> Callable[[nn.Module], dict[str, float]] | None:
    """What evaluates a model on the validation data, if there is any."""
    if not job.data.val:
        return None
    source = open_source(job.data.val, job.data.templates)
    return lambda clip: dict(flat(Meter(clip=clip, templates=job.data.templates)(source)))


def lightning_trainer(settings: Trainer, watch: Watch) -> lightning.Trainer:
    gpu = torch.cuda.is_available() and settings.accelerator in ("auto", "gpu", "cuda")
    precision = ("bf16-mixed" if gpu else "32-true") if settings.precision == "auto" else settings.precision
    return lightning.Trainer(
        accelerator=settings.accelerator, devices=settings.devices, precision=precision,
        strategy="ddp" if settings.devices > 1 else "auto", max_steps=settings.max_steps, max_epochs=-1,
        callbacks=[watch], plugins=[WholeFiles()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0)


def introduce(job: ClipJob, pairs: Pairs, clip: CLIP, checkpoint: Path | None) -> None:
    parameters = sum(p.numel() for p in clip.parameters()) / 1e6
    captions = sum(len(pair.captions) for pair in pairs.items)
    passes = job.trainer.max_steps * job.data.batch_size / len(pairs)
    lines = [*pairs.notes, f"{len(pairs)} pictures, {captions} captions, {parameters:.1f} million parameters, "
             f"{job.trainer.max_steps} steps of {job.data.batch_size}: {passes:.1f} passes"]
    print("\n".join(lines + ([f"continuing {checkpoint}"] if checkpoint else [])), file=sys.stderr)


def export(clip: CLIP, folder: Path, dtype: str) -> None:
    clip.to(getattr(torch, dtype)).eval().save_pretrained(folder)


def account(job: ClipJob, pairs: Pairs, recipe: ClipRecipe, watch: Watch) -> dict[str, Any]:
    """What a run was and came to; times in seconds, measures in percent."""
    gpu = torch.cuda.get_device_name() if recipe.device.type == "cuda" else None
    return {
        "steps": job.trainer.max_steps, "batch_size": job.data.batch_size, "seconds": round(watch.seconds, 1),
        "machine": gpu or machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "pictures": len(pairs), "left_out": list(pairs.notes),
        "parameters": sum(p.numel() for p in recipe.clip.parameters()), "validation": watch.measured,
        "unreadable_pictures": len(watch.notes.get("picture", {})), "cut_captions": len(watch.notes.get("caption", {})),
        "unreadable": sorted(watch.notes.get("picture", {}).values())}


def conclude(out: Path, watch: Watch) -> None:
    kinds = (("picture", "pictures could not be read and were replaced"), ("caption", "captions were cut"))
    counted = [f"{len(watch.notes[kind])} {words}" for kind, words in kinds if watch.notes.get(kind)]
    print("\n".join([*counted, f"wrote {out / MODEL}, {out / METRICS} and {out / CURVES}"]), file=sys.stderr)
