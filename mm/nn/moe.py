"""Mixtures of experts: a router that chooses a few of many MLPs for every token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec
from mm.nn.grouped import StackedLinear
from mm.nn.linear import add
from mm.nn.mlp import Mlp, activated


class Route(NamedTuple):
    """Where N tokens go: the router's logits (N, X) over all experts, the experts that were chosen (N, K), best first,
    and their weights (N, K), which carry the gradient."""

    logits: Tensor
    chosen: Tensor
    weights: Tensor


class Router(nn.Module):
    """x: (N, D) -> Route. Logits and scores are taken at least in float32, under autocast too."""

    float32 = ("correction",)  # in a checkpoint of any dtype: its steps are finer than those of bfloat16

    def __init__(self, dim: int, settings: spec.Moe):
        super().__init__()
        self.settings, self.count = settings.router, settings.chosen
        self.weight = nn.Parameter(torch.empty(settings.experts, dim))
        self.bias = nn.Parameter(torch.empty(settings.experts)) if settings.router.bias else None
        new = torch.zeros(settings.experts, dtype=torch.float32)
        self.register_buffer("correction", new if settings.router.correction else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        for rest in (self.bias, self.correction):
            if rest is not None:
                nn.init.zeros_(rest)

    def forward(self, x: Tensor) -> Route:
        logits = self.logits(x)
        match self.settings.score:
            case "softmax":
                scores = logits.softmax(-1)
            case "sigmoid":
                scores = logits.sigmoid()
            case "softmax_chosen":
                scores = logits
        chosen = self.merit(logits.detach(), scores.detach()).topk(self.count, -1).indices
        weights = scores.gather(-1, chosen)
        if self.settings.score == "softmax_chosen":
            weights = weights.softmax(-1)
        if self.settings.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Route(logits, chosen, weights * self.settings.scale)

    def logits(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))

    def merit(self, logits: Tensor, scores: Tensor) -> Tensor:
        """(N, X): what the choice goes by. Logits, which a saturated score cannot tie; scores where they are corrected
        or only the best groups are open."""
        groups = self.settings.groups
        if groups is None and self.correction is None:
            return logits
        merit = scores if self.correction is None else scores + self.correction
        if groups is None:
            return merit
        members = merit.unflatten(-1, (groups.count, -1))
        worth = members.amax(-1) if groups.by == "max" else members.topk(2, -1).values.sum(-1)
        open_ = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(groups.chosen, -1).indices, True)
        shut = 0.0 if groups.by == "max" else float("-inf")
        return members.masked_fill(~open_.unsqueeze(-1), shut).flatten(-2)


class Experts(nn.Module):
    """x: (M, D) sorted by expert -> (M, D), each row through its own expert."""

    def __init__(self, dim: int, count: int, settings: spec.Mlp):
        super().__init__()
        self.settings, hidden = settings, settings.hidden
        self.up = StackedLinear(count, dim, hidden, settings.up_bias)
        self.gate = StackedLinear(count, dim, hidden, settings.up_bias) if settings.gated else None
        self.down = StackedLinear(count, hidden, dim, settings.down_bias)

    def forward(self, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """expert (M,): that of each row; ends (X,) int32: where each expert's rows stop."""
        gate = None if self.gate is None else self.gate(x, expert, ends)
        hidden = activated(self.settings, self.up(x, expert, ends), gate)
        return self.down(F.dropout(hidden, self.settings.dropout, self.training), expert, ends)


class Moe(nn.Module):
    """x: (..., D) -> (..., D). Rows are sorted by expert and every expert sees its own at once; those that nobody
    chose do not run. A token's result does not depend on its neighbours: no expert has a capacity."""

    def __init__(self, dim: int, settings: spec.Moe):
        super().__init__()
        self.settings = settings
        self.router = Router(dim, settings)
        self.experts = Experts(dim, settings.experts, settings.expert)
        self.shared = Mlp(dim, settings.shared) if settings.shared else None

    def forward(self, x: Tensor, routes: list[Route] | None = None) -> Tensor:
        """routes: a list that gets the route of this pass."""
        flat = x.reshape(-1, x.shape[-1])
        route = self.router(flat)
        if routes is not None:
            routes.append(route)
        mixed = self.mix(flat, route).view(x.shape)
        return mixed if self.shared is None else add(self.shared(x), mixed)

    def mix(self, x: Tensor, route: Route) -> Tensor:
        """x (N, D) -> the weighted sum (N, D) of the chosen experts."""
        by_input, count = self.settings.weigh == "input", self.settings.chosen
        expert, order = route.chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(self.settings.experts, device=x.device), right=True,
                                  out_int32=True)
        rows, weights = x[order // count], route.weights.to(x.dtype)
        out = self.experts(rows * weights.flatten()[order, None] if by_input else rows, expert, ends)
        out = out[order.argsort()].unflatten(0, (-1, count))
        return (out if by_input else out * weights.unsqueeze(-1).to(out.dtype)).sum(1)


def build_mlp(dim: int, settings: spec.Mlp | spec.Moe) -> Mlp | Moe:
    return {spec.Mlp: Mlp, spec.Moe: Moe}[type(settings)](dim, settings)
