"""Two processes over gloo give the losses and gradients of one: softmax by gathering, sigmoid from neighbour to
neighbour, with DDP and with FSDP2."""

import pytest
import torch
from gathering import WORLD, process


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["softmax", "siglip"])
def test_two_processes_give_the_gradient_of_one(kind, wrap, tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path / "meet"), kind, wrap), nprocs=WORLD)
