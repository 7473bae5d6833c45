"""How many conversations a machine holds."""

from __future__ import annotations

import statistics
import time

import numpy as np

from .dialogues import Dialogues
from .partner import Partner
from .wishes import Wishes

MOST, STEPS = 8, 5
SHARE = 0.6  # of a frame's length that a step may take: later ones look back at more


def capacity(partner: Partner) -> int:
    """The most conversations, up to 8 and at least 1, whose steps leave time to spare. Also warms the model up."""
    held = 1
    for count in range(1, MOST + 1):
        if step_seconds(partner, count) > SHARE * partner.seconds:
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
