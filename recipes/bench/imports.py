"""`mm bench imports`: what importing this package costs beyond importing torch, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass

from jsonargparse.typing import PositiveInt

from .report import Bench, Case, report

MODULES = ("mm", "mm.encoders.clip")
MOST = 0.3  # seconds
CODE = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import {}
print(time.perf_counter() - middle, middle - start)
"""


@dataclass(frozen=True, kw_only=True)
class Imports(Bench):
    """What importing this package costs beyond importing torch, in fresh processes.

    Args:
        repeats: processes for each module.
    """

    repeats: PositiveInt = 9

    def run(self) -> int:
        return imports(self)


def imports(args: Imports) -> int:
    cases = [case for name in MODULES for case in measure(name, args.repeats)]
    return report("imports", cases, packages=("torch",), json_file=args.json)


def measure(module: str, repeats: int) -> list[Case]:
    """Medians of the seconds for a module once torch is there, held against `MOST`, and for torch in the same runs."""
    runs = [start(module) for _ in range(repeats + 1)][1:]  # the first one may still write byte code
    ours, torch = (statistics.median(column) for column in zip(*runs, strict=True))
    return [Case(case=f"import {module} after torch, most allowed as peer", ours=ours, peer=MOST, ratio=MOST / ours,
                 at_least=1.0, unit="s"),
            Case(case="import torch in the same processes", ours=torch, unit="s")]


def start(module: str) -> tuple[float, float]:
    run = subprocess.run([sys.executable, "-c", CODE.format(module)], check=True, capture_output=True, text=True)
    ours, torch = map(float, run.stdout.split())
    return ours, torch
