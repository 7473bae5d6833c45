"""Memory that a process keeps for itself from step to step."""

from __future__ import annotations

import ctypes
import sys

TRIM, MMAP, NEVER = -1, -3, 2**31 - 1  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)


def keep_memory() -> None:
    """Makes the C library of Linux reuse large blocks instead of giving them back to the system, which would have to
    clear each anew: a training step on waveforms takes half the time or less."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MMAP, NEVER)
            mallopt(TRIM, NEVER)
