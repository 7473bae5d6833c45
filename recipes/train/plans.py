"""Tensor parallelism as data: which layers of a block are split by what they give, and which by what they read
(Megatron, Shoeybi et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mm import spec
from mm.nn.linear import FusedLinear, linear
from mm.spec.schema import require

COLUMN, ROW, SUM = "column", "row", "sum"  # SUM: whole everywhere, with gradients to be added up
PLAN = {"mixer.qkv": COLUMN, "mixer.q_norm": SUM, "mixer.k_norm": SUM, "mixer.out": ROW,
        "mlp.up": COLUMN, "mlp.gate": COLUMN, "mlp.down": ROW}


class SplitLinear(FusedLinear):
    """A fused projection of which each process holds its share of every part: whole heads, by groups of those that
    share keys. Its weight and bias are spread by rows in the order of `split_order` over `world` processes; `sizes` are
    this process's."""

    world: int

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mesh, bias = self.weight.device_mesh, None if self.bias is None else self.bias.to_local()
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        return linear(x, self.weight.to_local(), bias).split(self.sizes, -1)


def split(model: nn.Module, mesh: DeviceMesh, plan: dict[str, str] = PLAN) -> list[str]:  # noqa: B006
    """Splits every block over the processes of a mesh; the names of the parameters whose gradients are to be added up
    over them. Raises InputError for layers that cannot be split so."""
    check(model.spec.stack, mesh.size())
    added = []
    for i, block in enumerate(model.stack.blocks):
        parts = {name: kind for name, kind in plan.items() if found(block, name) is not None}
        styles = {ROW: RowwiseParallel, COLUMN: ColwiseParallel}
        parallelize_module(block, mesh, {name: styles[kind]() for name, kind in parts.items()
                                         if kind in styles and isinstance(found(block, name), nn.Linear)})
        for name, kind in parts.items():
            if kind == COLUMN and isinstance(found(block, name), FusedLinear):
                split_fused(found(block, name), mesh)
            added += [f"stack.blocks.{i}.{name}.{part}" for part, _ in found(block, name).named_parameters()
                      if kind == SUM]
    return added


def check(stack: spec.Stack, world: int) -> None:
    """Raises InputError for a layer that holds more than the plan knows, or heads that cannot be shared evenly."""
    for layer in stack.layers:
        mixer, mlp = layer.mixer, layer.mlp
        plain = isinstance(mixer, spec.Attention) and isinstance(mlp, spec.Mlp) and not layer.cross
        require(plain and not (mixer.sinks or mixer.extra_key or mixer.inner_norm or mixer.gate != "none"
                               or mlp.inner_norm or stack.relative)
                and (mixer.qk_norm is None or mixer.qk_norm.over == "head")
                and mixer.q_bias == mixer.k_bias == mixer.v_bias,
                "tensor parallelism takes layers of plain attention and one MLP")
        require(mixer.heads % world == mixer.kv_heads % world == mlp.hidden % world == 0,
                f"{mixer.heads} heads with {mixer.kv_heads} of keys and {mlp.hidden} channels cannot be shared evenly "
                f"by {world} processes")


def found(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def split_fused(module: FusedLinear, mesh: DeviceMesh) -> None:
    order = split_order(module.sizes, mesh.size())
    for name, value in list(module.named_parameters()):
        spread = distribute_tensor(value.detach()[order], mesh, [Shard(0)])
        setattr(module, name, nn.Parameter(spread, requires_grad=value.requires_grad))
    module.__class__, module.world = SplitLinear, mesh.size()
    module.sizes = tuple(size // mesh.size() for size in module.sizes)


def split_order(sizes: Sequence[int], world: int) -> Tensor:
    """Row numbers: the first process's share of every part, then the second's."""
    parts = torch.arange(sum(sizes)).split(list(sizes))
    return torch.cat([part.chunk(world)[rank] for rank in range(world) for part in parts])


def orders(model: nn.Module) -> dict[str, Tensor]:
    """The order of rows of every split projection's parameters, by name."""
    return {f"{place}.{name}": split_order([size * module.world for size in module.sizes], module.world)
            for place, module in model.named_modules() if isinstance(module, SplitLinear)
            for name, _ in module.named_parameters()}
