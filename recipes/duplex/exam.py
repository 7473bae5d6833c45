"""What is measured of a duplex model in training: how well it foresees held-out conversations and how it holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mm.checkpoint.files import read_json
from mm.speech.duplex import DuplexLM

from ...codecs.mimi import Mimi
from ..data.dialogues import read_manifest
from ..talk.partner import Partner
from ..talk.replies import Manner, replies
from ..train.watch import Measure
from .answers import SOON, figures, observed
from .data import DuplexModule, Fixed
from .loss import losses_of
from .recordings import RIGHT, Recording, recording
from .settings import DuplexJob, DuplexLoss

SPOKEN = 16  # dialogues that are held in every evaluation
TOLD = ("written right", "median delay", f"within {SOON:g} s", "overlap", "silence kept")


def exam(job: DuplexJob, data: DuplexModule) -> Measure:
    """Measures a model on what is held out, and in dialogues where some of that says what was asked in it and the codec
    is at hand."""
    batches, talks = data.evaluation(), data.codec is not None and data.spec.own and data.spec.heard
    recordings = with_questions(job, data) if talks else []

    def measure(model: DuplexLM) -> dict[str, float]:
        training = model.training
        model.eval()
        try:
            told = foreseen(batches, job.loss, model)
            return told | held(recordings, data.codec, model) if recordings else told
        finally:
            model.train(training)
    return measure


def with_questions(job: DuplexJob, data: DuplexModule) -> list[Recording]:
    """The first `SPOKEN` that are held out of those that have a sound and say what was asked in it."""
    known, found = {entry.where: entry for entry in read_manifest(job.data.val or job.data.path)}, []
    for one in data.validation.dialogues:
        entry = known[one.where]
        if len(found) < SPOKEN and entry.sound is not None and "turns" in read_json(entry.words):
            found.append(recording(entry))
    return found


def held(recordings: Sequence[Recording], codec: Mimi, model: DuplexLM) -> dict[str, float]:
    """What the model makes of the dialogues when it hears the person and goes on by itself, greedily. Answers are
    judged by what it writes: `mm bench dialogue` hears what it says."""
    partner = Partner(model, codec.to(model.text.weight.device), "the model in training")
    users = (one.voice(partner.rate, RIGHT) for one in recordings)
    told = figures(list(observed(partner, recordings, replies(partner, users, Manner(rows=SPOKEN)))))
    return {name: told[name] for name in TOLD}


@torch.inference_mode()
def foreseen(batches: Fixed, settings: DuplexLoss, model: DuplexLM) -> dict[str, float]:
    """The text's perplexity, and the share of codes foreseen, by codebook, over all evaluation batches."""
    device = model.text.weight.device
    made = [losses_of(model, batch._replace(codes=batch.codes.to(device), documents=batch.documents.to(device)),
                      settings) for batch in (batches[i] for i in range(len(batches)))]
    summed = {name: sum(getattr(one, name) for one in made) for name in made[0]._fields}
    text, audio = ((summed[name] / weight.clamp(min=1e-9)).item()
                   for name, weight in zip(("text", "audio"), summed["weight"], strict=True))
    entropy = (summed["entropy"] / summed["words"].clamp(min=1)).item()
    right = (summed["right"] / summed["said"].clamp(min=1)).tolist()
    return {"loss": text + audio, "text": text, "audio": audio, "perplexity": math.exp(min(entropy, 700.0)),
            **{f"codebook {k + 1} right": share for k, share in enumerate(right)}}
