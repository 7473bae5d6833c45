"""Weights for inference in other forms: eight or four bits, or the order in which a CPU decodes fastest.

In eight bits on a CPU, every weight row and every token has its own scale: a token's result does not depend on its
neighbours in the batch. Activations are taken in 7 bits, and the remainder in 7 bits more, while the weights are read
once: outliers make 7 bits alone cost SmolLM2 about a tenth of its perplexity, both cost 0.5 %. Products are exact
integers (FBGEMM's), so the same row gives the same bits at any batch size. On a GPU torchao's kernels compute the
products and promise neither.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.errors import InputError
from mm.lowbit.packing import MakeLinear, PackedWeight, operator, replace_linears
from mm.nn.embed import LMHead
from mm.nn.latent import Unfolding
from mm.nn.linear import ONEDNN, FusedLinear, StepLinear

M = TypeVar("M", bound=nn.Module)


def quantize(model: M, to: str = "int8") -> M:
    """Replace the matrices of a model in place by ones of eight ("int8") or four bits ("int4"), for inference.

    A float32 model on a CPU takes the kernels here, a bfloat16 model on a GPU torchao's. Tables of embeddings and
    routers stay, and so does the matrix that unfolds the latents of latent attention. Such a model is not trained or
    saved. Raises InputError for other devices and dtypes."""
    if to not in FORMATS:
        raise InputError(f"weights can be quantised to {' or '.join(FORMATS)}, not {to!r}")
    devices, dtypes = ({getattr(p, name) for p in model.parameters()} for name in ("device", "dtype"))
    kinds = {device.type for device in devices}
    if kinds == {"cuda"} and dtypes == {torch.bfloat16}:
        by_torchao(model, to)
    elif kinds == {"cpu"} and dtypes == {torch.float32}:
        replace_linears(model, FORMATS[to], Int8Linear)  # heads take eight bits, as in GGUF files of four
    else:
        raise InputError(f"{to} weights are for float32 models on the CPU and bfloat16 models on a GPU, not for "
                         f"{' and '.join(str(x) for x in (*dtypes, *devices))}")
    return model.eval()


def by_torchao(model: nn.Module, to: str) -> None:
    """Quantise the weights alone, four bits in groups of 32 inputs. The head stays, which may be the table of
    embeddings, and so do stacked experts. Raises InputError without torchao."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise InputError("int8 and int4 weights on a GPU need torchao: pip install mm-torch[gpu]") from None
    config = Int8WeightOnlyConfig(set_inductor_config=False) if to == "int8" else Int4WeightOnlyConfig(
        group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, FusedLinear | nn.Linear)
              and not isinstance(module, Unfolding))


@torch.no_grad()
def arrange(model: M) -> M:
    """Arrange a model for decoding one row at a time on a CPU: matrices with more outputs than inputs are transposed in
    memory, where the product with one token then takes two thirds of the time (a compiled step is faster without).

    Names, shapes and values stay; results differ by rounding. To be called before an optimizer is made of the model,
    and not before FSDP shards it."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, LMHead) and weight is None:
            weight = model.embed.tokens.weight
        if isinstance(module, nn.Linear | FusedLinear | LMHead | StepLinear) and weight.shape[-2] > weight.shape[-1]:
            weight.data = weight.mT.contiguous().mT
    return model


def arrange_for_rows(model: M) -> M:
    """Arrange a float32 model for decoding four rows or more at a time on a CPU: matrices move into the blocks in which
    oneDNN reads them, up to twice as fast. Results differ by rounding; the model is not trained or saved any more.
    Raises InputError for another device or dtype, and without oneDNN."""
    kinds = {(p.device.type, p.dtype) for p in model.parameters()}
    if kinds != {("cpu", torch.float32)} or not ONEDNN:
        raise InputError(f"weights move into blocks in float32 on a CPU with oneDNN, not as {sorted(map(str, kinds))}")
    replace_linears(model, BlockedLinear, BlockedLinear)
    return model.eval()


# --------------------------------------------------------------------------------------------- linear layers
class PackedLinear(nn.Module):
    """x (..., D) float32 -> (..., E), by a weight (E, D) in another form and a bias (E,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach().float()
        self.pack(weight)

    def pack(self, weight: Tensor) -> None:
        """Keep the weight (E, D) in this form."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., E) in memory of its own."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x)
        return out if self.bias is None else out.add_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class BlockedLinear(PackedLinear):
    """float32 in oneDNN's own order."""

    def pack(self, weight: Tensor) -> None:
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), BLOCK_ROWS)
        self.blocks = PackedWeight(blocks, len(weight))

    def product(self, x: Tensor) -> Tensor:
        return blocked_product(x, self.blocks)


BLOCK_ROWS = 256  # tokens for which oneDNN chooses the blocks, which serve four as well


