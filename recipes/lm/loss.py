"""Next-token cross-entropy from hidden states and the vocabulary's weight, without the logits of a whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm.errors import InputError

from .objectives import NONE

if TYPE_CHECKING:
    from mm.text.decoder import TextDecoder
    from mm.text.encoder import TextEncoder

LOGITS = 1 << 22  # logits that are held at once


def decoder_loss(model: TextDecoder | TextEncoder, hidden: Tensor, targets: Tensor, z_loss: float = 0.0,
                 rows: int | None = None) -> tuple[Tensor, Tensor]:
    """hidden (..., D), after the model's final norm, and targets (...) -> what `vocabulary_loss` gives."""
    head = model.head
    weight = model.embed.tokens.weight if head.weight is None else head.weight
    return vocabulary_loss(head.ready(hidden), weight, targets, head.bias, softcap=head.settings.softcap, z_loss=z_loss,
                           rows=rows)


def vocabulary_loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *,
                    softcap: float = 0.0, z_loss: float = 0.0, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """hidden (..., D), weight (V, D), targets (...) -> (loss, cross-entropy without gradient), means over the targets
    other than -100 (0 where there are none), in float32 at least.

    `z_loss` times the mean square of log Z is added to the loss (PaLM, 2022). `rows` logits (rows, V) exist at a time.
    Targets outside the vocabulary are not looked for. Raises InputError on shapes that do not fit.
    """
    if targets.shape != hidden.shape[:-1] or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise InputError(f"targets {tuple(targets.shape)} or weight {tuple(weight.shape)} do not fit hidden states "
                         f"{tuple(hidden.shape)}")
    if torch.is_autocast_enabled(hidden.device.type):
        kind = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(kind), weight.to(kind)
    rows = rows or max(LOGITS // len(weight), 1)
    return VocabularyLoss.apply(hidden.flatten(0, -2), weight, bias, targets.flatten(), softcap, z_loss, rows)


class VocabularyLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float,
                z_loss: float, rows: int) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        kept = (targets != NONE).to(exact)
        share = kept / kept.sum().clamp(min=1)
        grads = [torch.zeros_like(x, dtype=exact) if x is not None and needed else None
                 for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)]
        sums = hidden.new_zeros(2, dtype=exact)
        with torch.autocast(hidden.device.type, enabled=False):
            for i in range(0, len(hidden), rows):
                cut = slice(i, i + rows)
                logits = scores(hidden[cut], weight, bias, softcap, exact)
                log_z, hit = logits.logsumexp(-1), targets[cut].clamp(min=0)[:, None]
                loss = log_z - logits.gather(1, hit)[:, 0]
                sums += torch.stack([(loss + z_loss * log_z.square()) @ share[cut], loss @ share[cut]])
                if any(grad is not None for grad in grads):
                    slope = slopes(logits, log_z, hit, share[cut], softcap, z_loss)
                    collect(grads, cut, hidden[cut], weight, slope.to(hidden.dtype))
        ctx.save_for_backward(*(None if grad is None else grad.to(x.dtype)
                                for grad, x in zip(grads, (hidden, weight, bias), strict=True)))
        ctx.mark_non_differentiable(entropy := sums[1].clone())
        return sums[0].clone(), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if grad is None else grad * slope.to(grad.dtype) for grad in ctx.saved_tensors), *[None] * 4


def scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, exact: torch.dtype) -> Tensor:
    """Logits (n, V) in `exact`."""
    logits = (hidden @ weight.T).to(exact)
    if bias is not None:
        logits += bias
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def slopes(logits: Tensor, log_z: Tensor, hit: Tensor, share: Tensor, softcap: float, z_loss: float) -> Tensor:
    """The gradient (n, V) of the logits before the cap; in the memory of `logits` where there is no cap."""
    steep = 1 - (logits / softcap).square() if softcap else None
    slope = logits.sub_(log_z[:, None]).exp_()
    slope *= (share * (1 + 2 * z_loss * log_z))[:, None]
    slope.scatter_add_(1, hit, -share[:, None])
    return slope if steep is None else slope.mul_(steep)


def collect(grads: list[Tensor | None], cut: slice, hidden: Tensor, weight: Tensor, slope: Tensor) -> None:
    """Adds what one chunk gives to the gradients of hidden, weight and bias."""
    if grads[0] is not None:
        grads[0][cut] = slope @ weight
    if grads[1] is not None and grads[1].dtype == slope.dtype:
        grads[1].addmm_(slope.T, hidden)
    elif grads[1] is not None:
        grads[1] += slope.T @ hidden
    if grads[2] is not None:
        grads[2] += slope.sum(0)
