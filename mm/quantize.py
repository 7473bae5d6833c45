"""Weights of eight or four bits for decoding.

On a CPU in eight bits, every weight row and every token has its own scale: a token's result does not depend on its
neighbours in the batch. Activations are taken in 7 bits, and what these leave in 7 bits more, while the weights are
read once: outliers make 7 bits alone cost SmolLM2 about a tenth of its perplexity, both cost 0.5 %. Products are exact
integers (FBGEMM's), so the same row gives the same bits at any batch size.
On a GPU torchao's kernels take the products and promise neither.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import count
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mm.embed import LMHead
from mm.errors import InputError
from mm.grouped import StackedLinear, filled
from mm.int4 import Int4Linear
from mm.latent import Unfolding
from mm.linear import FusedLinear
from mm.mlp import Mlp, activated

M = TypeVar("M", bound=nn.Module)
LEVELS = 63  # activations fill 7 bits: AVX2 adds pairs of 8-bit products in 16 bits, which 8 would overflow


class Int8Linear(nn.Module):
    """x (..., D) float32 -> (..., E). weight (E, D), bias (E,); kept only in the kernel's own order."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        levels = (weight / scale[:, None]).round().to(torch.int8)
        self.out_features, self.in_features = weight.shape
        self.packed = Packed(levels, scale)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        step = torch.linalg.vector_norm(flat, torch.inf, -1, keepdim=True).clamp_(min=1e-12).div_(LEVELS)
        exact = flat / step
        coarse = exact.round()
        rows = torch.cat([coarse, exact.sub_(coarse).mul_(2 * LEVELS)])
        coarse, rest = self.packed.product(rows).split(len(flat))
        out = torch.add(coarse, rest, alpha=0.5 / LEVELS).mul_(step)
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int8"


class Packed:
    """levels (E, D) int8 and their scale (E,) as FBGEMM reads them: on its CPUs (x86) twice as fast as oneDNN's where
    one token is decoded, four times without instructions for bytes (VNNI). Raises InputError elsewhere."""

    def __init__(self, levels: Tensor, scale: Tensor):
        if torch.backends.quantized.engine not in ("x86", "fbgemm"):
            raise InputError("int8 weights on a CPU need an x86 processor")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            held = torch._make_per_channel_quantized_tensor(levels, scale.double(), torch.zeros(len(scale)).long(), 0)
        self.outputs, self.weight = len(levels), torch.ops.quantized.linear_prepack(held, None)
        self.number = next(NUMBERS)
        PACKED[self.number] = self

    def product(self, rows: Tensor) -> Tensor:
        """rows (M, D), whole numbers of up to 7 bits -> (M, E) float32."""
        if torch.compiler.is_compiling():
            return torch.ops.mm.int8_product(rows, self.number, self.outputs)
        return PRODUCT(rows, 1.0, LEVELS + 1, self.weight)

    def __deepcopy__(self, memo: dict) -> Packed:
        return self


PRODUCT = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32  # x in steps of one scale, float32 out
PACKED: WeakValueDictionary[int, Packed] = WeakValueDictionary()  # by number, for a compiled step to name them
NUMBERS = count()


torch.library.define("mm::int8_product", "(Tensor rows, int number, int outputs) -> Tensor")


@torch.library.impl("mm::int8_product", "CPU")
def product(rows: Tensor, number: int, outputs: int) -> Tensor:
    """`Packed.product`, an operator into which `torch.compile` need not look."""
    return PRODUCT(rows, 1.0, LEVELS + 1, PACKED[number].weight)


@torch.library.register_fake("mm::int8_product")
def likewise(rows: Tensor, number: int, outputs: int) -> Tensor:
    return rows.new_empty(rows.shape[0], outputs)


class Fused(nn.Module):
    """x (..., D) -> one tensor (..., size) per size."""

    def __init__(self, whole: FusedLinear, cell: Cell):
        super().__init__()
        self.sizes, self.whole = whole.sizes, cell(whole.weight, whole.full_bias())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.whole(x).split(self.sizes, -1)


