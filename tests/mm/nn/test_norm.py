"""Norms against the reference libraries, in the orders of scale and cast that half precision tells apart."""

import pytest
import torch
from support import close, redraw
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from mm import spec
from mm.nn.norm import build_norm

ORDERS = {"cast_then_scale": LlamaRMSNorm, "scale_then_cast": Olmo2RMSNorm, "one_plus": Gemma2RMSNorm}


def pair(order):
    theirs = redraw(ORDERS[order](64, eps=1e-3))
    ours = build_norm(spec.RMSNorm(eps=1e-3, order=order), 64)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("order", ORDERS)
def test_rms_norm_is_the_references(order):
    ours, theirs = pair(order)
    x = torch.randn(50, 64) * 0.1
    close(ours(x), theirs(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_rms_norm_casts_where_the_reference_does(order, dtype):
    """Bit for bit; every other order is visibly different."""
    ours, theirs = (norm.to(dtype) for norm in pair(order))
    x = torch.randn(500, 64).to(dtype)
    wanted = theirs(x)
    assert (ours(x) != wanted).float().mean() < 1e-3
    scale = theirs.weight + int(order == "one_plus")
    for other in set(ORDERS) - {order}:
        wrong = build_norm(spec.RMSNorm(eps=1e-3, order=other), 64).to(dtype)
        wrong.weight.data.copy_(scale - int(other == "one_plus"))
        assert (wrong(x) != wanted).float().mean() > 0.01


def test_rms_norm_starts_as_identity_on_unit_rows():
    x = torch.randn(5, 64).sign()
    for order in ORDERS:
        close(build_norm(spec.RMSNorm(eps=0.0, order=order), 64)(x), x, 1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias):
    theirs = redraw(torch.nn.LayerNorm(64, eps=1e-3, bias=bias))
    ours = build_norm(spec.LayerNorm(eps=1e-3, bias=bias), 64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(50, 64) * 0.1
    close(ours(x), theirs(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l2_norm_is_llama4s(dtype):
    ours, x = build_norm(spec.L2Norm(eps=1e-3), 64), (torch.randn(500, 64) * 0.1).to(dtype)
    assert not list(ours.parameters())
    close(ours(x), Llama4TextL2Norm(1e-3)(x), 1e-6)


@pytest.mark.parametrize("settings", [spec.LayerNorm(), spec.RMSNorm(), spec.RMSNorm(order="one_plus"), spec.L2Norm()])
def test_gradients_in_double_precision(settings):
    norm = redraw(build_norm(settings, 6)).double()
    assert torch.autograd.gradcheck(norm, torch.randn(3, 6, dtype=torch.float64, requires_grad=True))
