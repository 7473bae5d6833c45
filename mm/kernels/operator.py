"""`mm::attention`: the Triton kernels as one operator with autograd, shapes for meta tensors and `torch.compile`.

Importing this file imports Triton; a CPU machine never does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm.errors import InputError
from mm.kernels import triton_launch as run
from mm.kernels.choice import FEW, SHORT, unsupported
from mm.kernels.problem import Problem
from mm.kernels.triton_plan import Call
from mm.positions import rope as rotary
from mm.positions.absolute import ByOffset
from mm.positions.rope import Rotation

TENSORS = 16  # of the arguments
GIVEN = ", ".join([
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor? buckets, Tensor? seed",
    "Tensor? q_position, Tensor? k_position, Tensor? q_document, Tensor? k_document, Tensor? prefix",
    "Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin, bool interleaved, bool regular",
    "int left, int right, int chunk, float scale, float softcap, float dropout"])  # the fields of `Call`


@torch.library.custom_op("mm::attention", mutates_args=(), schema=f"({GIVEN}) -> (Tensor, Tensor)")
def attention(*given: Any) -> tuple[Tensor, Tensor]:
    """q (B, H, T, E), k (B, K, S, E), v (B, K, S, F) -> out (B, H, T, F) and, for the backward pass, (B, H, T) sums."""
    with torch.cuda.device_of(given[0]):
        return run.attention(Call(*given))


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return run.by_token(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("mm::attention_backward", mutates_args=(),
                         schema=f"(Tensor grad, Tensor out, Tensor lse, {GIVEN}) -> ({', '.join(['Tensor'] * 5)})")
def attention_backward(grad: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, sinks and bias; the last two are empty where there are none."""
    with torch.cuda.device_of(grad):
        return run.gradients(Call(*given), grad, out, lse)


@attention_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, ...]:
    call = Call(*given)
    weights = (call.sinks, None if call.buckets is None else call.bias)
    return (*(run.by_token(x) for x in (call.q, call.k, call.v)),
            *(call.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in weights))


class Attention(torch.autograd.Function):
    """`mm::attention` with its gradient. (`register_autograd` does the same, four times as slowly on the host.)"""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        out, lse = attention(*given)
        ctx.save_for_backward(out, lse, *given[:TENSORS])
        ctx.rest = given[TENSORS:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        grads = attention_backward(dense(grad), out, lse, *tensors, *ctx.rest)
        there = [x is not None for x in (*tensors[:4], tensors[5])]
        return (*(x if given else None for x, given in zip(grads, there, strict=True)),
                *[None] * (TENSORS - 5 + len(ctx.rest)))


def by_kernel(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """`attend` by the kernel. Raises InputError for what it does not support."""
    return Attention.apply(*arguments(q, k, v, problem))


def arguments(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Any, ...]:
    """Those of `mm::attention`."""
    if (reason := unsupported(q, k, v, problem)) is not None:
        raise InputError(f"attend: {reason}")
    q, q_rope = before(q, problem.q_rope, k.shape[2])
    k, k_rope = before(k, problem.k_rope, q.shape[2])
    bias = by_offset(problem, q)
    regular = problem.q_at.regular and problem.k_at.regular and problem.k_at.prefix is None
    rotations = [None if rotation is None else dense(getattr(rotation, name)) for rotation in (q_rope, k_rope)
             for name in ("cos", "sin")]
    interleaved = any(rotation is not None and rotation.layout == "interleaved" for rotation in (q_rope, k_rope))
    seed = torch.randint(2**31 - 1, (1,), device=q.device) if problem.dropout else None
    window = (-1 if far is None else far for far in (problem.window.left, problem.window.right, problem.window.chunk))
    sinks = None if problem.sinks is None else problem.sinks.contiguous()
    tensors = (dense(q), dense(k), dense(v), sinks, bias.weight, bias.buckets, seed,
               *([None] * 5 if regular else lines(problem)), *rotations)
    if (other := next((x.device for x in tensors if x is not None and x.device != q.device), None)) is not None:
        raise InputError(f"attend: all tensors must be on {q.device}, not on {other}")
    return (*tensors, interleaved, regular, *window, problem.scale, problem.softcap, problem.dropout)


def dense(x: Tensor) -> Tensor:
    """x (B, H, T, E) as the kernels read it, a copy if need be: channels side by side, all else that a tile holds at
    most 2**31 numbers apart. Heads may overlap; nothing is ever written to them."""
    if x.stride(3) == 1 and 128 * x.stride(2) + x.shape[1] * x.stride(1) < 2**31:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def by_offset(problem: Problem, q: Tensor) -> ByOffset:
    """The bias as the kernels compute it. Raises InputError where it is made for other heads."""
    if problem.bias is None:
        return ByOffset(None)
    bias = problem.bias.by_offset(q.device)
    if bias.weight.shape[-1] != q.shape[1]:
        raise InputError(f"attend: a bias for {bias.weight.shape[-1]} heads does not fit {q.shape[1]} query heads")
    return bias


def before(x: Tensor, rotation: Rotation | None, others: int) -> tuple[Tensor, Rotation | None]:
    """Long runs are rotated once before the kernel, since each of its tiles would rotate them again; and rotations
    that are learned get their gradients from autograd."""
    if rotation is None or rotation.cos.requires_grad or max(x.shape[2], others) > SHORT and x.shape[2] > FEW:
        return (x if rotation is None else rotary.apply(x, rotation)), None
    return x, rotation


def lines(problem: Problem) -> list[Tensor | None]:
    """Positions of queries and keys, documents where both sides have them, and the prefix."""
    q_at, k_at = problem.q_at, problem.k_at
    documents = (q_at.document, k_at.document)
    documents = (None, None) if any(x is None for x in documents) else documents
    return [q_at.position, k_at.position, *documents, k_at.prefix]
