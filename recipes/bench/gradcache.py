"""`mm bench gradcache`: a training step of a small CLIP on a large batch in chunks, against the accumulation of
open_clip's training loop, same weights, on a CPU; and how far each gradient is from that of the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from mm.checkpoint.files import Weights, load

from ...encoders.clip import CLIP
from ...encoders.vision.families import open_clip as family
from ..clip.loss import clip_loss
from ..clip.whole_batch import in_chunks
from ..common.machine import cores
from .report import Bench, Case, interleave, report

PACKAGES = ("torch", "open_clip_torch")
VISION = {"image_size": 64, "patch_size": 16, "width": 192, "head_width": 64, "layers": 4}
TEXT = {"context_length": 16, "vocab_size": 4096, "width": 128, "heads": 2, "layers": 3}
EMBED = 128


@dataclass(frozen=True, kw_only=True)
class Gradcache(Bench):
    """A training step of a small CLIP on a large batch in chunks, against the accumulation of open_clip's training
    loop, same weights, on a CPU; and how far each gradient is from that of the whole batch.

    Args:
        threads: CPU threads.
        batch: pairs in a step.
        chunk: pairs at a time.
        repeats: timed steps of each.
    """

    threads: PositiveInt = cores()
    batch: PositiveInt = 1024
    chunk: PositiveInt = 64
    repeats: PositiveInt = 7

    def run(self) -> int:
        return gradcache(self)


def gradcache(args: Gradcache) -> int:
    torch.set_num_threads(args.threads)
    cases = measure(args.batch, args.chunk, args.repeats)
    return report("gradcache", cases, packages=PACKAGES, json_file=args.json)


def measure(batch: int, chunk: int, repeats: int) -> list[Case]:
    ours, peer = pair()
    torch.manual_seed(0)
    pixels = torch.randn(batch, 3, VISION["image_size"], VISION["image_size"])
    ids = torch.randint(1, TEXT["vocab_size"], (batch, TEXT["context_length"]))
    mine, theirs = our_step(ours, pixels, ids, chunk), peer_step(peer, pixels, ids, chunk)
    timing = interleave(mine, theirs, repeats)
    whole = copy.deepcopy(ours)
    our_step(whole, pixels, ids, batch)()
    exact = {name: p.grad for name, p in whole.named_parameters()}
    far = max(((p.grad - exact[name]).norm() / exact[name].norm()).item() for name, p in ours.named_parameters())
    factor = (peer.logit_scale.grad / exact["logit_scale"]).item()
    return [Case.timed(f"step of {batch} in chunks of {chunk}", timing, at_least=1.0),
            Case(case="largest relative error of a gradient", ours=far, unit="", ratio=1e-5 / max(far, 1e-12),
                 at_least=1.0),
            Case(case="gradient of logit_scale over the whole batch's", unit="x", peer=factor,
                 ours=(ours.logit_scale.grad / exact["logit_scale"]).item())]


def pair() -> tuple[CLIP, nn.Module]:
    from open_clip.model import CLIP as PeerCLIP

    torch.manual_seed(0)
    peer = PeerCLIP(embed_dim=EMBED, vision_cfg=dict(VISION), text_cfg=dict(TEXT))
    settings = family.to_spec({"model_cfg": {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": TEXT}}, "the bench")
    state = {name: value.detach().clone() for name, value in peer.state_dict().items()}
    weights = Weights("open_clip", {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__)
    return load(lambda: CLIP(settings), weights, family.table(settings, weights.shapes)).train(), peer.train()


def our_step(model: CLIP, pixels: Tensor, ids: Tensor, chunk: int) -> Callable[[], None]:
    group = torch.arange(len(pixels))

    def step() -> None:
        model.zero_grad()
        image, text = in_chunks(model.encode_image, pixels, chunk), in_chunks(model.encode_text, ids, chunk)
        clip_loss(image, text, model.logit_scale, group).backward()

    return step


def peer_step(model: nn.Module, pixels: Tensor, ids: Tensor, chunk: int) -> Callable[[], None]:
    """What open_clip's loop does with accum_freq: all features without gradient, then per chunk its features with
    gradient among the kept ones, the loss of the whole batch, and a backward pass."""
    from open_clip.loss import ClipLoss

    loss, parts = ClipLoss(), list(zip(pixels.split(chunk), ids.split(chunk), strict=True))

    def step() -> None:
        model.zero_grad()
        with torch.no_grad():
            kept = [model(image, text)[:2] for image, text in parts]
        for i, (image, text) in enumerate(parts):
            *fresh, scale = model(image, text)[:3]
            images, texts = (torch.cat([new if j == i else old[side] for j, old in enumerate(kept)])
                             for side, new in enumerate(fresh))
            loss(images, texts, scale).backward()

    return step
