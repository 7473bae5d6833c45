"""One run of `mm train clip`, from settings to a model directory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm.checkpoint.files import write_json
from mm.errors import InputError
from mm.nn.lora import merge_lora

from ...encoders.clip import CLIP
from ..train.launch import METRICS, MODEL, export, facts, lightning_trainer, start
from ..train.shard import strategy
from ..train.watch import CURVES, Watch
from .data import Input, PairsModule
from .evaluation import Meter, flat, open_source
from .module import ClipRecipe
from .pairs import Pairs, read_pairs
from .settings import ClipJob, Lock
from .shape import add_bias, can_trim, new_clip
from .tune import TOWERS, with_patch_dropout


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


def account(job: ClipJob, pairs: Pairs, recipe: ClipRecipe, watch: Watch) -> dict[str, Any]:
    """What a run was and came to; times in seconds, measures in percent."""
    notes = {kind: watch.notes.get(kind, {}) for kind in ("picture", "sound", "caption", "repeat")}
    return facts(job, recipe, watch) | {
        "pictures": len(pairs), "left_out": list(pairs.notes),
        "parameters": sum(p.numel() for p in recipe.clip.parameters()),
        "trained": sum(p.numel() for p in recipe.clip.parameters() if p.requires_grad),
        "unreadable_pictures": len(notes["picture"]), "unreadable_sounds": len(notes["sound"]),
        "cut_captions": len(notes["caption"]), "repeated_captions": len(notes["repeat"]),
        "unreadable": sorted([*notes["picture"].values(), *notes["sound"].values()])}


def conclude(out: Path, watch: Watch) -> None:
    kinds = (("picture", "pictures could not be read and were replaced"), ("caption", "captions were cut"),
             ("sound", "sounds could not be read and were replaced"),
             ("repeat", "captions stood more than once in a batch and counted as wrong answers to each other"))
    counted = [f"{len(watch.notes[kind])} {words}" for kind, words in kinds if watch.notes.get(kind)]
    print("\n".join([*counted, f"wrote {out / MODEL}, {out / METRICS} and {out / CURVES}"]), file=sys.stderr)
