"""What a run of `mm train codec` begins with: the codec, and what a teacher hears."""

from __future__ import annotations

import torch

from mm.schema import require

from ...codecs.mimi import Mimi
from ...codecs.spec import MimiSpec, Quantizer, Seanet, mimi_stack
from .codec_settings import CodecJob, CodecShape
from .teacher import Teacher, teacher


def starting_model(job: CodecJob) -> Mimi:
    """The codec to go on from, in float32, or a new one with the same weights for the same seed."""
    torch.manual_seed(job.trainer.seed)
    if job.model:
        return Mimi.from_pretrained(job.model, dtype=torch.float32)
    return Mimi(new_spec(job.shape))


def new_spec(shape: CodecShape) -> MimiSpec:
    """Of the layout that the official package and transformers can read."""
    require(shape.codebooks > 1, f"shape.codebooks must be at least 2, one of them semantic, not {shape.codebooks}")
    stack = mimi_stack(dim=shape.width, depth=shape.depth, heads=shape.heads, hidden=shape.hidden, window=shape.window)
    quantizer = Quantizer(codebooks=shape.codebooks, size=shape.size, dim=shape.dim)
    return MimiSpec(rate=shape.rate, seanet=Seanet(filters=shape.filters, ratios=shape.ratios), encoder=stack,
                    decoder=stack, stride=shape.stride, quantizer=quantizer)


def teacher_of(job: CodecJob, device: torch.device) -> Teacher | None:
    return teacher(job.loss.teacher, device) if job.loss.teacher and job.loss.semantic else None
