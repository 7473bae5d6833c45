"""`attend`: the one door of attention, and which of the paths behind it a call takes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.options import FEW, SHORT, AttentionOptions, ScoreOptions, check, unsupported
from mm.kernels.plain import tiled
from mm.positions import rope as rotary
from mm.positions.rope import Rotation
from mm.positions.visibility import At, all_visible
from mm.spec import CAUSAL, EVERYWHERE, Window

TRITON = find_spec("triton") is not None
MANY = 512  # keys over which few queries are split between programs


def attend(q: Tensor, k: Tensor, v: Tensor, *, q_at: At, k_at: At, window: Window = EVERYWHERE,
           q_rope: Rotation | None = None, k_rope: Rotation | None = None, **scores: Unpack[ScoreOptions]) -> Tensor:
    """Softmax attention: q (B, H, T, E), k (B, K, S, E), v (B, K, S, F) -> (B, H, T, F), H a multiple of K.

    q_at, k_at: where the tokens are; together with `window` they decide which query sees which key. q_rope, k_rope:
    rotations still to be applied (keys from a cache are rotated already). scores: see `ScoreOptions`. A query that sees
    no key gives 0. Tensors may have any strides, overlapping ones included. Raises InputError on shapes, dtypes or
    devices that do not fit; values are read only inside `with debug():`.
    """
    if scores.get("scale") is None:
        scores["scale"] = q.shape[-1] ** -0.5
    options = AttentionOptions(q_at, k_at, window, q_rope=q_rope, k_rope=k_rope, **scores)
    check(q, k, v, options)
    path, _ = choose(q, k, v, options)
    if path == "kernel":
        from mm.kernels.operator import by_kernel  # imports Triton

        return by_kernel(q, k, v, options)
    q = q if q_rope is None else rotary.apply(q, q_rope)
    k = k if k_rope is None else rotary.apply(k, k_rope)
    if path == "tiled":
        return tiled(q, k, v, options)
    return F.scaled_dot_product_attention(q, k, v, None, options.dropout, is_causal=path == "sdpa causal",
                                          scale=options.scale, enable_gqa=q.shape[1] != k.shape[1])


def explain(q: Tensor, k: Tensor, v: Tensor, *, q_at: At, k_at: At, window: Window = EVERYWHERE,
            q_rope: Rotation | None = None, k_rope: Rotation | None = None, **scores: Unpack[ScoreOptions]) -> str:
    """Name the path that `attend` takes with the same arguments, and the reason. Raises InputError as `attend` does."""
    options = AttentionOptions(q_at, k_at, window, q_rope=q_rope, k_rope=k_rope, **{"scale": 1.0, **scores})
    check(q, k, v, options)
    path, reason = choose(q, k, v, options)
    return f"{path}: {reason}"


def choose(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[str, str]:
    """Return (path, reason), from structure alone: "kernel" is ours in Triton, "sdpa" PyTorch's, "tiled" plain torch.

    The kernel takes what SDPA cannot express and what it does better; a long plain run is left to SDPA, whose vendor
    kernels are made for it."""
    everyone = all_visible(options.q_at, options.k_at, options.window)
    causal = options.aligned and options.window == CAUSAL and options.k_at.prefix is None
    lacking = missing_in_sdpa(options, everyone or causal)
    unable = problem_with_kernel(q, k, v, options)
    if unable is None:
        if lacking is not None:
            return "kernel", lacking
        if q.shape[2] <= FEW and k.shape[2] >= MANY:
            return "kernel", "few queries over many keys are split between programs"
        if options.q_rope is not None and max(q.shape[2], k.shape[2]) <= SHORT:
            return "kernel", "a short run is rotated as it is loaded"
    if lacking is not None:
        return "tiled", f"{lacking}; {unable}"
    return ("sdpa", "every query sees every key") if everyone else ("sdpa causal", "one plain causal run")


def missing_in_sdpa(options: AttentionOptions, plain: bool) -> str | None:
    """Name a feature of the call that SDPA lacks."""
    if options.softcap:
        return "SDPA has no softcap"
    if options.sinks is not None:
        return "SDPA has no sinks"
    if options.bias is not None:
        return "the bias is computed tile by tile"
    return None if plain else "visibility depends on positions, documents or a window"


def problem_with_kernel(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> str | None:
    """Say why the kernel cannot take a call on this machine; None where it can."""
    if q.device.type != "cuda":
        return f"the kernel runs on CUDA, not on {q.device.type}"
    if torch.compiler.is_exporting():
        return "an exported program holds no kernels"
    if not TRITON:
        return "Triton is not installed"
    if torch.cuda.get_device_properties(q.device).major < 8:
        return "the GPU is older than Ampere"
    return unsupported(q, k, v, options)
