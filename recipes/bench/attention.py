"""`mm bench attention`: the Triton kernels against PyTorch's attention on a GPU, or what they compile to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from mm.errors import InputError
from mm.kernels.options import AttentionOptions
from mm.spec import CAUSAL, Buckets, Rope, Window

from .attention_check import DROPPED, LONG, TOLERANCE, checks
from .attention_compile import MATRIX, in_processes, try_compiling
from .attention_compile import measure as compiled
from .attention_peers import flex, masked, plain, rotated_first
from .attention_time import (
    CAPTURED,
    EAGER,
    Measured,
    Peer,
    Run,
    alike,
    attempt,
    captured,
    compare,
    forward,
    milliseconds,
    timed,
    versus,
)
from .attention_workloads import CHECKED, Workload, weights
from .report import Bench, Case, report

CAUSALLY = dict(window=CAUSAL)
# TFLOP/s to reach on one H200, None where only told: forward, backward, and forward where warps specialise
PLAIN = {"head 128, full, 8192 tokens": (Workload(), 480, 300, 560),
         "head 128, causal, 8192 tokens": (Workload(**CAUSALLY), 430, None, None),
         "head 64, full, 8192 tokens": (Workload(heads=32, kv=32, width=64), 400, None, None)}
LONGER = dict(batch=1, kv=4, length=16384)
# how many times faster than SDPA with a mask and than FlexAttention
BEYOND = {"window 1024 in 16384, GQA 4:1": (Workload(**LONGER, window=Window(left=1023, right=0)), 2.0, 1.2),
          "packed documents of 512 in 16384, GQA 4:1": (Workload(**LONGER, tokens="documents", **CAUSALLY), 3.0, 1.1),
          "softcap, causal, 8192 tokens": (Workload(softcap=30.0, **CAUSALLY), None, 1.5),
          "learned sinks, causal, 8192 tokens": (Workload(sinks=True, **CAUSALLY), None, 1.5),
          "T5 bias, 8192 tokens": (Workload(bias=Buckets()), None, 1.5)}
# how many times faster than RoPE, then SDPA
ROTATED = {"ViT-B/16, 256 x 197 tokens": (Workload(batch=256, heads=12, kv=12, length=197, width=64, rope=Rope()), 1.2),
           **{f"depth transformer, 512 x {length} tokens": (
               Workload(batch=512, length=length, width=64, rope=Rope(), **CAUSALLY), 2.0) for length in (8, 32)}}
CACHES = 2**29  # bytes
DECODED = {f"decode, batch {batch}, context {context}, GQA 8:1": Workload(
    batch=batch, heads=32, kv=4, length=1, keys=context, tokens="ring", **CAUSALLY)
    for batch in (1, 8, 64) for context in (4096, 32768, 131072)}


@dataclass(frozen=True, kw_only=True)
class Attention(Bench):
    """The Triton kernels against PyTorch's attention on a GPU, or what they compile to.

    Args:
        suite: full: checks, then times on a GPU; compile: registers and spills, on any machine.
        arch: compute capability to compile for: 80, 90, 100.
    """

    suite: Literal["full", "compile"] = "full"
    arch: int = 90

    def run(self) -> int:
        return attention(self)


def attention(args: Attention) -> int:
    if args.suite == "compile":
        return report("attention", compiled(args.arch), packages=("torch", "triton"), json_file=args.json)
    if not torch.cuda.is_available():
        raise InputError("mm bench attention --suite full times kernels on a CUDA GPU, and this machine has none "
                         "(--suite compile needs none)")
    return report("attention", full(torch.device("cuda")), packages=("torch", "triton"), json_file=args.json)


def full(device: torch.device) -> list[Case]:
    """Checks, then timings, each told as it comes. What fails is a line of its own; an interruption, or a GPU that is
    lost, ends the list and not the report."""
    torch.manual_seed(0)
    cases: list[Case] = []
    try:
        compiled_ahead(device)
        for case in chain(checks(device), measure(device)):
            cases.append(case)
            print(" ", in_words(case), file=sys.stderr, flush=True)
    except (Exception, KeyboardInterrupt) as error:
        cases.append(Case(case="all that follows", ours=None, unit="", note=f"{type(error).__name__}: {error}"))
    return cases


def in_words(case: Case) -> str:
    numbers = {"": case.ours, ", peer": case.peer, ", ratio": case.ratio}
    told = "".join(f"{what} {number:.4g}" for what, number in numbers.items() if number is not None)
    return f"{case.case}:{told} ({case.unit}){'' if case.note is None else f' {case.note}'}"


def compiled_ahead(device: torch.device) -> None:
    """All kernels at once on all cores; one by one it would take ten minutes."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if 10 * major + minor in MATRIX:
        print("compiling", file=sys.stderr)
        attempt(lambda: in_processes(try_compiling, [(*asked, 10 * major + minor) for asked in everything()]))


def everything() -> Iterator[tuple[Workload, torch.dtype]]:
    for dtype in TOLERANCE:
        yield from ((workload, dtype) for workload in CHECKED.values())
    yield DROPPED, torch.float32
    asked = [*(given[0] for given in (*PLAIN.values(), *BEYOND.values(), *ROTATED.values())), LONG, *DECODED.values()]
    yield from ((workload, torch.bfloat16) for workload in asked)


