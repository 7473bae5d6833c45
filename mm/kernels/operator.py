"""`mm::attention`: the Triton kernels as one operator with autograd, shapes for meta tensors and `torch.compile`.

Importing this file imports Triton; a CPU machine never does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm import rope as rotary
from mm.errors import InputError
from mm.kernels import triton_launch as run
from mm.kernels.choice import FEW, SHORT, unsupported
from mm.kernels.problem import ByOffset, Problem
from mm.kernels.triton_launch import Call
from mm.rope import Turn

TENSORS = 16  # of the arguments
GIVEN = ", ".join([
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor? buckets, Tensor? seed",
    "Tensor? q_position, Tensor? k_position, Tensor? q_document, Tensor? k_document, Tensor? prefix",
    "Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin, bool interleaved, bool regular",
    "int left, int right, int chunk, float scale, float softcap, float dropout"])  # the fields of `Call`


@torch.library.custom_op("mm::attention", mutates_args=(), schema=f"({GIVEN}) -> (Tensor, Tensor)")
def attention(*given: Any) -> tuple[Tensor, Tensor]:
    """q (B, H, T, E), k (B, K, S, E), v (B, K, S, F) -> out (B, H, T, F) and, for the backward pass, (B, H, T) sums."""
    return run.attention(Call(*given))


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("mm::attention_backward", mutates_args=(),
                         schema=f"(Tensor grad, Tensor out, Tensor lse, {GIVEN}) -> ({', '.join(['Tensor'] * 5)})")
def attention_backward(grad: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, sinks and bias; the last two are empty where there are none."""
    return run.gradients(Call(*given), grad, out, lse)


@attention_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, ...]:
    call = Call(*given)
    some = (call.q, call.k, call.v, call.sinks, call.bias if call.buckets is not None else None)
    return tuple(call.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in some)


def remember(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:TENSORS])
    ctx.rest = inputs[TENSORS:]


def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    grads = attention_backward(grad if grad.stride(-1) == 1 else grad.contiguous(), out, lse, *tensors, *ctx.rest)
    given = [x is not None for x in tensors[:4]] + [tensors[5] is not None]
    return (*(x if there else None for x, there in zip(grads, given, strict=True)), *[None] * (len(tensors) - 5),
            *[None] * len(ctx.rest))


attention.register_autograd(backward, setup_context=remember)


def by_kernel(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """`attend` by the kernel. Raises InputError for what it does not support."""
    if (reason := unsupported(q, k, v, problem)) is not None:
        raise InputError(f"attend: {reason}")
    q, q_turn = before(q, problem.q_turn, k.shape[2])
    k, k_turn = before(k, problem.k_turn, q.shape[2])
    bias = ByOffset(None) if problem.bias is None else problem.bias.by_offset(q.device)
    regular = problem.q_at.regular and problem.k_at.regular and problem.k_at.prefix is None
    turns = [getattr(turn, name, None) for turn in (q_turn, k_turn) for name in ("cos", "sin")]
    interleaved = any(turn is not None and turn.layout == "interleaved" for turn in (q_turn, k_turn))
    seed = torch.randint(2**31 - 1, (1,), device=q.device) if problem.dropout else None
    sight = (-1 if far is None else far for far in (problem.sight.left, problem.sight.right, problem.sight.chunk))
    out, _ = attention(q, k, v, problem.sinks, bias.weight, bias.buckets, seed,
                       *([None] * 5 if regular else lines(problem)), *turns, interleaved, regular, *sight,
                       problem.scale, problem.softcap, problem.dropout)
    return out


def before(x: Tensor, turn: Turn | None, others: int) -> tuple[Tensor, Turn | None]:
    """Long runs are rotated once before the kernel, since each of its tiles would rotate them again; and rotations
    that are learned get their gradients from autograd."""
    if turn is None or turn.cos.requires_grad or max(x.shape[2], others) > SHORT and x.shape[2] > FEW:
        return (x if turn is None else rotary.apply(x, turn)), None
    return x, turn


def lines(problem: Problem) -> list[Tensor | None]:
    """Positions of queries and keys, documents where both sides have them, and the prefix."""
    q_at, k_at = problem.q_at, problem.k_at
    documents = (q_at.document, k_at.document)
    documents = (None, None) if any(x is None for x in documents) else documents
    return [q_at.position, k_at.position, *documents, k_at.prefix]
