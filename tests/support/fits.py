"""What each of two processes does in test_plans.py; a module of its own, so that a spawned process finds it."""

import os
from collections.abc import Sequence

import torch

from mm.recipes.lm.fit import fit
from mm.recipes.lm.settings import LmJob

WORLD = 2


def process(rank: int, port: int, jobs: Sequence[LmJob]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for job in jobs:
        fit(job)
