"""`mm bench clip`: a CLIP of the size of ViT-B/32 against open_clip's, same weights, float32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from mm.checkpoint.files import Weights, load

from ...encoders.clip import CLIP
from ...encoders.vision.families import open_clip as family
from ..clip.loss import clip_loss
from ..common.machine import cores
from ..train.optim import adamw
from ..train.settings import Optim
from .report import Bench, Case, interleave, report

VISION = {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
EMBED = 512
PACKAGES = ("torch", "open_clip_torch")


@dataclass(frozen=True, kw_only=True)
class Clip(Bench):
    """A CLIP of the size of ViT-B/32 against open_clip's, same weights, float32 on a CPU.

    Args:
        threads: CPU threads.
        batch: pictures and texts per call.
        repeats: timed calls of each.
    """

    threads: PositiveInt = cores()
    batch: PositiveInt = 8
    repeats: PositiveInt = 15

    def run(self) -> int:
        return clip(self)


def clip(args: Clip) -> int:
    torch.set_num_threads(args.threads)
    return report("clip", measure(args.batch, args.repeats), packages=PACKAGES, json_file=args.json)


def measure(batch: int, repeats: int) -> list[Case]:
    """Each case with the same weights and the same inputs; features are compared before anything is timed."""
    ours, peer = pair(VISION, TEXT, EMBED)
    torch.manual_seed(0)
    pixels, ids = torch.randn(batch, 3, 224, 224), texts(batch)
    encoders = [("image encode", ours.encode_image, peer.encode_image, pixels),
                ("text encode", ours.encode_text, peer.encode_text, ids)]
    cases = []
    with torch.inference_mode():
        for name, mine, theirs, x in encoders:
            torch.testing.assert_close(mine(x), theirs(x), atol=1e-4, rtol=1e-4)
            timing = interleave(lambda: mine(x), lambda: theirs(x), repeats, warmup=2)  # noqa: B023
            cases.append(Case.timed(f"{name}, batch {batch}", timing, at_least=1.0))
    steps = training_step(ours, pixels, ids), peer_training_step(peer, pixels, ids)
    timing = interleave(*steps, repeats)
    return [*cases, Case.timed(f"training step, batch {batch}", timing, at_least=1.0)]


def pair(vision: dict[str, object], text: dict[str, object], embed: int) -> tuple[CLIP, nn.Module]:
    """Our model and open_clip's, with one set of random weights, in evaluation mode."""
    from open_clip.model import CLIP as PeerCLIP

    torch.manual_seed(0)
    peer = PeerCLIP(embed_dim=embed, vision_cfg=dict(vision), text_cfg=dict(text)).eval()
    config = {"model_cfg": {"embed_dim": embed, "vision_cfg": vision, "text_cfg": text}}
    settings = family.to_spec(config, "the benchmark's config")
    state = {name: value.detach().clone() for name, value in peer.state_dict().items()}
    weights = Weights("open_clip", {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__)
    ours = load(lambda: CLIP(settings), weights, family.table(settings, weights.shapes))
    return ours.eval(), peer


def texts(batch: int) -> Tensor:
    """(B, 77) of lengths that captions have: start, words, end, padding."""
    ids = torch.zeros(batch, TEXT["context_length"], dtype=torch.long)
    for row, length in zip(ids, torch.randint(6, 25, (batch,)).tolist(), strict=True):
        row[:length] = torch.randint(1, 49000, (length,))
        row[0], row[length] = 49406, 49407
    return ids


def training_step(model: CLIP, pixels: Tensor, ids: Tensor) -> Callable[[], None]:
    model.train()
    optimizer, group = adamw(model, Optim(lr=1e-5)), torch.arange(len(pixels))

    def step() -> None:
        clip_loss(*model(pixels, ids), model.logit_scale, group).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_training_step(model: nn.Module, pixels: Tensor, ids: Tensor) -> Callable[[], None]:
    """As open_clip's own training does it: its loss, its two groups of AdamW, its clamp left out."""
    from open_clip.loss import ClipLoss

    model.train()
    loss = ClipLoss()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6)

    def step() -> None:
        image, text, scale = model(pixels, ids)[:3]
        loss(image, text, scale).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
