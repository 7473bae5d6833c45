"""Norms as data."""

from __future__ import annotations

from typing import Literal

from mm.spec.schema import spec


@spec
class LayerNorm:
    eps: float = 1e-5
    bias: bool = True


@spec
class RMSNorm:
    """`order` says where the cast back to the input dtype happens: `cast_then_scale` (Llama, Qwen, Mistral),
    `scale_then_cast` (OLMo 2, GPT-OSS) or `one_plus` (Gemma: (1 + weight) in float32, then the cast)."""

    eps: float = 1e-6
    order: Literal["cast_then_scale", "scale_then_cast", "one_plus"] = "cast_then_scale"


@spec
class L2Norm:
    """Division by the root mean square, without weight (Llama 4's query and key norm)."""

    eps: float = 1e-6


Norm = LayerNorm | RMSNorm | L2Norm
