"""`mm bench attention`: the Triton kernels against PyTorch's attention on a GPU, or what they compile to."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm import rope
from mm.errors import InputError
from mm.kernels.problem import Problem
from mm.positions import BucketBias
from mm.spec import CAUSAL, EVERYWHERE, Buckets, Rope, Sight
from mm.visibility import At, along, packed

from .attention_check import check_all
from .attention_compile import measure as compiled
from .attention_peers import flash, flex, masked_sdpa, sdpa
from .report import Case, Timing, report

Run = Callable[[], Tensor]
WINDOW = Sight(left=1023, right=0)
BATCHES, CONTEXTS = (1, 8, 64), (4096, 32768, 131072)


def attention(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mm bench attention", description=__doc__)
    parser.add_argument("--suite", choices=("full", "compile"), default="full",
                        help="full: checks, then times on a GPU; compile: registers and spills, on any machine")
    parser.add_argument("--arch", type=int, default=90, help="compute capability to compile for: 80, 90, 100")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    if args.suite == "compile":
        return report("attention", compiled(args.arch), packages=("torch", "triton"), json_file=args.json)
    if not torch.cuda.is_available():
        raise InputError("mm bench attention --suite full times kernels on a CUDA GPU, and this machine has none "
                         "(--suite compile needs none)")
    check_all()
    return report(f"attention on {torch.cuda.get_device_name()}", measure(), packages=("torch", "triton"),
                  json_file=args.json)


def measure() -> list[Case]:
    ceiling, bandwidth = matmul_ceiling(), copy_bandwidth()
    facts = [Case(case="bf16 matrix product", ours=ceiling, unit="TFLOP/s"),
             Case(case="copy in memory", ours=bandwidth, unit="TB/s")]
    return [*facts, *plain(ceiling), *beyond(), *rotated(), *decoding(bandwidth)]


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of many calls, caches flushed between them."""
    from triton.testing import do_bench

    return do_bench(run, warmup=50, rep=300, quantiles=[0.5])


def matmul_ceiling(size: int = 8192) -> float:
    x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / milliseconds(lambda: x @ x) / 1e9


def copy_bandwidth(count: int = 2**30) -> float:
    x = torch.empty(count, device="cuda", dtype=torch.int8)
    y = torch.empty_like(x)
    return 2 * count / milliseconds(lambda: y.copy_(x)) / 1e9


def tensors(batch: int, heads: int, kv: int, length: int, keys: int, width: int) -> list[Tensor]:
    shapes = ((batch, heads, length, width), (batch, kv, keys, width), (batch, kv, keys, width))
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def ours(q: Tensor, k: Tensor, v: Tensor, q_at: At, k_at: At, sight: Sight = EVERYWHERE, **more: Any) -> Tensor:
    from mm.kernels.operator import by_kernel

    return by_kernel(q, k, v, Problem(q_at, k_at, sight, q.shape[-1] ** -0.5, **more))


