"""`mm bench loss`: the tiled contrastive losses, forward and backward, against open_clip's dense ones on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor

from ..clip.loss import clip_loss, siglip_loss
from ..common.machine import cores
from .report import Bench, Case, interleave, report

PACKAGES = ("torch", "open_clip_torch")
SCALE, BIAS = 2.659, -10.0


@dataclass(frozen=True, kw_only=True)
class LossBench(Bench):
    """The tiled contrastive losses, forward and backward, against open_clip's dense ones on a CPU.

    Args:
        threads: CPU threads.
        batch: pairs.
        dim: width of the features.
        repeats: timed calls of each.
    """

    threads: PositiveInt = cores()
    batch: PositiveInt = 4096
    dim: PositiveInt = 512
    repeats: PositiveInt = 9

    def run(self) -> int:
        return loss(self)


def loss(args: LossBench) -> int:
    torch.set_num_threads(args.threads)
    return report("loss", measure(args.batch, args.dim, args.repeats), packages=PACKAGES, json_file=args.json)


def measure(batch: int, dim: int, repeats: int) -> list[Case]:
    torch.manual_seed(0)
    image, text = (torch.randn(batch, dim, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (SCALE, BIAS))
    group, inputs = torch.arange(batch), (image, text, scale, bias)
    pairs = {"softmax": (lambda: clip_loss(image, text, scale, group), peer_softmax(image, text, scale)),
             "SigLIP": (lambda: siglip_loss(image, text, scale, bias, group), peer_siglip(image, text, scale, bias))}
    cases = []
    for name, (ours, peer) in pairs.items():
        torch.testing.assert_close(ours(), peer(), atol=1e-4, rtol=1e-5)
        mine, theirs = (peak(step(f, inputs)) / 2**20 for f in (ours, peer))
        cases.append(Case(case=f"{name}, {batch} x {dim}, peak memory", ours=mine, peer=theirs, ratio=theirs / mine,
                          at_least=4.0, unit="MiB"))
        timing = interleave(step(ours, inputs), step(peer, inputs), repeats)
        cases.append(Case.timed(f"{name}, {batch} x {dim}, time", timing, at_least=1 / 1.3))
    return cases


def step(f: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    def run() -> None:
        for x in inputs:
            x.grad = None
        f().backward()
    return run


def peak(run: Callable[[], None]) -> int:
    """The most bytes that the tensors made during a call hold at once, by the allocator's own account."""
    from torch.profiler import ProfilerActivity, profile

    run()  # what is made once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes, initial=0))


def peer_softmax(image: Tensor, text: Tensor, scale: Tensor) -> Callable[[], Tensor]:
    from open_clip.loss import ClipLoss

    dense = ClipLoss()
    return lambda: dense(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale.exp())


def peer_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    from open_clip.loss import SigLipLoss

    dense = SigLipLoss()
    return lambda: dense(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale.exp(), bias)
