"""What each of two processes does in test_gather.py; a module of its own, so that a spawned process finds it."""

import torch
import torch.distributed as dist
from support import close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mm.recipes.clip.loss import clip_loss, siglip_loss
from mm.recipes.clip.whole_batch import siglip_ring
from mm.recipes.train.shard import mean_over_processes

WORLD, ROWS = 2, 12


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 6)), nn.Linear(4, 6)
        self.scale, self.bias = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor([-2.0]))

    def forward(self, x, y):
        return self.image(x), self.text(y), self.scale[0], self.bias[0]


def data():
    torch.manual_seed(0)
    return Towers(), torch.randn(ROWS, 5), torch.randn(ROWS, 4), torch.arange(ROWS) // 2 * 7 % 5


def one_process(kind):
    towers, x, y, group = data()
    image, text, scale, bias = towers(x, y)
    loss = clip_loss(image, text, scale, group) if kind == "softmax" else siglip_loss(image, text, scale, bias, group)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}


def gathered(x):
    if x.is_floating_point():
        return torch.cat(all_gather(x))
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def process(rank, file, kind, wrap):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    towers, x, y, group = data()
    part = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    spread = DistributedDataParallel(towers) if wrap == "ddp" else fully_shard(
        towers, mesh=init_device_mesh("cpu", (WORLD,)))
    image, text, scale, bias = spread(x[part], y[part])
    if kind == "softmax":
        loss = clip_loss(gathered(image), gathered(text), scale, gathered(group[part])) + 0 * bias
        value = loss.detach()
    else:
        loss = siglip_ring(image, text, scale, bias, group[part])
        value = mean_over_processes(loss)
    loss.backward()
    expected, gradients = one_process(kind)
    close(value, expected)
    for name, p in towers.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        if name in gradients:
            close(grad, gradients[name])
    dist.barrier()  # a process that leaves while the other one still reads from it would end that one
    dist.destroy_process_group()