def measure(device: torch.device) -> Iterator[Case]:
    found, failure = attempt(lambda: (matmul_ceiling(device), copy_bandwidth(device)))
    ceiling, bandwidth = found or (None, None)
    yield Case(case="bf16 matrix product", ours=ceiling, unit="TFLOP/s", note=failure)
    yield Case(case="copy in memory", ours=bandwidth, unit="TB/s", note=failure)
    for name, (workload, *floors) in PLAIN.items():
        yield from plain_run(name, workload, floors, ceiling, device)
    for name, (workload, over_mask, over_flex) in BEYOND.items():
        q, k, v, options, mine = made(workload, device)
        peers = {} if over_mask is None else {"SDPA with a mask": Peer(partial(masked, q, k, v, options), over_mask)}
        peers["FlexAttention"] = Peer(partial(flex, q, k, v, options), over_flex)
        leaves = [q, k, v, *weights(options)]
        yield from compare(name, mine, timed(mine, leaves), peers, leaves)
    for name, (workload, at_least) in ROTATED.items():
        q, k, v, options, mine = made(workload, device)
        for passes, asked in ((EAGER, None), (CAPTURED, at_least)):
            peer = {"RoPE, then SDPA": Peer(partial(rotated_first, q, k, v, options), asked)}
            yield from compare(f"rotation and attention, {name}", mine, timed(mine, [q, k, v], passes), peer, [q, k, v],
                               passes)
    for name, workload in DECODED.items():
        yield decoded(name, workload, bandwidth, device)


def made(workload: Workload, device: torch.device) -> tuple[Any, ...]:
    """q, k, v, the options, and our call."""
    from mm.kernels.operator import by_kernel

    qkv, options = workload.tensors(device, torch.bfloat16), workload.options(device)
    return *qkv, options, partial(by_kernel, *qkv, options)


def plain_run(name: str, workload: Workload, floors: list[float | None], ceiling: float | None,
              device: torch.device) -> Iterator[Case]:
    """TFLOP/s, on Hopper also of the kernel whose warps specialise, and the vendors' kernels."""
    q, k, v, options, mine = made(workload, device)
    flops = 4 * q.numel() * workload.length / (2 if workload.window == CAUSAL else 1)
    own = timed(mine, [q, k, v])
    yield from speed(f"{name}, forward", own["forward"], flops, floors[0], ceiling)
    yield from speed(f"{name}, backward", own["backward"], 2.5 * flops, floors[1], ceiling)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0):
        case = f"{name}, forward where warps specialise"
        special = attempt(lambda: forward(alike(mine, lambda: by_hopper(q, k, v, options)), []))
        yield from speed(case, special, flops, floors[2], ceiling)
        yield versus(f"{case}, against the portable kernel", special, own["forward"])
    yield from compare(name, mine, own, plain(q, k, v, options), [q, k, v])


def speed(name: str, measured: Measured, flops: float, floor: float | None, ceiling: float | None) -> Iterator[Case]:
    """TFLOP/s, and their share of a matrix product's."""
    spent, failure = measured
    reached = spent and flops / spent / 1e9
    yield Case(case=name, ours=reached, peer=floor, unit="TFLOP/s", at_least=floor and 1.0,
               ratio=floor and reached and reached / floor, note=failure)
    yield Case(case=f"{name}, share of a matrix product's", ours=reached and ceiling and reached / ceiling, unit="",
               note=failure or (None if ceiling else "no matrix product was measured"))


def by_hopper(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Run:
    """The forward pass by `forward_hopper`, which nothing else chooses before it is measured."""
    from mm.kernels.operator import kernel_args
    from mm.kernels.triton_launch import by_token
    from mm.kernels.triton_plan import KernelArgs

    from .attention_hopper import forward_on_hopper

    def run() -> Tensor:
        call, out = KernelArgs(*kernel_args(q, k, v, options)), by_token(q, v.shape[3])
        forward_on_hopper(call, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out
    return run


def decoded(name: str, workload: Workload, bandwidth: float | None, device: torch.device) -> Case:
    """The share of the memory bandwidth at which keys and values are read, in a CUDA graph as decoding runs; over as
    many caches in turn as no on-chip memory holds."""
    read = 2 * 2 * workload.batch * workload.kv * workload.keys * workload.width  # bytes

    def run() -> float:
        calls = [made(workload, device)[-1] for _ in range(-(-CACHES // read))]
        return captured(lambda: [call() for call in calls]) / len(calls)
    with torch.no_grad():
        spent, failure = attempt(run)
    share = spent and bandwidth and read / spent / 1e9 / bandwidth
    return Case(case=f"{name}, share of the bandwidth", ours=share, peer=1.0, ratio=share and share / 0.8, at_least=1.0,
                unit="", note=failure)


def matmul_ceiling(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s."""
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / milliseconds(lambda: x @ x) / 1e9


def copy_bandwidth(device: torch.device, count: int = 2**30) -> float:
    """TB/s."""
    x = torch.empty(count, device=device, dtype=torch.int8)
    y = torch.empty_like(x)
    return 2 * count / milliseconds(lambda: y.copy_(x)) / 1e9
