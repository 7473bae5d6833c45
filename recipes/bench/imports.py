"""`mm bench imports`: the time to import torch and `mm` beside the time to import torch alone, in fresh processes."""

from __future__ import annotations

import argparse
import subprocess
import sys

from ..search.arguments import positive
from .report import Case, interleave, report

MODULES = ("mm", "mm.encoders.clip")
MOST = 0.3  # seconds more than torch


def imports(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mm bench imports", description=__doc__)
    parser.add_argument("--repeats", type=positive, default=9, help="processes of each kind (default: 9)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    cases = [measure(name, args.repeats) for name in MODULES]
    return report("imports", cases, packages=("torch",), json_file=args.json)


def measure(module: str, repeats: int) -> Case:
    """The difference of the medians; the case is met while `MOST` is at least as long."""
    timing = interleave(lambda: start(f"import torch, {module}"), lambda: start("import torch"), repeats)
    more = timing.ours - timing.peer
    return Case(case=f"import {module} (beyond torch's {timing.peer:.2f} s)", ours=more, peer=MOST,
                ratio=MOST / max(more, 1e-3), at_least=1.0, unit="s")


def start(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)
