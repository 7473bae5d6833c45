"""Language models as data: what stands before and after a stack."""

from __future__ import annotations

from typing import Literal

from mm.spec.norms import LayerNorm, Norm
from mm.spec.schema import require, require_rates, spec
from mm.spec.stack import Layer, Stack


@spec
class LearnedTable:
    """One learned vector per position; `start` rows come before position 0 (RoBERTa and BART: 2)."""

    rows: int
    start: int = 0


@spec
class Embed:
    """Token ids to vectors: the table's row times `scale` (Gemma: sqrt(D), rounded to the weights' dtype), plus the
    position's, plus that of the token's type, then `norm`."""

    vocab: int
    scale: float = 1.0
    positions: LearnedTable | None = None
    types: int = 0
    norm: Norm | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.vocab > 0, "Embed.vocab must be positive")
        require_rates(self, "dropout")


@spec
class Transform:
    """BERT's step before the vocabulary: a square projection, an activation, a norm."""

    act: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    norm: Norm = LayerNorm()
    bias: bool = True


@spec
class LMHead:
    """Hidden states to logits: by the embedding table itself where `tied`, times `scale` (T5: D ** -0.5), softly capped
    at `softcap` (Gemma 2)."""

    tied: bool = True
    bias: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    transform: Transform | None = None


@spec
class DecoderSpec:
    """A language model that reads from left to right. `context` is the number of positions it was made for; `ahead` are
    the layers that predict further tokens (DeepSeek-V3's multi-token prediction), one per step."""

    embed: Embed
    stack: Stack
    context: int
    head: LMHead = LMHead()
    ahead: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        require(self.context > 0, "DecoderSpec.context must be positive")
