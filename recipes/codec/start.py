"""What a run of `mm train codec` begins with: the codec, and what a teacher hears."""

from __future__ import annotations

import torch
from torch import nn

from mm.spec.schema import require

from ...codecs.conv import Conv, ConvTranspose
from ...codecs.mimi import Mimi
from ...codecs.spec import MimiSpec, Quantizer, Seanet, mimi_stack
from .settings import CodecJob, CodecShape
from .teacher import Teacher, teacher

LEVEL = 10.0


def starting_model(job: CodecJob) -> Mimi:
    """The codec to go on from, in float32, or a new one with the same weights for the same seed."""
    torch.manual_seed(job.trainer.seed)
    if job.model:
        return Mimi.from_pretrained(job.model, dtype=torch.float32)
    codec = Mimi(new_spec(job.shape))
    draw(codec)
    return codec


@torch.no_grad()
def draw(codec: Mimi) -> None:
    """Weights of convolutions that keep the variance of what they read, and no biases: torch's own, of a third of that
    variance and beside biases as large as the signal, leave a codec silent for thousands of steps. Speech, of a
    deviation near a tenth, is made louder where it enters and softer where it leaves."""
    for part in codec.modules():
        if isinstance(part, Conv | ConvTranspose):
            reads = 2 * part.inputs if isinstance(part, ConvTranspose) else part.kernel * part.inputs
            nn.init.normal_(part.weight, std=reads**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    codec.encoder.layers[0].weight.mul_(LEVEL)
    codec.decoder.layers[-1].weight.div_(LEVEL)


def new_spec(shape: CodecShape) -> MimiSpec:
    """Of the layout that the official package and transformers can read."""
    require(shape.codebooks > 1, f"shape.codebooks must be at least 2, one of them semantic, not {shape.codebooks}")
    stack = mimi_stack(dim=shape.width, depth=shape.depth, heads=shape.heads, hidden=shape.hidden, window=shape.window)
    quantizer = Quantizer(codebooks=shape.codebooks, size=shape.size, dim=shape.dim)
    return MimiSpec(rate=shape.rate, seanet=Seanet(filters=shape.filters, ratios=shape.ratios), encoder=stack,
                    decoder=stack, stride=shape.stride, quantizer=quantizer)


def teacher_of(job: CodecJob, device: torch.device) -> Teacher | None:
    wanted = job.loss.teacher and job.loss.semantic and not job.decoder_only
    return teacher(job.loss.teacher, device) if wanted else None
