"""`attend`: the one door through which all attention goes, and the only place where a path is chosen."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mm import rope as rotary
from mm.kernels.problem import Bias, Problem, check
from mm.kernels.tiled import tiled
from mm.rope import Turn
from mm.spec import CAUSAL, EVERYWHERE, Sight
from mm.visibility import At, Seen, all_visible

__all__ = ["attend", "explain"]


def attend(q: Tensor, k: Tensor, v: Tensor, *, q_at: At, k_at: At, sight: Sight = EVERYWHERE,
           q_turn: Turn | None = None, k_turn: Turn | None = None, bias: Bias | None = None,
           sinks: Tensor | None = None, softcap: float = 0.0, scale: float | None = None,
           dropout: float = 0.0, seen: Seen | None = None) -> Tensor:
    """Softmax attention: q (B, H, T, E), k (B, K, S, E), v (B, K, S, F) -> (B, H, T, F), H a multiple of K.

    q_at, k_at: where the tokens are; with `sight` they decide who sees whom. q_turn, k_turn: rotary embeddings still to
    be applied (keys from a cache come rotated). bias: called per tile, added to the scores after the softcap.
    seen: what `visible(q_at, k_at, sight)` gives, where the caller has it already. sinks: (H,) logits that take
    weight and give nothing. A query that sees nothing gives 0.
    Raises InputError on mismatched shapes.
    """
    problem = Problem(q_at, k_at, sight, q.shape[-1] ** -0.5 if scale is None else scale, q_turn, k_turn, bias, sinks,
                      softcap, dropout, seen)
    check(q, k, v, problem)
    q = q if q_turn is None else rotary.apply(q, q_turn)
    k = k if k_turn is None else rotary.apply(k, k_turn)
    path, _ = choose(problem)
    if path == "tiled":
        return tiled(q, k, v, problem)
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=path == "sdpa causal", scale=problem.scale,
                                          enable_gqa=q.shape[1] != k.shape[1])


def choose(problem: Problem) -> tuple[str, str]:
    """(path, the reason), from structure alone."""
    if problem.softcap:
        return "tiled", "SDPA has no softcap"
    if problem.sinks is not None:
        return "tiled", "SDPA has no sinks"
    if problem.bias is not None:
        return "tiled", "the bias is computed tile by tile"
    if all_visible(problem.q_at, problem.k_at, problem.sight):
        return "sdpa", "every query sees every key"
    if problem.aligned and problem.sight == CAUSAL and problem.k_at.prefix is None:
        return "sdpa causal", "one plain causal run"
    return "tiled", "visibility depends on positions, documents or a window"


def explain(*, q_at: At, k_at: At, sight: Sight = EVERYWHERE, bias: Bias | None = None, sinks: Tensor | None = None,
            softcap: float = 0.0) -> str:
    """Which path a call with these arguments takes, and why."""
    path, reason = choose(Problem(q_at, k_at, sight, 1.0, bias=bias, sinks=sinks, softcap=softcap))
    return f"{path}: {reason}"
