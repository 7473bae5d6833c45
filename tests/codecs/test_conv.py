"""Convolutions against torch's, and in pieces against the whole."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import close, redraw

from mm.codecs.conv import Conv, ConvTranspose, DepthwiseTranspose
from mm.errors import InputError

KINDS = [(7, 1, 1, False), (3, 1, 2, False), (1, 1, 1, False), (8, 4, 1, False), (4, 2, 1, True), (6, 3, 1, False)]


def conv(kernel, stride, dilation, replicate, elu=False):
    return redraw(Conv(3, 5, kernel, stride=stride, dilation=dilation, replicate=replicate, elu=elu))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elu", [False, True])
def test_equals_torch_with_and_without_gradients(kind, elu, monkeypatch):
    kernel, stride, dilation, replicate = kind
    model, x = conv(*kind, elu=elu), torch.randn(2, 24, 3)
    y = F.pad((F.elu(x) if elu else x).transpose(1, 2), (model.past, 0), mode="replicate" if replicate else "constant")
    wanted = F.conv1d(y, model.weight.transpose(1, 2), model.bias, stride, dilation=dilation).transpose(1, 2)
    close(model(x), wanted, 1e-6)
    for long in (48, 49):
        monkeypatch.setattr("mm.codecs.conv.LONG", long)
        with torch.no_grad():
            close(model(x), wanted, 1e-6)


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_transposed_equals_torch(stride):
    model, x = redraw(ConvTranspose(4, 3, stride)), torch.randn(2, 7, 4)
    wanted = F.conv_transpose1d(F.elu(x).transpose(1, 2), model.weight.permute(2, 1, 0), model.bias, stride)
    wanted = wanted[..., :-stride].transpose(1, 2)
    close(model(x), wanted, 1e-6)
    with torch.no_grad():
        close(model(x), wanted, 1e-6)


def test_depthwise_equals_torch():
    model, x = redraw(DepthwiseTranspose(4, 3)), torch.randn(2, 7, 4)
    wanted = F.conv_transpose1d(x.transpose(1, 2), model.weight.T[:, None], None, 3, groups=4)[..., :-3].transpose(1, 2)
    close(model(x), wanted, 1e-6)


def test_gradients_of_all_three():
    for model in (conv(8, 4, 1, False, True), redraw(ConvTranspose(3, 2, 2)), redraw(DepthwiseTranspose(3, 2))):
        model.double()
        x = torch.randn(1, 8, 3, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(model, {"weight": w}, x),  # noqa: B023
                                        (x, model.weight))


@settings(max_examples=15)
@given(st.sampled_from(range(len(KINDS))), st.lists(st.integers(1, 4), min_size=1, max_size=6), st.booleans())
@torch.no_grad()
def test_pieces_equal_the_whole(kind, sizes, elu):
    model = conv(*KINDS[kind], elu=elu)
    x = torch.randn(2, sum(sizes) * model.stride, 3)
    state = model.init_state(2, 4 * model.stride, x.dtype, x.device)
    pieces = [model(piece, state) for piece in x.split([size * model.stride for size in sizes], 1)]
    close(torch.cat(pieces, 1), model(x), 1e-6)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.booleans())
@torch.no_grad()
def test_transposed_pieces_equal_the_whole(sizes, depthwise):
    model = redraw(DepthwiseTranspose(3, 2) if depthwise else ConvTranspose(3, 5, 2))
    x = torch.randn(2, sum(sizes), 3)
    state = model.init_state(2, 4, x.dtype, x.device)
    close(torch.cat([model(piece, state) for piece in x.split(sizes, 1)], 1), model(x), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_that_pause_are_as_if_the_call_had_not_been(kind):
    model = conv(*kind)
    x, state = torch.randn(2, 12, 3), model.init_state(2, 12, torch.float32, torch.device("cpu"))
    model(torch.full_like(x, 7.0), state, torch.tensor([True, False]))
    both = model(x, state, torch.tensor([False, True]))
    close(both[1], model(x)[1], 1e-6)
    first = model(x, state)[0]
    close(first, model(torch.cat([torch.full_like(x, 7.0), x], 1))[0, -len(first):], 1e-6)


def test_a_kernel_with_gaps_is_refused():
    with pytest.raises(InputError, match="kernel of 2 leaves gaps at a stride of 3"):
        Conv(1, 1, 2, stride=3)
