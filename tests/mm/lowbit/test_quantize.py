"""Weights of few bits: near the whole ones, and one row the same whatever its neighbours are."""

import sys

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf import quantize as gguf_quantize

from mm import TextDecoder
from mm.decode import Sampling
from mm.errors import InputError
from mm.lowbit import quantize
from mm.lowbit.formats import Int4Linear, Int8Linear, by_torchao
from mm.recipes.weights import stories260k


@pytest.mark.parametrize("layer, most", [(Int8Linear, 0.03), (Int4Linear, 0.12)])
def test_a_product_is_near_and_independent_of_its_neighbours(layer, most):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(97, 70), torch.randn(97), torch.randn(9, 70) * torch.logspace(-2, 3, 9)[:, None]
    layer = layer(weight, bias)
    whole = torch.nn.functional.linear(x, weight, bias)
    error = (layer(x) - whole).norm(dim=1) / (whole - bias).norm(dim=1)
    assert error.max() < most
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_four_bits_of_a_gguf_file_stay_four_bits(kind):
    """Its levels are kept; what differs is the rounding of inputs and scales to bfloat16."""
    kind, weight = GGMLQuantizationType[kind], torch.randn(64, 256)
    kept = torch.from_numpy(dequantize(gguf_quantize(weight.numpy(), kind), kind))
    x = torch.randn(5, 256)
    assert ((Int4Linear(kept)(x) - x @ kept.T).norm() / (x @ kept.T).norm()) < 0.01


@torch.inference_mode()
@pytest.mark.parametrize("to, most", [("int8", 0.02), ("int4", 0.2)])
def test_a_model_keeps_its_story(to, most):
    model, ids = TextDecoder.from_pretrained(stories260k()), torch.randint(3, 512, (2, 40))
    before = model(ids).log_softmax(-1)
    after = quantize(model, to)(ids).log_softmax(-1)
    assert (before.exp() * (before - after)).sum(-1).mean() < most
    assert model.generate("Once upon a time", Sampling(max_tokens=12))[0].text.startswith(", there was a little")


@torch.inference_mode()
def test_torchao_takes_every_projection():
    """On a CPU, where its eight bits work too; four need a GPU."""
    pytest.importorskip("torchao")
    model = TextDecoder.from_pretrained(stories260k(), dtype=torch.bfloat16)
    by_torchao(model, "int8")
    kinds = {type(module.weight).__name__ for module in model.stack.modules() if hasattr(module, "in_features")}
    assert kinds == {"Int8Tensor"} == {type(block.mixer.qkv.weight).__name__ for block in model.stack.blocks}
    assert model.generate("Once upon a time", Sampling(max_tokens=12))[0].text.startswith(", there was a little")


def test_what_cannot_be_quantised(monkeypatch):
    model = TextDecoder.from_pretrained(stories260k(), dtype=torch.bfloat16)
    with pytest.raises(InputError, match="float32 models on the CPU.*not for torch.bfloat16 and cpu"):
        quantize(model, "int8")
    with pytest.raises(InputError, match="int8 or int4"):
        quantize(model, "int3")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match="torchao"):
        by_torchao(model, "int4")


def test_outliers_among_activations_leave_the_others_their_precision():
    x, weight = torch.randn(4, 64), torch.randn(48, 64)
    x[:, 3] *= 100
    weight[:, 3] = 0  # what is left is the precision of the small ones
    exact = x @ weight.T
    assert (Int8Linear(weight)(x) - exact).norm() < 0.02 * exact.norm()
