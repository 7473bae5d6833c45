"""How `mm bench attention` measures on a GPU, and what it makes of a call that fails: a line, never the end."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .report import Case, Timing

Run = Callable[[], Tensor]
ALIKE = 5e-2  # bfloat16 outputs differ by no more than this share of the largest number


class Lost(RuntimeError):
    """The GPU answers no more, so that whatever is measured next would fail too."""


@dataclass(frozen=True)
class Peer:
    """Somebody else's call, made (compiled, masked) by `make`, and how many times faster ours should be."""

    make: Callable[[], Run]
    at_least: float | None = None


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of many calls, caches flushed between them."""
    from triton.testing import do_bench

    return do_bench(run, warmup=50, rep=200, quantiles=[0.5])


def captured(run: Callable[[], Any]) -> float:
    """Milliseconds of a call inside a CUDA graph: without what Python and launches cost."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, rep=50, quantiles=[0.5])


def attempt(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what it gives, None), or (None, why it failed). Raises Lost."""
    try:
        return run(), None
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error) or 'no message').strip().splitlines()[0][:200]}"
    gc.collect()  # the traceback held tensors
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise Lost(reason) from None
        torch.cuda.empty_cache()
    return None, reason


def both_ways(run: Run, leaves: list[Tensor]) -> dict[str, float]:
    """Milliseconds of the forward and of the backward pass, as they are called one by one."""
    with torch.no_grad():
        ahead = milliseconds(run)
    y = run()
    upstream = torch.randn_like(y)
    return {"forward": ahead, "backward": milliseconds(lambda: torch.autograd.grad(y, leaves, upstream,
                                                                                   retain_graph=True))}


def forward_alone(run: Run, leaves: list[Tensor]) -> dict[str, float]:
    with torch.no_grad():
        return {"forward": milliseconds(run)}


def in_a_graph(run: Run, leaves: list[Tensor]) -> dict[str, float]:
    """Milliseconds of the forward pass and of both, inside a CUDA graph."""
    with torch.no_grad():
        ahead = captured(run)
        upstream = torch.randn_like(run())
    return {"forward in a graph": ahead,
            "forward and backward in a graph": captured(lambda: torch.autograd.grad(run(), leaves, upstream))}


def compare(name: str, mine: Run, peers: dict[str, Peer], leaves: list[Tensor],
            timed: Callable[[Run, list[Tensor]], dict[str, float]] = both_ways) -> Iterator[Case]:
    """Every pass against each peer that can do it."""
    print(f"  {name}", file=sys.stderr)
    own, failure = attempt(lambda: timed(mine, leaves))
    if failure is not None:
        yield Case(case=name, ours=None, unit="s", note=f"ours fails: {failure}")
        return
    for peer, given in peers.items():
        theirs, failure = attempt(lambda given=given: against(mine, given.make(), leaves, timed))
        for way, spent in own.items():
            case = f"{name}, {way}, against {peer}"
            if failure is None:
                yield Case.timed(case, Timing(ours=spent / 1e3, peer=theirs[way] / 1e3), given.at_least)
            else:
                yield Case(case=case, ours=spent / 1e3, unit="s", note=failure)


def against(mine: Run, run: Run, leaves: list[Tensor], timed: Callable[..., dict[str, float]]) -> dict[str, float]:
    """Timings of a peer that answers the same question. Raises ValueError if it answers another."""
    with torch.no_grad():
        ours, theirs = mine().float(), run().float()
        off = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if not off <= ALIKE:
        raise ValueError(f"its answer is {off:.1e} from ours")
    return timed(run, leaves)
