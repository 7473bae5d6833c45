"""Other people's attention for `mm bench attention`: each as a call without arguments, with the ratio asked of ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mm.positions import BucketBias
from mm.spec import Sight
from mm.visibility import At, visible

Peers = dict[str, tuple[Callable[[], Tensor], float | None]]


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Peers:
    """SDPA by each of its fast kernels."""
    def run(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return call
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    return {f"SDPA {backend.name.lower()}": (run(backend), None) for backend in backends}


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, at: At, sight: Sight) -> Callable[[], Tensor]:
    """The mask is made beforehand and not timed; a row that sees nothing sees itself."""
    mask = visible(at, at, sight) | torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    return lambda: F.scaled_dot_product_attention(q, k, v, mask.unsqueeze(1), enable_gqa=q.shape[1] != k.shape[1])


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Peers:
    """The flash-attn package, where it is installed."""
    if find_spec("flash_attn") is None:
        return {}
    from flash_attn import flash_attn_func

    heads_last = [x.transpose(1, 2) for x in (q, k, v)]
    return {"flash-attn": (lambda: flash_attn_func(*heads_last, causal=causal).transpose(1, 2), None)}


@cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor, at: At, sight: Sight, *, softcap: float = 0.0,
         bias: BucketBias | None = None) -> Callable[[], Tensor]:
    """FlexAttention compiled, with a block mask made beforehand for runs at 0..T-1 or packed documents."""
    from torch.nn.attention.flex_attention import create_block_mask

    index = torch.arange(q.shape[2], device=q.device)
    document = torch.zeros_like(index) if at.document is None else at.document[0]

    def seen(batch: Any, head: Any, i: Any, j: Any) -> Tensor:
        near = document[i] == document[j]
        near = near if sight.right is None else near & (j <= i + sight.right)
        return near if sight.left is None else near & (j >= i - sight.left)

    blocks = None if at.document is None and sight == Sight() else create_block_mask(
        seen, None, None, q.shape[2], k.shape[2], device=q.device)
    reach = 0 if bias is None else bias.settings.distance
    bucket = None if bias is None else bias.by_offset(q.device).buckets

    def score(s: Tensor, batch: Any, head: Any, i: Any, j: Any) -> Tensor:
        s = softcap * torch.tanh(s / softcap) if softcap else s
        return s if bias is None else s + bias.weight[bucket[(j - i).clamp(-reach, reach) + reach], head]

    return lambda: compiled_flex()(q, k, v, score_mod=score if softcap or bias is not None else None,
                                   block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
