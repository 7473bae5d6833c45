"""`mm bench imports`: what importing this package costs beyond importing torch, in fresh processes."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from ..common.options import positive
from .report import Case, report

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


def imports(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mm bench imports", description=__doc__)
    parser.add_argument("--repeats", type=positive, default=9, help="processes for each module (default: 9)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
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
