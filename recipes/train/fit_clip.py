"""One run of `mm train clip`, from settings to a model directory."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from mm.checkpoint import write_json
from mm.errors import InputError
from mm.lora import merge_lora

from ...encoders.clip import CLIP
from ..bench.report import machine
from ..data.module import Input, PairsModule
from ..data.pairs import Pairs, read_pairs
from ..evaluate import Meter, flat, open_source
from .clip import ClipRecipe
from .run import WholeFiles, begin
from .settings import FREE, ClipJob, Lock, Trainer
from .shape import add_bias, can_trim, new_clip
from .shard import strategy
from .tune import TOWERS, with_patch_dropout
from .watch import CURVES, Watch

if TYPE_CHECKING:
    from .lm_settings import LmJob
    from .vit_settings import VitJob

MODEL, METRICS = "model", "metrics.json"


def fit(job: ClipJob) -> None:
    """Trains, or goes on with what `job.out` holds, and writes the averaged weights to `job.out`/model."""
    out, checkpoint = start(job)
    pairs = read_pairs(job.data.path, job.data.templates)
    torch.manual_seed(job.trainer.seed)
    clip = starting_model(job, pairs)
    recipe = ClipRecipe(clip.spec, job.optim, job.loss, job.trainer.seed, clip, locks(job, pairs, clip), job.lora)
    watch = Watch(out, job.trainer, measure_with(job))
    several = len({pair.kinds for pair in pairs.items}) > 1  # kinds of things, so that a batch leaves a tower out
    trainer = lightning_trainer(job.trainer, watch, strategy(job.shard, job.trainer.devices, idle=several))
    if trainer.is_global_zero:
        introduce(job, pairs, clip, checkpoint)
    data = PairsModule(pairs, model_input(clip), job.data, job.augment, job.trainer.seed,
                       repeats=job.loss.positives == "pair")
    trainer.fit(recipe, data, ckpt_path=checkpoint, weights_only=True)
    average = recipe.whole_average()
    if trainer.is_global_zero:
        merge_lora(average)
        export(average, out / MODEL, job.export.dtype)
        write_json(out / METRICS, account(job, pairs, recipe, watch))
        conclude(out, watch)


def start(job: ClipJob | VitJob | LmJob) -> tuple[Path, Path | None]:
    """The directory of a run and the checkpoint to go on from, if there is one; the process is set up for it."""
    quiet()
    out = Path(job.out)
    checkpoint = begin(out, asdict(job), FREE)
    if job.trainer.threads:
        torch.set_num_threads(job.trainer.threads)
    return out, checkpoint


def quiet() -> None:
    """Lightning's remarks about hardware, and about loaders that it cannot know to start at the right step."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    known = "not resumable|does not have many workers|LeafSpec|all_gather is deprecated|in eval mode at the start"
    warnings.filterwarnings("ignore", message=f".*({known}).*")


def starting_model(job: ClipJob, pairs: Pairs) -> CLIP:
    """The checkpoint to fine-tune, in float32, or a new model: the same one for the same seed and captions. Raises
    InputError when it lacks what the pairs or the loss need."""
    siglip = job.loss.kind == "siglip"
    if job.model:
        clip = CLIP.from_pretrained(job.model, dtype=torch.float32).train()
    else:
        clip = new_clip(job.shape, (text for pair in pairs.items for text in pair.captions), siglip)
    kinds = {kind for pair in pairs.items for kind in pair.kinds}
    if "text" in kinds and clip.tokenizer is None:
        raise InputError(f"{job.model} has no tokenizer, which training needs")
    if "audio" in kinds and clip.audio is None:
        raise InputError(f"{pairs.where} holds sounds, but the model has no audio tower"
                         + ("" if job.model else ": give it one with shape.audio"))
    if siglip and clip.logit_bias is None:
        add_bias(clip)
    if job.patch_dropout is not None:
        with_patch_dropout(clip, job.patch_dropout)
    return clip


def locks(job: ClipJob, pairs: Pairs, clip: CLIP) -> Lock:
    """What is to be locked: towers that no pair trains, too."""
    kinds = {kind for pair in pairs.items for kind in pair.kinds}
    idle = {name: True for name in TOWERS if name not in kinds and getattr(clip, name) is not None}
    return replace(job.lock, **idle)


