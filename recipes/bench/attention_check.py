"""Before anything is timed: every feature of the attention kernel against the oracle, on the GPU that is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mm.kernels.plain import reference
from mm.spec import Window

from .attention_time import attempt
from .attention_workloads import CHECKED, Workload, weights
from .report import Case

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WHAT = ("output", "dq", "dk", "dv", "weights", "weights")
DROPPED = Workload(batch=1, heads=2, kv=2, length=40, keys=48, width=32, value_width=48, dropout=0.4)
REPEATED = replace(CHECKED["softcap and sinks"], length=1000)
LONG = Workload(batch=2, heads=40, kv=1, length=131072, width=256, window=Window(left=255, right=0))


def checks(device: torch.device) -> Iterator[Case]:
    """A line for each dtype with the largest error, and one for each feature that is off or fails."""
    for dtype, most in TOLERANCE.items():
        errors = []
        for name, workload in CHECKED.items():
            found, failure = attempt(lambda workload=workload, dtype=dtype: check(workload, device, dtype))
            what, error = ("", None) if found is None else found
            if failure is not None or not error <= most:
                yield line(f"{name}, {dtype} {what}", error, most, failure)
            else:
                errors.append(error)
        yield line(f"{len(errors)} of {len(CHECKED)} features, {dtype}, largest error", max(errors, default=None), most,
                   None if errors else "nothing was right")
    for name, run, most in (("dropout, replayed", dropped, TOLERANCE[torch.float32]),
                            ("gradients twice, difference", repeated, 1e-12),
                            ("the last of 2**31 numbers", addressed, TOLERANCE[torch.bfloat16])):
        error, failure = attempt(lambda run=run: run(device))
        yield line(name, error, most, failure)


def line(name: str, error: float | None, most: float, failure: str | None) -> Case:
    return Case(case=f"check: {name}", ours=error, peer=most, unit="of the largest number", note=failure, at_least=1.0,
                ratio=None if error is None else most / max(error, 1e-12))


def check(workload: Workload, device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    """What is furthest from the oracle, output or a gradient, and by how much."""
    from mm.kernels.operator import by_kernel

    qkv, options = workload.tensors(device, dtype), workload.options(device)
    ours, exact = by_kernel(*qkv, options), reference(*(x.double() for x in qkv), options)
    answers, upstream = [], torch.randn_like(ours)
    for y in (ours, exact):
        grads = torch.autograd.grad(y, [*qkv, *weights(options)], upstream.to(y.dtype)) if workload.trained else ()
        answers.append((y, *grads))
    return max(((what, far(*both)) for what, *both in zip(WHAT, *answers, strict=False)), key=lambda one: one[1])


def far(ours: Tensor, wanted: Tensor) -> float:
    """Relative to the largest number; infinite where something is not finite."""
    off = ((ours - wanted).abs().max() / wanted.abs().max()).item()
    return off if off == off else float("inf")


def dropped(device: torch.device) -> float:
    """Identity values turn the output into the weights, which tell the mask; the oracle then takes the same."""
    from mm.kernels.operator import by_kernel

    (q, k, v), options = DROPPED.tensors(device, torch.float32), DROPPED.options(device)

    def run(values: Tensor) -> Tensor:
        torch.manual_seed(0)
        return by_kernel(q, k, values, options)
    kept = run(torch.eye(48, device=device).expand(1, 2, 48, 48)) > 0
    share = kept.double().mean().item()
    if not 0.5 < share < 0.7:
        raise ValueError(f"dropout of 0.4 keeps {share:.2f} of the weights")
    exact = torch.softmax(q.double() @ k.double().mT * options.scale, -1) * kept / 0.6 @ v.double()
    ours = run(v)
    grads = (torch.autograd.grad(y, (q, k, v), torch.ones_like(y)) for y in (ours, exact))
    return max(far(ours, exact), *(far(a, b) for a, b in zip(*grads, strict=True)))


def repeated(device: torch.device) -> float:
    """Gradients of the same call twice: their difference should be 0."""
    from mm.kernels.operator import by_kernel

    qkv, options = REPEATED.tensors(device, torch.bfloat16), REPEATED.options(device)
    y = by_kernel(*qkv, options)
    first, second = (torch.autograd.grad(y, [*qkv, options.sinks], torch.ones_like(y), retain_graph=True)
                     for _ in range(2))
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def addressed(device: torch.device) -> float:
    """The last tokens of the last head, in tensors whose places 32 bits cannot count."""
    from mm.kernels.operator import by_kernel

    (q, k, v), options = LONG.tensors(device, torch.bfloat16), LONG.options(device)
    first, end = LONG.length - 8, LONG.length
    from_key = max(first - LONG.window.left, 0)
    with torch.no_grad():
        ours = by_kernel(q, k, v, options)[-1:, -1:, first:]
        seen = replace(options, q_at=options.q_at.rows(first, end), k_at=options.k_at.rows(from_key, end))
        return far(ours, reference(q[-1:, -1:, first:].double(), k[-1:, :, from_key:].double(),
                                   v[-1:, :, from_key:].double(), seen))
