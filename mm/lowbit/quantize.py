"""Weights of eight or four bits for decoding.

On a CPU in eight bits, every weight row and every token has its own scale: a token's result does not depend on its
neighbours in the batch. Activations are taken in 7 bits, and what these leave in 7 bits more, while the weights are
read once: outliers make 7 bits alone cost SmolLM2 about a tenth of its perplexity, both cost 0.5 %. Products are exact
integers (FBGEMM's), so the same row gives the same bits at any batch size.
On a GPU torchao's kernels take the products and promise neither.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

from mm.errors import InputError
from mm.lowbit.cells import Cell, Kept, operator, replace
from mm.lowbit.int4 import Int4Linear
from mm.nn.latent import Unfolding
from mm.nn.linear import FusedLinear

M = TypeVar("M", bound=nn.Module)
LEVELS = 63  # activations fill 7 bits: AVX2 adds pairs of 8-bit products in 16 bits, which 8 would overflow


class Int8Linear(nn.Module):
    """x (..., D) float32 -> (..., E). weight (E, D), bias (E,); kept only in the kernel's own order."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        levels = (weight / scale[:, None]).round().to(torch.int8)
        self.out_features, self.in_features = weight.shape
        self.packed = Kept(packed(levels, scale), len(levels))
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        step = flat.abs().amax(-1, keepdim=True).clamp_(min=1e-12).div_(LEVELS)
        exact = flat / step
        coarse = exact.round()
        rows = torch.cat([coarse, exact.sub_(coarse).mul_(2 * LEVELS)])
        out, count = product(rows, self.packed), len(flat)
        out = torch.add(out[:count], out[count:], alpha=0.5 / LEVELS).mul_(step)
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int8"


def packed(levels: Tensor, scale: Tensor) -> torch.ScriptObject:
    """levels (E, D) int8 and their scale (E,) as FBGEMM reads them: on its CPUs (x86) twice as fast as oneDNN's where
    one token is decoded, four times without instructions for bytes (VNNI). Raises InputError elsewhere."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        raise InputError("int8 weights on a CPU need an x86 processor")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        held = torch._make_per_channel_quantized_tensor(levels, scale.double(), torch.zeros(len(scale)).long(), 0)
    return torch.ops.quantized.linear_prepack(held, None)


@operator("mm::int8_product")
def product(x: Tensor, weight: torch.ScriptObject) -> Tensor:
    """x (M, D), rounded to whole numbers of up to 7 bits -> (M, E) float32."""
    return PRODUCT(x, 1.0, LEVELS + 1, weight)


PRODUCT = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default  # x by one scale, float32 out


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
        replace(model, CELLS[to], Int8Linear)  # heads take eight bits, as in GGUF files of four
    else:
        raise InputError(f"{to} weights are for float32 models on the CPU and bfloat16 models on a GPU, not for "
                         f"{' and '.join(str(x) for x in (*dtypes, *devices))}")
    return model.eval()


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
