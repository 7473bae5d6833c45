"""MLPs and mixtures of experts as data."""

from __future__ import annotations

from typing import Literal

from mm.spec.norms import Norm
from mm.spec.schema import require, require_rates, spec


@spec
class Clamp:
    """GPT-OSS's gated unit: the gate is at most `limit` and the other half within it, which then gets `shift`."""

    limit: float
    shift: float = 1.0


@spec
class Mlp:
    """`down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))`; `inner_norm` sits before `down` (EVA-02)."""

    hidden: int
    act: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"] = "gelu"
    gated: bool = False
    up_bias: bool = True
    down_bias: bool = True
    inner_norm: Norm | None = None
    clamp: Clamp | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.hidden > 0, "Mlp.hidden must be positive")
        require(self.clamp is None or self.gated, "Mlp.clamp is for gated units")
        require_rates(self, "dropout")


@spec
class Groups:
    """Experts in `count` equal groups, of which the best `chosen` may be used: a group is worth its best expert
    (`max`, DeepSeek-V2) or its two best together (`top2`, V3)."""

    count: int
    chosen: int
    by: Literal["max", "top2"] = "max"

    def __post_init__(self) -> None:
        require(0 < self.chosen <= self.count, f"Groups.chosen must be 1 to {self.count}, not {self.chosen}")


@spec
class Router:
    """Scores of the experts for a token. `softmax` over all, then the best; `softmax_chosen`: the best logits, then
    softmax over those (Mixtral, GPT-OSS); `sigmoid` per expert (DeepSeek-V3, Llama 4). `renormalise` makes the chosen
    weights add up to 1, `scale` multiplies them; `correction` is a bias, not trained by gradients, that
    counts for the choice only."""

    score: Literal["softmax", "softmax_chosen", "sigmoid"] = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: Groups | None = None


@spec
class Moe:
    """`chosen` of `experts` equal MLPs a token, weighted by the router, plus `shared` for every token. `weigh` says
    whether the weight multiplies an expert's output or its input (Llama 4)."""

    experts: int
    chosen: int
    expert: Mlp
    router: Router = Router()
    shared: Mlp | None = None
    weigh: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        require(0 < self.chosen <= self.experts, f"Moe.chosen must be 1 to {self.experts}, not {self.chosen}")
        require(self.expert.inner_norm is None, "experts have no inner_norm")
        groups = self.router.groups
        if groups is not None:
            size, rest = divmod(self.experts, groups.count)
            require(rest == 0 and size >= (2 if groups.by == "top2" else 1), "Moe.experts must fall into equal groups")
            require(groups.chosen * size >= self.chosen, f"{groups.chosen} groups have no {self.chosen} experts")
