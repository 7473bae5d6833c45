"""How `mm bench attention` measures on a GPU, and what it makes of a call that fails: a line, never the end."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .report import Case, Timing

Run = Callable[[], Tensor]
Measured = tuple[float | None, str | None]  # milliseconds, or why there are none
Passes = dict[str, Callable[[Run, list[Tensor]], float]]  # what is timed of a call, and how
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

    return do_bench(run, warmup=100, rep=200, quantiles=[0.5])


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


def forward(run: Run, leaves: list[Tensor]) -> float:
    with torch.no_grad():
        return milliseconds(run)


def backward(run: Run, leaves: list[Tensor]) -> float:
    y = run()
    upstream = torch.randn_like(y)
    return milliseconds(lambda: torch.autograd.grad(y, leaves, upstream, retain_graph=True))


def forward_captured(run: Run, leaves: list[Tensor]) -> float:
    with torch.no_grad():
        return captured(run)


def both_captured(run: Run, leaves: list[Tensor]) -> float:
    with torch.no_grad():
        upstream = torch.randn_like(run())
    return captured(lambda: torch.autograd.grad(run(), leaves, upstream))


EAGER: Passes = {"forward": forward, "backward": backward}
CAPTURED: Passes = {"forward in a graph": forward_captured, "forward and backward in a graph": both_captured}


def timed(run: Run, leaves: list[Tensor], passes: Passes = EAGER) -> dict[str, Measured]:
    return {way: attempt(partial(clock, run, leaves)) for way, clock in passes.items()}


def compare(name: str, mine: Run, own: dict[str, Measured], peers: dict[str, Peer], leaves: list[Tensor],
            passes: Passes = EAGER) -> Iterator[Case]:
    """Every pass against each peer that can do it. own: what `timed` gives of ours."""
    for peer, given in peers.items():
        run, failure = attempt(lambda given=given: alike(mine, given.make))
        theirs = timed(run, leaves, passes) if failure is None else dict.fromkeys(passes, (None, failure))
        for way in passes:
            yield versus(f"{name}, {way}, against {peer}", own[way], theirs[way], given.at_least)


def versus(case: str, ours: Measured, theirs: Measured, at_least: float | None = None) -> Case:
    (spent, failure), (peer, peer_failure) = ours, theirs
    if failure is not None:
        return Case(case=case, ours=None, unit="s", note=f"ours fails: {failure}")
    if peer_failure is not None:
        return Case(case=case, ours=spent / 1e3, unit="s", note=peer_failure)
    return Case.timed(case, Timing(ours=spent / 1e3, peer=peer / 1e3), at_least)


def alike(mine: Run, make: Callable[[], Run]) -> Run:
    """A peer that answers the same workload. Raises ValueError if it answers another."""
    with torch.no_grad():
        ours = mine().float()
        run = make()
        off = ((ours - run().float()).abs().max() / ours.abs().max()).item()
    if not off <= ALIKE:
        raise ValueError(f"its answer is {off:.1e} from ours")
    return run
