"""The loss of a duplex model: of its text and of the codes that it says, each a weighted mean, never those it hears."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.nn.linear import linear, outer
from mm.speech.conditions import Conditioned
from mm.speech.duplex import DuplexLM

from .data import DuplexBatch
from .settings import DuplexLoss

LOGITS = 1 << 20  # logits that are held at once


class Losses(NamedTuple):
    """text and audio: sums of weighted cross-entropies, and (2,) the sums of their weights; without gradient, entropy:
    of the text, a sum without weights over `words` targets, and right (own,) of `said` (own,) codes."""

    text: Tensor
    audio: Tensor
    weight: Tensor
    entropy: Tensor
    words: Tensor
    right: Tensor
    said: Tensor


def losses(model: DuplexLM, codes: Tensor, settings: DuplexLoss, documents: Tensor | None = None,
           conditions: Conditioned | None = None, deep: Tensor | None = None) -> Losses:
    """codes (B, 1 + Q, T), documents (B, T) of packed conversations. Tokens that are not there and those that stand
    before a stream's first do not count; the padding of the text counts less, the first codebook more. deep (N,): the
    frames of the batch, numbered row by row, whose codes count (none: all)."""
    frames, own = model.frames(codes, documents), model.spec.own
    hidden = model.hidden(frames.inputs, conditions, documents=documents).flatten(0, 1)
    tokens, known = (x.expand(len(codes), -1, -1)[:, :1 + own].transpose(0, 1).flatten(1)
                     for x in (frames.targets, frames.known))  # (1 + own, B * T)
    text, entropy, worth = of_text(model, hidden, tokens[0], known[0], settings)
    words = known[0].sum()
    if deep is not None:
        hidden, tokens, known = hidden[deep], tokens[:, deep], known[:, deep]
    audio, right, worths = of_codes(model, hidden, tokens, known[1:], settings)
    return Losses(text, audio, torch.stack([worth, worths]), entropy, words, right, known[1:].sum(1))


def some_frames(first: Tensor, settings: DuplexLoss, random: torch.Generator) -> Tensor | None:
    """first (B, T), the first codes that a model says -> (N,) frames whose codes are to count, numbered row by row;
    None where all do."""
    if settings.depth == 1:
        return None
    same = first[:, 2:].eq(first[:, 1:-1]) & first[:, 2:].eq(first[:, :-2])
    same = torch.nn.functional.pad(same, (first.shape[1] - same.shape[1], 0))
    odds = torch.where(same, settings.still, 1.0).flatten()
    waits = torch.empty(len(odds)).exponential_(generator=random)  # drawn are the shortest of waits / odds
    return (odds / waits.to(odds.device)).topk(math.ceil(settings.depth * len(odds))).indices


def of_text(model: DuplexLM, hidden: Tensor, tokens: Tensor, known: Tensor, settings: DuplexLoss
            ) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D) of frames, their text (N,) and where it is known -> sums of weighted cross-entropies, of entropies
    and of weights."""
    idle = (tokens == model.spec.text.padding) | (tokens == model.spec.text.word_end)
    worth = known * torch.where(idle, settings.text_padding, 1.0)
    loss, entropy, _ = score(hidden[None], model.head.weight[None], model.head.bias, tokens[None], worth[None],
                             known[None])
    return loss.sum(), entropy.sum(), worth.sum()


