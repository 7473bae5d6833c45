"""`mm bench vit`: ViT-B/16, EVA-02-B and DINOv3-B against timm's, same weights, 224 pixels, float32 on a CPU (or
bfloat16 on a GPU)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from mm.errors import InputError

from ...encoders.vision.vit import ViT
from ..common.machine import cores
from .report import Bench, Case, Timing, interleave, report

SIZE = 224
PACKAGES = ("torch", "timm")
MODELS = {"vit": ("ViT-B/16", "vit_base_patch16_224"), "eva": ("EVA-02-B/14", "eva02_base_patch14_224"),
          "dinov3": ("DINOv3-B/16", "vit_base_patch16_dinov3")}
BATCHES = (1, 8)


@dataclass(frozen=True, kw_only=True)
class Vit(Bench):
    """ViT-B/16, EVA-02-B and DINOv3-B against timm's, same weights, 224 pixels, float32 on a CPU (or bfloat16 on a
    GPU).

    Args:
        models: default: all.
        threads: CPU threads.
        repeats: timed calls of each.
        device: cpu (float32) or cuda (bfloat16).
        eager: leave out the compiled ViT-B/16.
    """

    models: tuple[str, ...] = tuple(MODELS)
    threads: PositiveInt = cores()
    repeats: PositiveInt = 11
    device: str = "cpu"
    eager: bool = False

    def run(self) -> int:
        return vit(self)


def vit(args: Vit) -> int:
    torch.set_num_threads(args.threads)
    cases = [case for model in args.models for case in measure(model, args.repeats, args.device, not args.eager)]
    return report("vit", cases, packages=PACKAGES, json_file=args.json)


def measure(model: str, repeats: int, device: str, compiled: bool) -> list[Case]:
    """Each batch size in eager mode and, for the plain ViT, as the better of eager and compiled."""
    title, architecture = MODELS[model]
    ours, peer = pair(architecture)
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    ours, peer = ours.to(device, dtype), peer.to(device, dtype)
    least = 1.0 if model == "vit" else 1.05 if device == "cpu" else 1.3
    cases = []
    for batch in BATCHES if device == "cpu" else (1, 256):
        pixels = torch.randn(batch, 3, SIZE, SIZE, device=device, dtype=dtype)
        eager = timed(ours.encode, peer, pixels, repeats)
        cases.append(Case.timed(f"{title}, batch {batch}, eager", eager, at_least=least))
        if compiled and model == "vit":
            fast = timed(torch.compile(ours.encode), torch.compile(peer), pixels, repeats)
            best = Timing(ours=min(eager.ours, fast.ours), peer=min(eager.peer, fast.peer))
            cases.append(Case.timed(f"{title}, batch {batch}, compiled", fast))
            cases.append(Case.timed(f"{title}, batch {batch}, better of eager and compiled", best, at_least=1.0))
    return cases


def timed(ours: Callable[[Tensor], Tensor], peer: Callable[[Tensor], Tensor], pixels: Tensor, repeats: int) -> Timing:
    def call(model: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            model(pixels)
            if pixels.is_cuda:
                torch.cuda.synchronize()
        return run
    with torch.inference_mode():
        return interleave(call(ours), call(peer), repeats, warmup=2)


def pair(architecture: str) -> tuple[ViT, nn.Module]:
    """Our model and timm's, with one set of random weights that went through a directory, found equal."""
    import timm

    torch.manual_seed(0)
    peer = timm.create_model(architecture, pretrained=False, img_size=SIZE).eval()
    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(peer, folder, model_args={"img_size": SIZE}, safe_serialization=True)
        ours = ViT.from_pretrained(folder)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        gap = (ours.encode(pixels) - peer(pixels)).abs().max().item()
    if gap > 1e-4:
        raise InputError(f"{architecture}: our output is {gap:.1e} from timm's, so that a timing would mean nothing")
    return ours, peer
