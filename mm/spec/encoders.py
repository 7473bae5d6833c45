"""Text encoders as data."""

from __future__ import annotations

from typing import Literal

from mm.spec.language import Embed, LMHead
from mm.spec.schema import require, spec
from mm.spec.stack import Stack


@spec
class Dense:
    """A last linear layer of sentence vectors, from `inputs` to `outputs`."""

    inputs: int
    outputs: int
    bias: bool = True
    act: Literal["none", "tanh"] = "none"


@spec
class SentencePooling:
    """Hidden states to one vector a text: the mean or maximum over its tokens or the first token, a projection,
    division by the length. A text is cut after `length` tokens (None: the context)."""

    over: Literal["mean", "cls", "max"] = "mean"
    projection: Dense | None = None
    normalise: bool = False
    length: int | None = None

    def __post_init__(self) -> None:
        require(self.length is None or self.length > 0, "SentencePooling.length must be positive")


@spec
class EncoderSpec:
    """A model that reads a text from both sides. `head` scores masked tokens, `pooling` makes one vector a text."""

    embed: Embed
    stack: Stack
    context: int
    head: LMHead | None = None
    pooling: SentencePooling | None = None

    def __post_init__(self) -> None:
        require(self.context > 0, "EncoderSpec.context must be positive")
        projection = self.pooling and self.pooling.projection
        require(not projection or projection.inputs == self.stack.dim,
                "SentencePooling.projection.inputs must be the width of the stack")
