"""One run of `mm train codec`, from settings to a model directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mm.checkpoint.files import write_json
from mm.spec.schema import require

from ...codecs.learning import folded
from ..train.launch import METRICS, MODEL, conclude, export, facts, lightning_trainer, start
from ..train.shard import strategy
from .data import SoundModule, length_of
from .evaluation import COLUMNS, CodecWatch, Exam
from .loss import SCALES
from .module import CodecRecipe
from .settings import CodecJob
from .start import starting_model, teacher_of
from .teacher import lessons

SOUNDS = "sounds"


def fit(job: CodecJob) -> None:
    """Trains, or goes on with what `job.out` holds, and writes the averaged weights to `job.out`/model."""
    out, checkpoint = start(job)
    codec = starting_model(job)
    data = SoundModule(job.data, codec.spec.rate, codec.spec.frame, job.trainer.seed, out / SOUNDS)
    data.folder.mkdir(exist_ok=True)
    data.prepare_data()
    check_rows(data)
    exam = Exam(data.validation) if data.validation else None
    watch = CodecWatch(out, job.trainer, exam, COLUMNS, data.told)
    late = bool(job.loss.adversarial and job.loss.adversarial_from)  # until when discriminators have no gradient
    trainer = lightning_trainer(job.trainer, watch, strategy(False, job.trainer.devices, idle=late))
    teacher = teacher_of(job, trainer.strategy.root_device)
    if teacher:
        data.features = lessons(teacher, data.training, data.folder / "teacher.f16")
    recipe = CodecRecipe(codec.spec, job.optim, job.loss, job.books, job.critics, job.trainer.seed,
                         teacher and teacher.width, codec, job.decoder_only)
    if trainer.is_global_zero:
        introduce(job, data, recipe, checkpoint)
    trainer.fit(recipe, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        export(folded(recipe.average), out / MODEL, job.export.dtype)
        write_json(out / METRICS, account(job, data, recipe, watch))
        conclude(out, watch)


def check_rows(data: SoundModule) -> None:
    """Raises InputError for rows that are shorter than the spectrograms of a loss need."""
    length, least = length_of(data.training, data.data), max(window for window, _ in SCALES) // 2
    require(length > least, f"data.seconds {data.data.seconds} makes rows of {length} samples at {data.rate} Hz: they "
                            f"must be longer than {least} samples")


def introduce(job: CodecJob, data: SoundModule, recipe: CodecRecipe, checkpoint: Path | None) -> None:
    spec, millions = recipe.settings, sum(p.numel() for p in recipe.codec.parameters()) / 1e6
    hours, held = data.training.seconds / 3600, len(data.validation) if data.validation else 0
    row = round(job.data.seconds * spec.frame_rate) / spec.frame_rate
    passes = job.trainer.max_steps * job.data.batch_size / data.order().count
    bits = spec.quantizer.codebooks * (spec.quantizer.size - 1).bit_length() * spec.frame_rate / 1000
    lines = [*data.notes, f"{len(data.training)} sounds, {hours:.2f} hours, {held} to evaluate on, {millions:.2f} "
             f"million parameters, {bits:.2f} kbit/s, {job.trainer.max_steps} steps of {job.data.batch_size} x "
             f"{row:.2f} s: {passes:.1f} passes"]
    print("\n".join(lines + ([f"continuing {checkpoint}"] if checkpoint else [])), file=sys.stderr)


def account(job: CodecJob, data: SoundModule, recipe: CodecRecipe, watch: CodecWatch) -> dict[str, Any]:
    """What a run was and came to; times in seconds."""
    return {**facts(job, recipe, watch), "row_seconds": job.data.seconds, "sounds": len(data.training),
            "hours": round(data.training.seconds / 3600, 3), "left_out": data.notes, "teacher": job.loss.teacher,
            "parameters": sum(p.numel() for p in recipe.codec.parameters()),
            "discriminator_parameters": sum(p.numel() for p in recipe.jury.parameters()) if recipe.jury else 0}