def of_codes(model: DuplexLM, hidden: Tensor, tokens: Tensor, known: Tensor, settings: DuplexLoss
             ) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D) of frames, their tokens (1 + own, N) and where the codes are known (own, N) -> the sum of weighted
    cross-entropies, how many codes are the likeliest (own,), and the sum of weights."""
    if model.depth is None:
        nothing = hidden.new_zeros((), dtype=torch.float32)
        return nothing, nothing.new_zeros(0), nothing
    share = torch.tensor([settings.first_codebook, *[1.0] * (len(known) - 1)], device=hidden.device)
    worth, head = known * share[:, None], model.depth.head
    made = model.depth.hidden(hidden[None], tokens[None]).squeeze(1)
    loss, _, right = score(made, head.weight, head.bias, tokens[1:], worth, known)
    return loss.sum(), right, worth.sum()


def losses_of(model: DuplexLM, batch: DuplexBatch, settings: DuplexLoss, deep: Tensor | None = None) -> Losses:
    """Of packed conversations, each with its own conditions."""
    return losses(model, batch.codes, settings, batch.documents, conditions_of(model, batch), deep)


def conditions_of(model: DuplexLM, batch: DuplexBatch) -> Conditioned | None:
    """What the conversations are told, as it is added to their frames (B, T, D)."""
    if model.conditions is None:
        return None
    documents, rows = batch.documents.unique(return_inverse=True)
    told = [batch.told.get(i, {}) for i in documents.tolist()]
    made = model.condition({name: [one.get(name) for one in told] for name in model.conditions.of}, len(told))
    return Conditioned(made.added[rows, 0])


def score(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, counts: Tensor, known: Tensor
          ) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (K, N, D), weight (K, V, D), bias (K or none, V), targets, counts and known (K, N) -> for each k, sums
    over n: of `counts` times the cross-entropy, of the entropy where `known`, and of the targets that are likeliest
    there; the last two without gradient. Few logits exist at a time."""
    if torch.is_autocast_enabled(hidden.device.type):
        kind = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(kind), weight.to(kind)
    return Scores.apply(hidden, weight, bias, targets.masked_fill(~known, 0), counts, known)


class Scores(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, counts: Tensor,
                known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exact, rows = torch.promote_types(hidden.dtype, torch.float32), max(LOGITS // weight.shape[1], 1)
        sums = hidden.new_zeros(3, len(hidden), dtype=exact)
        grads = [torch.zeros_like(x, dtype=exact) if x is not None and needed else None
                 for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)]
        biases = [None] * len(hidden) if bias is None else bias.expand(len(hidden), -1)
        with torch.autocast(hidden.device.type, enabled=False):
            for k, i in product(range(len(hidden)), range(0, hidden.shape[1], rows)):
                cut = k, slice(i, i + rows)
                logits = linear(hidden[cut], weight[k], biases[k]).to(exact)
                hit, share, there = targets[cut].unsqueeze(1), counts[cut].to(exact), known[cut].to(exact)
                found, top = logits.gather(1, hit)[:, 0], logits.amax(1)
                odds = logits.sub_(top.unsqueeze(1)).exp_()
                whole = odds.sum(1)
                loss = whole.log() + top - found
                sums[:, k] += torch.stack([(loss * share).sum(), (loss * there).sum(), ((found == top) * there).sum()])
                if any(grad is not None for grad in grads):
                    slope = odds.mul_((share / whole).unsqueeze(1)).scatter_add_(1, hit, -share.unsqueeze(1))
                    collect(grads, cut, hidden[cut], weight[k], slope.to(hidden.dtype))
        ctx.grads = [None if grad is None else grad.to(x.dtype)
                     for grad, x in zip(grads, (hidden, weight, bias), strict=True)]
        made = tuple(one.clone() for one in sums)
        ctx.mark_non_differentiable(*made[1:])
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, weight, bias), ctx.grads = ctx.grads, (None,) * 3  # scaled where they lie, and only once
        each = slope[:, None, None]
        for grad in (hidden, weight):
            if grad is not None:
                grad.mul_(each.to(grad.dtype))
        if bias is not None:
            bias.mul_((each[..., 0] if bias.ndim == 2 else slope).to(bias.dtype))
        return hidden, weight, bias, *[None] * 3


def collect(grads: list[Tensor | None], cut: tuple[int, slice], hidden: Tensor, weight: Tensor, slope: Tensor) -> None:
    """Adds what one chunk gives to the gradients of hidden, weight and bias."""
    if grads[0] is not None:
        grads[0][cut] = linear(slope, weight.t())
    if grads[1] is not None:
        grads[1][cut[0]] += outer(slope, hidden)
    if grads[2] is not None:
        (grads[2][cut[0]] if grads[2].ndim == 2 else grads[2]).add_(slope.sum(0))
