"""Attention written down plainly: the oracle of every test, in any dtype up to float64. Keeps all T x S scores."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.kernels.problem import Problem
from mm.positions import rope as rotary


def reference(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """q (B, H, T, E), k (B, K, S, E), v (B, K, S, F) -> (B, H, T, F). A row that sees nothing gives 0."""
    if problem.q_rope is not None:
        q = rotary.apply(q, problem.q_rope)
    if problem.k_rope is not None:
        k = rotary.apply(k, problem.k_rope)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * problem.scale
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.bias is not None:
        scores = scores + problem.bias(problem.q_at, problem.k_at)
    seen = problem.visible().unsqueeze(1)
    scores = scores.masked_fill(~seen, -torch.inf)
    if problem.sinks is not None:
        scores = torch.cat([scores, problem.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)[..., : k.shape[2]]
    weights = torch.nn.functional.dropout(weights, problem.dropout) if problem.dropout else weights
    return weights @ v
