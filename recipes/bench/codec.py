"""`mm bench codec`: Mimi frame by frame and whole, on a CPU in float32, against the official package and transformers
with the same random weights. Times are of encoding and decoding one frame of 80 ms with 8 codebooks."""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse.typing import PositiveInt
from safetensors.torch import save_file
from torch import Tensor

from mm.errors import InputError
from mm.lowbit import arrange_for_rows, quantize
from mm.tree import tensors

from .report import Bench, Case, interleave, report

if TYPE_CHECKING:
    from ...codecs.mimi import Mimi

PACKAGES = ("torch", "moshi", "transformers")
CODEBOOKS, FRAME, SECONDS, STREAMS, WARMUP = 8, 1920, 30, 8, 5
Step = Callable[[Tensor], Any]  # one frame (B, 1, 1920), encoded and decoded


@dataclass(frozen=True, kw_only=True)
class Codec(Bench):
    """Mimi frame by frame and whole, on a CPU in float32, against the official package and transformers with the
    same random weights. Times are of encoding and decoding one frame of 80 ms with 8 codebooks.

    Args:
        frames: frames of each stream.
        repeats: timed calls on whole waves.
    """

    frames: PositiveInt = 500
    repeats: PositiveInt = 3

    def run(self) -> int:
        return codec(self)


def codec(args: Codec) -> int:
    os.environ.setdefault("NO_TORCH_COMPILE", "1")  # the official package, eager as ours
    torch.manual_seed(0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        return report("codec", measure(args, Path(folder)), packages=PACKAGES, json_file=args.json)


def measure(args: Codec, folder: Path) -> list[Case]:
    from ...codecs.mimi import Mimi

    official = official_model()
    save_file({name: value.clone() for name, value in official.state_dict().items()}, folder / "mimi.safetensors")
    ours, small = (Mimi.from_pretrained(folder / "mimi.safetensors") for _ in range(2))
    for stack in (small.encoder_stack, small.decoder_stack):
        quantize(stack)
    wave = torch.randn(STREAMS, 1, args.frames * FRAME) * 0.3
    few = wave[:1, :, : 9 * FRAME]
    if not torch.equal(ours.encode(few, codebooks=CODEBOOKS), official.encode(few)):
        raise InputError("our codes are not the official package's, so that a timing would mean nothing")
    torch.set_num_threads(1)
    cases = streams(ours, small, official, wave) + state_and_quality(ours, small, wave)
    torch.set_num_threads(2)
    return cases + whole(ours, official, wave[:1, :, : SECONDS * 24000], args.repeats, folder)


def official_model() -> Any:
    """The official package's Mimi with every weight, bias and codebook random. Raises InputError where it is not
    installed."""
    try:
        from moshi.models import loaders
    except (ImportError, OSError) as error:
        raise InputError(f"this needs the official package: pip install --no-deps moshi einops ({error})") from None
    model = loaders.get_mimi(None, num_codebooks=CODEBOOKS)
    for name, value in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith("embedding_sum"):
            value.normal_()
        elif value.ndim > 1:  # so that signals keep their size; two steps reach an output of a transposed convolution
            value.normal_(std=(2 * len(value) if "convtr" in name else value.numel() // len(value)) ** -0.5)
        elif ".layer_scale_" in name or name.endswith("bias"):
            value.normal_(std=0.3)
    return model


def streams(ours: Mimi, small: Mimi, official: Any, wave: Tensor) -> list[Case]:
    """All in turns, frame by frame; many streams with the transformers' weights in oneDNN's order."""
    def peer(frame: Tensor) -> Tensor:
        return official.decode(official.encode(frame))
    with official.streaming(1):
        spent = by_turns({"ours": stepper(ours, 1), "peer": peer, "int8": stepper(small, 1)},
                         wave[:1].split(FRAME, 2))
    many = copy.deepcopy(ours)
    for stack in (many.encoder_stack, many.decoder_stack):
        arrange_for_rows(stack)
    eight = by_turns({"ours": stepper(many, STREAMS)}, wave[..., : 100 * FRAME].split(FRAME, 2))["ours"]
    ms = {name: 1000 * statistics.median(times) for name, times in spent.items()}
    late = {name: 1000 * sorted(times)[int(0.99 * (len(times) - 1))] for name, times in spent.items()}
    return [Case(case="stream, 1 thread", ours=ms["ours"], peer=ms["peer"], ratio=ms["peer"] / ms["ours"], at_least=2.5,
                 unit="ms"),
            Case(case="the same, 99th percentile", ours=late["ours"], peer=late["peer"], unit="ms"),
            Case.limited("stream in real time", ms["ours"], 60),
            Case.limited("stream, int8 transformers", ms["int8"], 40),
            Case.limited(f"{STREAMS} streams in one step", 1000 * statistics.median(eight), 180)]


def stepper(model: Mimi, rows: int) -> Step:
    state = model.init_state(rows)
    return lambda frame: model.decode(model.encode(frame, state=state, codebooks=CODEBOOKS), state=state)


def by_turns(steps: dict[str, Step], frames: tuple[Tensor, ...]) -> dict[str, list[float]]:
    """Seconds per frame of each, after a few that do not count; who begins changes from frame to frame."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for i, frame in enumerate(frames):
        for name in [*steps] if i % 2 else [*reversed(steps)]:
            start = time.perf_counter()
            steps[name](frame)
            spent[name].append(time.perf_counter() - start)
    return {name: times[min(WARMUP, len(times) - 1) :] for name, times in spent.items()}


def state_and_quality(ours: Mimi, small: Mimi, wave: Tensor) -> list[Case]:
    """The memory of one stream, and what 8 bits cost on the first five seconds."""
    size = sum(x.nbytes for _, x in tensors(ours.init_state(1))) / 1e6
    wave = wave[:1, :, : 62 * FRAME]
    codes = ours.encode(wave, codebooks=CODEBOOKS)
    same = 100 * (codes == small.encode(wave, codebooks=CODEBOOKS)).float().mean().item()
    whole, rounded = ours.decode(codes), small.decode(codes)
    noise = 10 * torch.log10(whole.square().sum() / (whole - rounded).square().sum()).item()
    return [Case(case="state of one stream", ours=size, unit="MB"),
            Case(case="int8: codes as in fp32", ours=same, unit="%"),
            Case(case="int8: waves over their difference from fp32", ours=noise, unit="dB")]


def whole(ours: Mimi, official: Any, wave: Tensor, repeats: int, folder: Path) -> list[Case]:
    """Whole waves against the better of both peers."""
    from transformers import MimiModel

    ours.save_pretrained(folder / "hf", "hf")
    other, codes = MimiModel.from_pretrained(folder / "hf").eval(), ours.encode(wave, codebooks=CODEBOOKS)
    calls = {"encode": (lambda: ours.encode(wave, codebooks=CODEBOOKS), lambda: official.encode(wave),
                        lambda: other.encode(wave, num_quantizers=CODEBOOKS)),
             "decode": (lambda: ours.decode(codes), lambda: official.decode(codes), lambda: other.decode(codes))}
    cases = []
    for name, (mine, *peers) in calls.items():
        best = min((interleave(mine, peer, repeats) for peer in peers), key=lambda timing: timing.ratio)
        cases.append(Case.timed(f"{name} {SECONDS} s at once, 2 threads", best, at_least=1.3))
    return cases
