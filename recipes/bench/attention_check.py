"""Before anything is timed: every feature of the attention kernel against the oracle, on the GPU that is timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mm import rope
from mm.errors import InputError
from mm.kernels.problem import Problem
from mm.kernels.reference import reference
from mm.positions import AlibiBias, BucketBias
from mm.spec import CAUSAL, EVERYWHERE, Alibi, Buckets, Rope, Sight
from mm.visibility import At, along, packed

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTH = 333


def check_all() -> None:
    """Raises InputError that names the first feature whose output or gradient is off."""
    for dtype in TOLERANCE:
        for name, shape, features in mixes(torch.device("cuda")):
            check(f"{name}, {dtype}", tensors(dtype, **shape), features)


def tensors(dtype: torch.dtype, batch: int = 2, heads: int = 4, kv: int = 2, length: int = LENGTH,
            keys: int | None = None, width: int = 64, value_width: int | None = None) -> list[Tensor]:
    keys = keys or length
    shapes = ((batch, heads, length, width), (batch, kv, keys, width), (batch, kv, keys, value_width or width))
    return [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]


def mixes(device: torch.device) -> Iterator[tuple[str, dict[str, int], dict[str, Any]]]:
    """(name, shape, what else the call gets)."""
    at = along(2, LENGTH, device=device)
    plain = dict(q_at=at, k_at=at)
    documents = packed(torch.arange(LENGTH, device=device).div(50, rounding_mode="floor").expand(2, -1))
    ragged = At(torch.where(torch.arange(LENGTH, device=device) < 200, at.position, -1))
    for sight in (EVERYWHERE, CAUSAL, Sight(left=40, right=0), Sight(left=70, right=30), Sight(right=0, chunk=100)):
        yield str(sight), {}, dict(plain, sight=sight)
    yield "documents", {}, dict(q_at=documents, k_at=documents, sight=CAUSAL)
    yield "ragged rows", {}, dict(q_at=ragged, k_at=ragged, sight=CAUSAL)
    yield "softcap and sinks", {}, dict(plain, sight=CAUSAL, softcap=5.0,
                                        sinks=torch.randn(4, device=device, requires_grad=True))
    yield "T5 bias", {}, dict(plain, bias=BucketBias(Buckets(), 4).to(device))
    yield "ALiBi", {}, dict(plain, sight=CAUSAL, bias=AlibiBias(Alibi(), 4))
    for layout in ("half", "interleaved"):
        turn = rope.turn(at.position, Rope(layout=layout, dim=32), 64)
        yield f"rotation, {layout}", {}, dict(plain, q_turn=turn, k_turn=turn)
    for width, value_width in ((32, 32), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)):
        yield f"heads {width}/{value_width}", dict(width=width, value_width=value_width), dict(plain, sight=CAUSAL)
    yield "groups of 7", dict(heads=14), dict(plain, sight=CAUSAL)
    slots = At(torch.randperm(3000, device=device).expand(2, -1))
    yield "decoding", dict(heads=16, length=1, keys=3000), dict(q_at=At(torch.full((2, 1), 2000, device=device)),
                                                               k_at=slots, sight=CAUSAL)


def check(name: str, qkv: list[Tensor], features: dict[str, Any]) -> None:
    from mm.kernels.operator import by_kernel

    problem = Problem(**{"sight": EVERYWHERE, "scale": qkv[0].shape[-1] ** -0.5, **features})
    weights = [x for x in (problem.sinks, getattr(problem.bias, "weight", None)) if x is not None]
    answers = []
    for y in (by_kernel(*qkv, problem), reference(*(x.double() for x in qkv), problem)):
        upstream = torch.ones_like(y) / y.shape[2]
        answers.append((y, *torch.autograd.grad(y, [*qkv, *weights], upstream)))
    for what, ours, wanted in zip(("output", "dq", "dk", "dv", "weights", "weights"), *answers, strict=False):
        off = ((ours - wanted).abs().max() / wanted.abs().max()).item()
        if not off <= TOLERANCE[qkv[0].dtype]:
            raise InputError(f"mm bench attention: {name}: {what} is {off:.1e} from the reference, so that a timing "
                             "would mean nothing")
