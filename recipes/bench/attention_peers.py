"""Other people's attention for `mm bench attention`: each made into a call without arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from mm.kernels.options import AttentionOptions
from mm.positions import rope
from mm.positions.visibility import visible
from mm.spec import CAUSAL, EVERYWHERE

from .attention_time import Peer, Run

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def plain(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> dict[str, Peer]:
    """Of one plain run: SDPA as it chooses and by each fast kernel, FlexAttention, flash-attn where it is installed."""
    causal = options.window == CAUSAL
    given = {"SDPA": Peer(lambda: partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal))}
    for backend in BACKENDS:
        given[f"SDPA {backend.name.lower()}"] = Peer(lambda backend=backend: by_backend(backend, q, k, v, causal))
    given["FlexAttention"] = Peer(partial(flex, q, k, v, options))
    if find_spec("flash_attn") is not None:
        given["flash-attn"] = Peer(lambda: flash(q, k, v, causal))
    return given


def by_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Run:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return call


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Run:
    from flash_attn import flash_attn_func

    heads_last = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: flash_attn_func(*heads_last, causal=causal).transpose(1, 2)


def rotated_first(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Run:
    """RoPE, then SDPA."""
    causal, rotation = options.window == CAUSAL, options.q_rope
    return lambda: F.scaled_dot_product_attention(rope.apply(q, rotation), rope.apply(k, rotation), v, is_causal=causal)


def masked(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Run:
    """SDPA with a mask that is made beforehand and not timed. Heads that share keys get copies of them, since its fast
    kernels take no mask otherwise."""
    mask = visible(options.q_at, options.k_at, options.window).unsqueeze(1)
    shared = q.shape[1] // k.shape[1]

    def call() -> Tensor:
        keys, values = ((x.repeat_interleave(shared, 1) if shared > 1 else x) for x in (k, v))
        return F.scaled_dot_product_attention(q, keys, values, mask)
    return call


def flex(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Run:
    """FlexAttention compiled, for runs at 0..T-1 and packed documents, with a block mask made beforehand."""
    everyone = options.window == EVERYWHERE and options.q_at.document is None
    blocks = None if everyone else create_block_mask(seen(options), None, None, q.shape[2], k.shape[2], device=q.device)
    how = dict(score_mod=score(options), block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
    if options.sinks is None:
        run = compiled(flex_attention)
        return lambda: run(q, k, v, **how)
    run = compiled(with_sinks)
    return lambda: run(q, k, v, options.sinks, **how)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, **how: Any) -> Tensor:
    """Learned sinks by what FlexAttention tells of its sums: a sink shrinks a row by the share that it takes."""
    out, told = flex_attention(q, k, v, **how, return_aux=AuxRequest(lse=True))
    return out * torch.sigmoid(told.lse - sinks[:, None]).unsqueeze(-1).to(out.dtype)


def compiled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Anew: for the shapes of one workload alone, and with a backward pass that can run many times."""
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False
    return torch.compile(call, dynamic=False)


def seen(options: AttentionOptions) -> Callable[..., Tensor]:
    window, document = options.window, options.q_at.document
    document = None if document is None else document[0]

    def mask(batch: Any, head: Any, i: Any, j: Any) -> Tensor:
        near = i >= 0
        near = near if document is None else document[i] == document[j]
        near = near if window.right is None else near & (j <= i + window.right)
        return near if window.left is None else near & (j >= i - window.left)
    return mask


def score(options: AttentionOptions) -> Callable[..., Tensor] | None:
    softcap, bias = options.softcap, options.bias
    if softcap:
        return lambda s, batch, head, i, j: softcap * torch.tanh(s / softcap)
    if bias is None:
        return None
    reach, bucket, weight = bias.settings.distance, bias.by_offset(options.q_at.position.device).buckets, bias.weight

    def biased(s: Tensor, batch: Any, head: Any, i: Any, j: Any) -> Tensor:
        return s + weight[bucket[(j - i).clamp(-reach, reach) + reach], head]
    return biased
