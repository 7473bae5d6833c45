"""What each of two processes does in test_train_codec.py; a module of its own, so that a spawned process finds it."""

import os

import torch

from mm.recipes.codec.fit import fit
from mm.recipes.codec.settings import CodecJob
from mm.recipes.common.command import parse


def process(rank: int, port: int, argv: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    fit(parse(CodecJob, "mm train codec", argv))
