"""`mm::attention`: the Triton kernels as one operator with autograd, shapes for meta tensors and `torch.compile`.

Importing this file imports Triton; a CPU machine never does.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mm.errors import InputError
from mm.kernels import triton_launch as launch
from mm.kernels.options import FEW, SHORT, AttentionOptions, unsupported
from mm.kernels.triton_plan import KernelArgs
from mm.positions import rope as rotary
from mm.positions.absolute import ByOffset
from mm.positions.rope import Rotation

GIVEN = ", ".join(f"{field.type.replace(' | None', '?')} {field.name}" for field in fields(KernelArgs))  # a schema
TENSORS = GIVEN.count("Tensor")


@torch.library.custom_op("mm::attention", mutates_args=(), schema=f"({GIVEN}) -> (Tensor, Tensor)")
def attention(*given: Any) -> tuple[Tensor, Tensor]:
    """Fields of `KernelArgs` -> out (B, H, T, F) and, for the backward pass, the log2 of each row's sum (B, H, T)."""
    with torch.cuda.device_of(given[0]):
        return launch.attention(KernelArgs(*given))


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return launch.by_token(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("mm::attention_backward", mutates_args=(),
                         schema=f"(Tensor grad, Tensor out, Tensor lse, {GIVEN}) -> ({', '.join(['Tensor'] * 5)})")
def attention_backward(grad: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, sinks and bias; the last two are empty where there are none."""
    with torch.cuda.device_of(grad):
        return launch.gradients(KernelArgs(*given), grad, out, lse)


@attention_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, ...]:
    args = KernelArgs(*given)
    weights = (args.sinks, None if args.buckets is None else args.bias)
    return (*(launch.by_token(x) for x in (args.q, args.k, args.v)),
            *(args.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in weights))


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


def by_kernel(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """Compute `attend` by the kernel. Raises InputError for what it does not support."""
    return Attention.apply(*kernel_args(q, k, v, options))


def kernel_args(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Any, ...]:
    """The fields of `KernelArgs` for a call of `attend`. Raises InputError for what the kernel does not support."""
    if (reason := unsupported(q, k, v, options)) is not None:
        raise InputError(f"attend: {reason}")
    q, q_rope = rotate_long(q, options.q_rope, k.shape[2])
    k, k_rope = rotate_long(k, options.k_rope, q.shape[2])
    bias = by_offset(options, q)
    regular = options.q_at.regular and options.k_at.regular and options.k_at.prefix is None
    rotations = [None if rotation is None else dense(getattr(rotation, name)) for rotation in (q_rope, k_rope)
                 for name in ("cos", "sin")]
    interleaved = any(rotation is not None and rotation.layout == "interleaved" for rotation in (q_rope, k_rope))
    seed = torch.randint(2**31 - 1, (1,), device=q.device) if options.dropout else None
    window = (-1 if far is None else far for far in (options.window.left, options.window.right, options.window.chunk))
    sinks = None if options.sinks is None else options.sinks.contiguous()
    tensors = (dense(q), dense(k), dense(v), sinks, bias.weight, bias.buckets, seed,
               *([None] * 5 if regular else token_facts(options)), *rotations)
    if (other := next((x.device for x in tensors if x is not None and x.device != q.device), None)) is not None:
        raise InputError(f"attend: all tensors must be on {q.device}, not on {other}")
    return (*tensors, interleaved, regular, *window, options.scale, options.softcap, options.dropout)


def dense(x: Tensor) -> Tensor:
    """x (B, H, T, E) as the kernels read it, a copy if need be: channels side by side, everything else that a tile
    holds at most 2**31 numbers apart. Heads may overlap; nothing is ever written to them."""
    if x.stride(3) == 1 and 128 * x.stride(2) + x.shape[1] * x.stride(1) < 2**31:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def by_offset(options: AttentionOptions, q: Tensor) -> ByOffset:
    """The bias in the form that the kernels compute. Raises InputError where it is made for other heads."""
    if options.bias is None:
        return ByOffset(None)
    bias = options.bias.by_offset(q.device)
    if bias.weight.shape[-1] != q.shape[1]:
        raise InputError(f"attend: a bias for {bias.weight.shape[-1]} heads does not fit {q.shape[1]} query heads")
    return bias


def rotate_long(x: Tensor, rotation: Rotation | None, others: int) -> tuple[Tensor, Rotation | None]:
    """Rotate before the kernel where its tiles would rotate the same tokens again and again (long runs), and where the
    rotation is learned, so that autograd gives its gradient. Returns x and the rotation that is left to the kernel."""
    if rotation is None or rotation.cos.requires_grad or max(x.shape[2], others) > SHORT and x.shape[2] > FEW:
        return (x if rotation is None else rotary.apply(x, rotation)), None
    return x, rotation


def token_facts(options: AttentionOptions) -> list[Tensor | None]:
    """Positions of queries and keys, documents where both sides have them, and the prefix: (B, T) or (B, S) each."""
    q_at, k_at = options.q_at, options.k_at
    documents = (q_at.document, k_at.document)
    documents = (None, None) if any(x is None for x in documents) else documents
    return [q_at.position, k_at.position, *documents, k_at.prefix]
