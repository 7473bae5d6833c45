"""Names of the machine that something ran on: processor, cores, memory, GPU."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def machine() -> str:
    """Processor, cores that this process may use, memory, system; the GPU where there is one."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        name = found[0] if found else name
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    return f"{name}, {cores()} cores, {gigabytes:.0f} GiB, {platform.system()}{gpu()}"


def gpu() -> str:
    """Its name, processors and memory, CUDA; and from nvidia-smi the driver, power limit and fastest clock."""
    import torch

    if not torch.cuda.is_available():
        return ""
    it = torch.cuda.get_device_properties(0)  # asks a GPU that was lost nothing
    told = f", {it.name}, {it.multi_processor_count} processors, {it.total_memory / 2**30:.0f} GiB, " \
           f"CUDA {torch.version.cuda}"
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        first = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return told
    return f"{told}, driver, power and clock {first}"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