class Gated(nn.Module):
    """x (..., D) -> (..., D): a gated MLP whose two projections are one product, for which x is rounded once."""

    def __init__(self, mlp: Mlp, cell: Cell):
        super().__init__()
        parts, self.settings, self.inner_norm = (mlp.up, mlp.gate), mlp.settings, mlp.inner_norm
        bias = torch.cat([part.bias for part in parts]) if mlp.settings.up_bias else None
        self.both = cell(torch.cat([part.weight for part in parts]), bias)
        self.down = cell(mlp.down.weight, mlp.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner_norm(activated(self.settings, *self.both(x).chunk(2, -1))))


class Stacked(nn.Module):
    """x (M, D) sorted by group -> (M, E), each group by a matrix of its own."""

    def __init__(self, whole: StackedLinear, cell: Cell):
        super().__init__()
        biases = whole.bias if whole.bias is not None else [None] * len(whole.weight)
        self.groups = nn.ModuleList(map(cell, whole.weight, biases))

    def forward(self, x: Tensor, group: Tensor, ends: Tensor) -> Tensor:
        out = x.new_empty(len(x), self.groups[0].out_features)
        for i, rows in filled(ends):
            out[rows] = self.groups[i](x[rows])
        return out


class Head(nn.Module):
    """x (..., D) -> logits (..., V), in eight bits."""

    def __init__(self, head: LMHead, table: Tensor):
        super().__init__()
        self.score = Int8Linear(table if head.weight is None else head.weight, head.bias)
        head.weight = head.bias = None
        self.head = head

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.head.finish(self.score(self.head.ready(x)))


Cell = Callable[[Tensor, Tensor | None], nn.Module]  # of a weight (E, D) and a bias (E,)
CELLS: dict[str, Cell] = {"int8": Int8Linear, "int4": Int4Linear}


def quantize(model: M, to: str = "int8") -> M:
    """The same model, its matrices replaced in place by ones of eight ("int8") or four bits ("int4"), for inference:
    on a CPU a float32 model by the kernels here, on a GPU a bfloat16 model by torchao. Tables of embeddings and
    routers stay, and what unfolds the latents of latent attention. Raises InputError elsewhere; such a model is not
    trained or saved."""
    if to not in CELLS:
        raise InputError(f"weights can be quantised to {' or '.join(CELLS)}, not {to!r}")
    devices, dtypes = ({getattr(p, name) for p in model.parameters()} for name in ("device", "dtype"))
    kinds = {device.type for device in devices}
    if kinds == {"cuda"} and dtypes == {torch.bfloat16}:
        by_torchao(model, to)
    elif kinds == {"cpu"} and dtypes == {torch.float32}:
        replace(model, CELLS[to])
    else:
        raise InputError(f"{to} weights are for float32 models on the CPU and bfloat16 models on a GPU, not for "
                         f"{' and '.join(str(x) for x in (*dtypes, *devices))}")
    return model.eval()


@torch.no_grad()
def replace(model: nn.Module, cell: Cell) -> None:
    """Every matrix by one that `cell` makes of it; heads take eight bits, as in GGUF files of four."""
    for name, child in list(model.named_children()):
        if isinstance(child, FusedLinear):
            setattr(model, name, Fused(child, cell))
        elif isinstance(child, Mlp) and child.gate is not None:
            setattr(model, name, Gated(child, cell))
        elif isinstance(child, StackedLinear):
            setattr(model, name, Stacked(child, cell))
        elif isinstance(child, nn.Linear) and not isinstance(child, Unfolding):
            setattr(model, name, cell(child.weight, child.bias))
        elif isinstance(child, LMHead):
            replace(child, cell)
            setattr(model, name, Head(child, model.embed.tokens.weight))
        else:
            replace(child, cell)


def by_torchao(model: nn.Module, to: str) -> None:
    """Weights alone, four bits in groups of 32 inputs. The head stays, which may be the table of embeddings, and so do
    stacked experts.

    Raises InputError without torchao."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise InputError("int8 and int4 weights on a GPU need torchao: pip install mm-torch[gpu]") from None
    config = Int8WeightOnlyConfig(set_inductor_config=False) if to == "int8" else Int4WeightOnlyConfig(
        group_size=32, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, FusedLinear | nn.Linear)
              and not isinstance(module, Unfolding))
