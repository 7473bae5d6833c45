"""How every benchmark measures and reports: ours and the peer in turns, one table, one JSON file, one exit status."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mm.errors import InputError

from ..common.machine import machine


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The options of every benchmark.

    Args:
        json: write the figures to this file.
    """

    json: str | None = None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median seconds per call; `ratio` says how many times faster ours is."""

    ours: float
    peer: float

    @property
    def ratio(self) -> float:
        return self.peer / self.ours


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a report: `ratio` says how many times better ours is, and passes from `at_least` on.

    A case without `at_least` is only told. `unit` is that of `ours` and `peer`. `note` says what was not measured and
    why: a case whose own number is missing falls short.
    """

    case: str
    ours: float | None
    unit: str
    peer: float | None = None
    ratio: float | None = None
    at_least: float | None = None
    note: str | None = None
    ok: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.note is None and (self.ours is None or self.at_least is not None and self.ratio is None):
            raise InputError(f"the case {self.case!r} has a threshold but no ratio")
        reached = self.at_least is None or self.ratio is None or self.ratio >= self.at_least
        object.__setattr__(self, "ok", self.ours is not None and reached)

    @classmethod
    def timed(cls, case: str, timing: Timing, at_least: float | None = None) -> Case:
        return cls(case=case, ours=timing.ours, peer=timing.peer, ratio=timing.ratio, at_least=at_least, unit="s")

    @classmethod
    def limited(cls, case: str, ms: float, most: float) -> Case:
        """Milliseconds that should be at most so many."""
        return cls(case=f"{case}, at most {most} ms", ours=ms, ratio=most / ms, at_least=1.0, unit="ms")


def interleave(ours: Callable[[], Any], peer: Callable[[], Any], repeats: int, warmup: int = 1) -> Timing:
    """Calls both in turns, the order swapped every time, after `warmup` untimed calls of each."""
    return Timing(**in_turns({"ours": ours, "peer": peer}, repeats, warmup))


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each, called in turns, the order swapped every time, after `warmup` untimed calls."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-warmup, repeats):
        for name in reversed(calls) if repeat > 0 and repeat % 2 else calls:
            start = time.perf_counter()
            calls[name]()
            if repeat >= 0:
                spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def report(bench: str, cases: Sequence[Case], *, packages: Sequence[str], json_file: str | None = None) -> int:
    """Prints the cases, writes the JSON file if one is named, and returns exit status 1 if a case falls short.

    `packages` are the distributions whose versions matter. Raises InputError when the file cannot be written.
    """
    about = {"bench": bench, "machine": machine(), "versions": versions(packages), "threads": threads()}
    Console().print(as_table(bench, cases), f"{about['machine']}, {about['threads']} threads", sep="\n")
    if json_file:
        text = json.dumps({**about, "cases": [written(case) for case in cases]}, indent=2, allow_nan=False)
        try:
            Path(json_file).write_text(text + "\n", "utf-8")
        except OSError as error:
            raise InputError(f"--json {json_file}: cannot be written ({error.strerror})") from None
    return 0 if all(case.ok for case in cases) else 1


def written(case: Case) -> dict[str, Any]:
    """A case for a JSON file, which has no numbers that are not finite, and a note only where there is one."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(case).items() if name != "note" or value is not None}


def as_table(bench: str, cases: Sequence[Case]) -> Table:
    table = Table("case", title=f"mm bench {bench}")
    for column in ("ours", "peer", "unit", "ratio", "at least", ""):
        table.add_column(column, justify="left" if column == "unit" else "right")
    for case in cases:
        numbers = [_short(case.ours), _short(case.peer), case.unit, _short(case.ratio), _short(case.at_least)]
        verdict = "SHORT" if not case.ok else "" if case.at_least is None else "ok"
        table.add_row(f"{case.case} ({case.note})" if case.note else case.case, *numbers, verdict)
    return table


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def threads() -> int:
    import torch

    return torch.get_num_threads()


def versions(packages: Sequence[str]) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
