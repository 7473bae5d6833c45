"""`attend`: the one door through which all attention goes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mm.kernels import values
from mm.kernels.choice import choose
from mm.kernels.problem import Bias, Problem, check
from mm.kernels.tiled import tiled
from mm.kernels.values import debug
from mm.positions import rope as rotary
from mm.positions.rope import Rotation
from mm.positions.visibility import At, Mask
from mm.spec import EVERYWHERE, Window

__all__ = ["attend", "debug", "explain"]


def attend(q: Tensor, k: Tensor, v: Tensor, *, q_at: At, k_at: At, window: Window = EVERYWHERE,
           q_rope: Rotation | None = None, k_rope: Rotation | None = None, bias: Bias | None = None,
           sinks: Tensor | None = None, softcap: float = 0.0, scale: float | None = None,
           dropout: float = 0.0, mask: Mask | None = None) -> Tensor:
    """Softmax attention: q (B, H, T, E), k (B, K, S, E), v (B, K, S, F) -> (B, H, T, F), H a multiple of K.

    q_at, k_at: where the tokens are; with `window` they decide who sees whom. q_rope, k_rope: rotations still
    to be applied (keys from a cache come rotated). bias: called per tile, added to the scores after the softcap.
    mask: `Mask.of(visible(q_at, k_at, window))`, where the caller has it already. sinks: (H,) logits that take
    weight and give nothing. A query that sees nothing gives 0. Tensors may have any strides, overlapping ones included.
    Raises InputError on shapes, dtypes or devices that do not fit; values are looked at only inside `with debug():`.
    """
    problem = Problem(q_at, k_at, window, q.shape[-1] ** -0.5 if scale is None else scale, q_rope, k_rope, bias, sinks,
                      softcap, dropout, mask)
    check(q, k, v, problem)
    if values.wanted:
        values.check_values(q_at, k_at)
    path, _ = choose(q, k, v, problem)
    if path == "kernel":
        from mm.kernels.operator import by_kernel  # imports Triton

        return by_kernel(q, k, v, problem)
    q = q if q_rope is None else rotary.apply(q, q_rope)
    k = k if k_rope is None else rotary.apply(k, k_rope)
    if path == "tiled":
        return tiled(q, k, v, problem)
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=path == "sdpa causal", scale=problem.scale,
                                          enable_gqa=q.shape[1] != k.shape[1])


def explain(q: Tensor, k: Tensor, v: Tensor, *, q_at: At, k_at: At, window: Window = EVERYWHERE,
            q_rope: Rotation | None = None, k_rope: Rotation | None = None, bias: Bias | None = None,
            sinks: Tensor | None = None, softcap: float = 0.0, dropout: float = 0.0) -> str:
    """Which path `attend` takes with these arguments, and why."""
    problem = Problem(q_at, k_at, window, 1.0, q_rope, k_rope, bias, sinks, softcap, dropout)
    check(q, k, v, problem)
    path, reason = choose(q, k, v, problem)
    return f"{path}: {reason}"