def both_ways(run: Run, leaves: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""
    with torch.no_grad():
        ahead = milliseconds(run)
    y = run()
    upstream = torch.randn_like(y)
    return ahead, milliseconds(lambda: torch.autograd.grad(y, leaves, upstream, retain_graph=True))


def compare(name: str, mine: Run, peers: dict[str, tuple[Run, float | None]], leaves: list[Tensor]) -> Iterator[Case]:
    """Both passes against each peer that can do it: (its call, how many times faster ours should be)."""
    own = both_ways(mine, leaves)
    for peer, (run, at_least) in peers.items():
        try:
            theirs = both_ways(run, leaves)
        except (RuntimeError, ValueError) as error:
            print(f"{name}: {peer} cannot: {str(error).splitlines()[0]}")
            continue
        for way, a, b in zip(("forward", "backward"), own, theirs, strict=True):
            yield Case.timed(f"{name}, {way}, against {peer}", Timing(ours=a / 1e3, peer=b / 1e3), at_least)


# ------------------------------------------------------------------------------------------------- the cases
def plain(ceiling: float) -> Iterator[Case]:
    """Full and causal runs of 8192 tokens: TFLOP/s, the share of a matrix product's, and the vendor kernels."""
    floors = {(128, EVERYWHERE): (480, 300), (128, CAUSAL): (430, None), (64, EVERYWHERE): (400, None)}  # TFLOP/s
    for (width, sight), asked in floors.items():
        heads = 2048 // width
        q, k, v = tensors(2, heads, heads, 8192, 8192, width)
        at = along(2, 8192, device=q.device)
        causal = sight == CAUSAL
        name = f"head {width}, {'causal' if causal else 'full'}, 8192 tokens"
        flops = 4 * q.numel() * 8192 / (2 if causal else 1)
        mine = partial(ours, q, k, v, at, at, sight)
        for way, spent, times, floor in zip(("forward", "backward"), both_ways(mine, [q, k, v]), (1.0, 2.5),
                                            asked, strict=True):
            reached = flops * times / spent / 1e9
            yield Case(case=f"{name}, {way}", ours=reached, peer=floor, unit="TFLOP/s", at_least=floor and 1.0,
                       ratio=floor and reached / floor)
            yield Case(case=f"{name}, {way}, share of a matrix product's", ours=reached / ceiling, unit="")
        yield from compare(name, mine, {**sdpa(q, k, v, causal), **flash(q, k, v, causal)}, [q, k, v])


def beyond() -> Iterator[Case]:
    """What SDPA does by a mask or not at all."""
    q, k, v = tensors(1, 16, 4, 16384, 16384, 128)
    at = along(1, 16384, device=q.device)
    yield from compare("window 1024 in 16384, GQA 4:1", partial(ours, q, k, v, at, at, WINDOW), {
        "SDPA with a mask": (masked_sdpa(q, k, v, at, WINDOW), 2.0),
        "FlexAttention": (flex(q, k, v, at, WINDOW), 1.2)}, [q, k, v])
    lengths = torch.randint(1, 1024, (64,))  # 512 on average
    documents = packed(torch.arange(64).repeat_interleave(lengths)[:16384].to(q.device)[None])
    documents = pad_to(documents, 16384)
    yield from compare("packed documents of 512 in 16384", partial(ours, q, k, v, documents, documents, CAUSAL), {
        "SDPA with a mask": (masked_sdpa(q, k, v, documents, CAUSAL), 3.0),
        "FlexAttention": (flex(q, k, v, documents, CAUSAL), 1.1)}, [q, k, v])
    q, k, v = tensors(2, 16, 16, 8192, 8192, 128)
    at = along(2, 8192, device=q.device)
    yield from compare("softcap, causal, 8192", partial(ours, q, k, v, at, at, CAUSAL, softcap=30.0), {
        "FlexAttention": (flex(q, k, v, at, CAUSAL, softcap=30.0), 1.5)}, [q, k, v])
    sinks = torch.randn(16, device=q.device, requires_grad=True)
    ahead, behind = both_ways(partial(ours, q, k, v, at, at, CAUSAL, sinks=sinks), [q, k, v, sinks])
    yield Case(case="learned sinks, causal, 8192, forward (nobody else trains them)", ours=ahead / 1e3, unit="s")
    yield Case(case="learned sinks, causal, 8192, backward (nobody else trains them)", ours=behind / 1e3, unit="s")
    bias = BucketBias(Buckets(), 16).cuda()
    leaves = [q, k, v, bias.weight]
    yield from compare("T5 bias, 8192", partial(ours, q, k, v, at, at, bias=bias), {
        "FlexAttention": (flex(q, k, v, at, EVERYWHERE, bias=bias), 1.5)}, leaves)


def pad_to(at: At, length: int) -> At:
    """Padding after the last document."""
    return packed(F.pad(at.document, (0, length - at.document.shape[1]), value=-1))


def rotated() -> Iterator[Case]:
    """Rotation and attention together against one after the other."""
    for name, batch, heads, length, at_least in (("ViT-B/16, 256 x 197 tokens", 256, 12, 197, 1.2),
                                                 ("depth transformer, 64 x 8 tokens", 64, 16, 8, 2.0),
                                                 ("depth transformer, 64 x 32 tokens", 64, 16, 32, 2.0)):
        q, k, v = tensors(batch, heads, heads, length, length, 64)
        at = along(batch, length, device=q.device)
        turn = rope.turn(at.position[:1], Rope(), 64)
        sight = EVERYWHERE if length == 197 else CAUSAL

        def apart(q: Tensor = q, k: Tensor = k, v: Tensor = v, turn: rope.Turn = turn, causal: bool = length != 197):
            return F.scaled_dot_product_attention(rope.apply(q, turn), rope.apply(k, turn), v, is_causal=causal)

        mine = partial(ours, q, k, v, at, at, sight, q_turn=turn, k_turn=turn)
        yield from compare(f"rotation and attention, {name}", mine, {"RoPE, then SDPA": (apart, at_least)}, [q, k, v])


def decoding(bandwidth: float) -> Iterator[Case]:
    """One new token over caches of many: the share of the memory bandwidth that reading keys and values reaches."""
    for batch in BATCHES:
        for context in CONTEXTS:
            if batch * context > 2**22:
                continue
            q, k, v = (x.detach() for x in tensors(batch, 32, 4, 1, context, 128))
            q_at = At(torch.full((batch, 1), context - 1, device=q.device))
            k_at = At(torch.arange(context, device=q.device).expand(batch, context))
            spent = milliseconds(partial(ours, q, k, v, q_at, k_at, CAUSAL))
            share = (k.nbytes + v.nbytes) / spent / 1e9 / bandwidth
            yield Case(case=f"decode, batch {batch}, context {context}, GQA 8:1, share of the bandwidth", ours=share,
                       peer=1.0, ratio=share / 0.8, at_least=1.0, unit="")
