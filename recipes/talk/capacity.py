"""How many conversations a machine holds."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from mm.errors import InputError

from .dialogues import Dialogues
from .partner import Partner
from .wishes import Wishes

COUNTS, STEPS = (*range(1, 9), 12, 16, 24, 32, 48, 64), 5
SHARE = 0.6  # of a frame's length that a step may take: later ones look back at more


def capacity(partner: Partner) -> int:
    """The most conversations, up to 64 and at least 1, that fit into memory and whose steps leave time to spare. Also
    warms the model up. Raises InputError where not even one fits."""
    held = 1
    for count in COUNTS:
        try:
            if step_seconds(partner, count) > SHARE * partner.seconds:
                break
        except torch.OutOfMemoryError:
            if count == 1:
                raise InputError(f"{partner.name} and one conversation do not fit into the GPU's memory") from None
            break
        held = count
    return held


def step_seconds(partner: Partner, count: int, steps: int = STEPS) -> float:
    """The median of so many steps of `count` conversations."""
    dialogues, spent = Dialogues(partner, count), []
    for key in range(count):
        dialogues.enter(key, Wishes())
    for _ in range(steps + 2):
        start = time.perf_counter()
        dialogues.step({key: np.zeros(partner.frame, np.float32) for key in range(count)})
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[2:])