@operator("mm::blocked_product")
def blocked_product(x: Tensor, blocks: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")


class Int8Linear(PackedLinear):
    """Eight bits with a scale per row of the weight."""

    def pack(self, weight: Tensor) -> None:
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        levels = (weight / scale[:, None]).round().to(torch.int8)
        self.packed = PackedWeight(fbgemm_weight(levels, scale), len(levels))

    def product(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        step = flat.abs().amax(-1, keepdim=True).clamp_(min=1e-12).div_(LEVELS)
        exact = flat / step
        coarse = exact.round()
        rows = torch.cat([coarse, exact.sub_(coarse).mul_(2 * LEVELS)])
        out, count = int8_product(rows, self.packed), len(flat)
        out = torch.add(out[:count], out[count:], alpha=0.5 / LEVELS).mul_(step)
        return out.view(*x.shape[:-1], self.out_features)


LEVELS = 63  # activations fill 7 bits: AVX2 adds pairs of 8-bit products in 16 bits, which 8 would overflow


def fbgemm_weight(levels: Tensor, scale: Tensor) -> torch.ScriptObject:
    """levels (E, D) int8 and their scale (E,) as FBGEMM reads them: on its CPUs (x86) twice as fast as oneDNN's where
    one token is decoded, four times without instructions for bytes (VNNI). Raises InputError elsewhere."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        raise InputError("int8 weights on a CPU need an x86 processor")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        held = torch._make_per_channel_quantized_tensor(levels, scale.double(), torch.zeros(len(scale)).long(), 0)
    return torch.ops.quantized.linear_prepack(held, None)


FBGEMM = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default  # x by one scale, float32 out


@operator("mm::int8_product")
def int8_product(x: Tensor, weight: torch.ScriptObject) -> Tensor:
    """x (M, D), rounded to whole numbers of up to 7 bits -> (M, E) float32."""
    return FBGEMM(x, 1.0, LEVELS + 1, weight)


class Int4Linear(PackedLinear):
    """Four bits in groups of 32 inputs: a quarter of the memory of bfloat16.

    Each group of 32 weights of a row has 16 levels; Q4_0 and Q4_1 files keep those they came with. The step and the
    middle of a group are kept in bfloat16, in which products are taken too. A row's result does not depend on its
    neighbours in the batch; that of a model in chunks differs from the whole as it does in bfloat16. Long prompts are
    read slower than in float32.
    """

    def pack(self, weight: Tensor) -> None:
        self.short = -self.in_features % GROUP  # zeros that complete the last group
        weight = F.pad(weight.float(), (0, self.short, 0, -self.out_features % OUTPUTS))
        levels, scale, middle = nearest(weight.unflatten(1, (-1, GROUP)))
        self.scales = torch.stack([scale, middle], -1).transpose(0, 1).contiguous()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.flatten(1).to(torch.int32), 1)

    def product(self, x: Tensor) -> Tensor:
        flat = F.pad(x.reshape(-1, self.in_features), (0, self.short)).bfloat16()
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, GROUP, self.scales)
        return out[:, : self.out_features].to(x.dtype).view(*x.shape[:-1], self.out_features)


GROUP = 32  # inputs that share a step, as in GGUF's Q4_0 and Q4_1
TOP, MIDDLE = 15, 8  # levels
OUTPUTS = 16  # the kernel wants a multiple of this many


def nearest(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round weights (E, G, 32) to levels 0 to 15, with the step and middle (E, G) in bfloat16 of the better of two
    grids: from the smallest to the largest weight (Q4_1), or eight steps of zero on the side of the largest magnitude
    (Q4_0)."""
    low, high = groups.amin(-1), groups.amax(-1)
    far = torch.maximum(high, -low)
    grids = [on_grid(groups, low, (high - low) / TOP),
             on_grid(groups, torch.where(high >= -low, -7 / 8 * far, -far), far / 8)]
    errors = [(from_levels(*grid) - groups).square().sum(-1) for grid in grids]
    first = errors[0] <= errors[1]
    return tuple(torch.where(first[..., None] if a.ndim == 3 else first, a, b) for a, b in zip(*grids, strict=True))


def on_grid(groups: Tensor, low: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    step = step.clamp(min=1e-12).bfloat16()
    levels = ((groups - low[..., None]) / step.float()[..., None]).round_().clamp_(0, TOP)
    return levels, step, (low + MIDDLE * step.float()).bfloat16()


def from_levels(levels: Tensor, step: Tensor, middle: Tensor) -> Tensor:
    """The weights by which the kernel multiplies."""
    return (levels - MIDDLE) * step.float()[..., None] + middle.float()[..., None]


FORMATS: dict[str, MakeLinear] = {"int8": Int8Linear, "int4": Int4Linear}
