"""What each of two processes does in test_learning.py; a module of its own, so that a spawned process finds it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mm.codecs.learning import learn
from mm.codecs.quantizer import SplitQuantizer
from mm.codecs.spec import Learning, Quantizer

WORLD, STEPS = 2, 12


def quantizer() -> SplitQuantizer:
    torch.manual_seed(3)
    return SplitQuantizer(8, Quantizer(codebooks=4, size=16, dim=6)).train()


def vectors(batch: int = 4, steps: int = 10, seed: int = 1) -> Tensor:
    return torch.randn(batch, steps, 8, generator=torch.Generator().manual_seed(seed))


def several(own: slice) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(codebooks, latents, codes) after some steps with these rows of each batch."""
    made, random = quantizer(), torch.Generator().manual_seed(0)
    for step in range(STEPS):
        out = learn(made, vectors(seed=step)[own], Learning(), step, random)
    return made.state_dict(), out.latents.detach(), out.codes


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.save(several(slice(2 * rank, 2 * rank + 2)), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
