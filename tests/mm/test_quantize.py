"""Weights of eight bits: near the whole ones, and one row the same whatever its neighbours are."""

import pytest
import torch

from mm import TextDecoder
from mm.errors import InputError
from mm.quantize import Int8Linear, quantize
from mm.recipes.weights import stories260k
from mm.sampling import Sampling


def test_a_product_is_near_and_independent_of_its_neighbours():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64), torch.randn(96), torch.randn(9, 64) * torch.logspace(-2, 3, 9)[:, None]
    layer = Int8Linear(weight, bias)
    whole = torch.nn.functional.linear(x, weight, bias)
    error = (layer(x) - whole).norm(dim=1) / (whole - bias).norm(dim=1)
    assert error.max() < 0.03
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@torch.inference_mode()
def test_a_model_keeps_its_story():
    model, ids = TextDecoder.from_pretrained(stories260k()), torch.randint(3, 512, (2, 40))
    before = model(ids).log_softmax(-1)
    after = quantize(model)(ids).log_softmax(-1)
    assert (before.exp() * (before - after)).sum(-1).mean() < 0.02
    assert model.generate("Once upon a time", Sampling(max_tokens=12))[0].text.startswith(", there was a little")


def test_what_cannot_be_quantised():
    model = TextDecoder.from_pretrained(stories260k(), dtype=torch.bfloat16)
    with pytest.raises(InputError, match="float32"):
        quantize(model)
    with pytest.raises(InputError, match="int8"):
        quantize(model, "int3")
