"""Which path a call of `attend` takes, and why."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from mm.kernels.problem import Problem
from mm.positions.visibility import all_visible
from mm.spec import CAUSAL

TRITON = find_spec("triton") is not None
SHORT = 1024  # tokens up to which keys are rotated again by every tile that reads them
FEW, MANY = 16, 512  # queries that are few, and keys that are many


def choose(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[str, str]:
    """(path, the reason), from structure alone: "kernel" is ours in Triton, "sdpa" PyTorch's, "tiled" is plain torch.

    The kernel does what SDPA cannot say, and what it does better; a long plain run is left to SDPA, whose
    vendor kernels are made for it."""
    everyone = all_visible(problem.q_at, problem.k_at, problem.window)
    causal = problem.aligned and problem.window == CAUSAL and problem.k_at.prefix is None
    lacking = lacks(problem, everyone or causal)
    unable = problem_with_kernel(q, k, v, problem)
    if unable is None:
        if lacking is not None:
            return "kernel", lacking
        if q.shape[2] <= FEW and k.shape[2] >= MANY:
            return "kernel", "few queries over many keys are split between programs"
        if problem.q_rope is not None and max(q.shape[2], k.shape[2]) <= SHORT:
            return "kernel", "a short run is rotated as it is loaded"
    if lacking is not None:
        return "tiled", f"{lacking}; {unable}"
    return ("sdpa", "every query sees every key") if everyone else ("sdpa causal", "one plain causal run")


def lacks(problem: Problem, plain: bool) -> str | None:
    """What SDPA cannot do of this."""
    if problem.softcap:
        return "SDPA has no softcap"
    if problem.sinks is not None:
        return "SDPA has no sinks"
    if problem.bias is not None:
        return "the bias is computed tile by tile"
    return None if plain else "visibility depends on positions, documents or a window"


def problem_with_kernel(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> str | None:
    """Why the kernel cannot take a call: None where it can."""
    if q.device.type != "cuda":
        return f"the kernel runs on CUDA, not on {q.device.type}"
    if torch.compiler.is_exporting():
        return "an exported program holds no kernels"
    if not TRITON:
        return "Triton is not installed"
    if torch.cuda.get_device_properties(q.device).major < 8:
        return "the GPU is older than Ampere"
    return unsupported(q, k, v, problem)


def unsupported(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> str | None:
    """What the kernel does not support in these tensors, whatever the machine."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernel takes float16, bfloat16 and float32, not {q.dtype}"
    for name, x in (("queries", q), ("keys", k), ("values", v)):
        if x.shape[-1] % 8 or not 16 <= x.shape[-1] <= 256:
            return f"the kernel takes heads of 16, 24, ... 256 channels, and {name} have {x.shape[-1]}"
    if problem.window.first:
        return "the kernel has no first positions that stay in sight"
    if 0 in (*q.shape, *k.shape):
        return "there is nothing to compute"
    if problem.bias is not None and not hasattr(problem.bias, "by_offset"):
        return "the kernel takes biases that are a function of distance"
    if problem.q_rope is not None and problem.k_rope is not None and (
            problem.q_rope.layout, problem.q_rope.cos.shape[3]) != (problem.k_rope.layout, problem.k_rope.cos.shape[3]):
        return "the kernel rotates as many channels of keys as of queries, in one layout"
    return None