def model_input(clip: CLIP) -> Input:
    return Input(preprocess=clip.preprocessing, tokenizer=clip.tokenizer, context=clip.spec.text.context,
                 trim=can_trim(clip.spec.text), spectrogram=clip.spec.audio and clip.spec.audio.spectrogram)


def measure_with(job: ClipJob) -> Callable[[nn.Module], dict[str, float]] | None:
    """What evaluates a model on the validation data, if there is any."""
    if not job.data.val:
        return None
    source = open_source(job.data.val, job.data.templates)
    return lambda clip: dict(flat(Meter(clip=clip, templates=job.data.templates)(source)))


def lightning_trainer(settings: Trainer, watch: Watch, strategy: str | ModelParallelStrategy = "ddp"
                      ) -> lightning.Trainer:
    gpu = torch.cuda.is_available() and settings.accelerator in ("auto", "gpu", "cuda")
    precision = ("bf16-mixed" if gpu else "32-true") if settings.precision == "auto" else settings.precision
    return lightning.Trainer(
        accelerator=settings.accelerator, devices=settings.devices, precision=precision,
        strategy=strategy if settings.devices > 1 else "auto", max_steps=settings.max_steps, max_epochs=-1,
        callbacks=[watch], plugins=[WholeFiles()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0)


def introduce(job: ClipJob, pairs: Pairs, clip: CLIP, checkpoint: Path | None) -> None:
    parameters = sum(p.numel() for p in clip.parameters()) / 1e6
    sounds = sum(pair.sound is not None for pair in pairs.items)
    pictures = sum(pair.picture is not None for pair in pairs.items)
    captions = sum(len(pair.captions) for pair in pairs.items)
    passes = job.trainer.max_steps * job.data.batch_size / len(pairs)
    held = f"{pictures} pictures, {captions} captions" + (f", {sounds} sounds" if sounds else "")
    lines = [*pairs.notes, f"{held}, {parameters:.1f} million parameters, "
             f"{job.trainer.max_steps} steps of {job.data.batch_size}: {passes:.1f} passes"]
    print("\n".join(lines + ([f"continuing {checkpoint}"] if checkpoint else [])), file=sys.stderr)


def export(clip: CLIP, folder: Path, dtype: str) -> None:
    clip.to(getattr(torch, dtype)).eval().save_pretrained(folder)


def account(job: ClipJob, pairs: Pairs, recipe: ClipRecipe, watch: Watch) -> dict[str, Any]:
    """What a run was and came to; times in seconds, measures in percent."""
    gpu = torch.cuda.get_device_name() if recipe.device.type == "cuda" else None
    notes = {kind: watch.notes.get(kind, {}) for kind in ("picture", "sound", "caption", "repeat")}
    return {
        "steps": job.trainer.max_steps, "batch_size": job.data.batch_size, "seconds": round(watch.seconds, 1),
        "machine": gpu or machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "pictures": len(pairs), "left_out": list(pairs.notes),
        "parameters": sum(p.numel() for p in recipe.clip.parameters()),
        "trained": sum(p.numel() for p in recipe.clip.parameters() if p.requires_grad), "validation": watch.measured,
        "unreadable_pictures": len(notes["picture"]), "unreadable_sounds": len(notes["sound"]),
        "cut_captions": len(notes["caption"]), "repeated_captions": len(notes["repeat"]),
        "unreadable": sorted([*notes["picture"].values(), *notes["sound"].values()])}


def conclude(out: Path, watch: Watch) -> None:
    kinds = (("picture", "pictures could not be read and were replaced"), ("caption", "captions were cut"),
             ("sound", "sounds could not be read and were replaced"),
             ("repeat", "captions stood more than once in a batch and counted as wrong answers to each other"))
    counted = [f"{len(watch.notes[kind])} {words}" for kind, words in kinds if watch.notes.get(kind)]
    print("\n".join([*counted, f"wrote {out / MODEL}, {out / METRICS} and {out / CURVES}"]), file=sys.stderr)
