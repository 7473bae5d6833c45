"""Matrix products: every path gives what the plain one gives."""

import pytest
import torch
import torch.nn.functional as F
from support import close

from mm.nn.linear import (
    LARGE,
    FusedLinear,
    add,
    each,
    faster_as_columns,
    faster_in_onednn,
    linear,
    multiply,
    plain,
    worth_it,
)


@pytest.mark.parametrize("shape, transposed, path", [
    ((1, 512), False, ""), ((2, 0, 512), False, ""), ((2, 1, 512), False, "columns"), ((2, 3, 512), False, "columns"),
    ((5, 9, 512), False, "onednn"), ((1, 512), True, ""), ((2, 512), True, ""), ((2, 3, 512), True, "onednn"),
    ((64, 512), True, "onednn")])
@pytest.mark.parametrize("bias", [True, False])
def test_every_path_equals_the_plain_product(shape, transposed, path, bias):
    x, weight = torch.randn(shape), torch.randn(LARGE // 512, 512) / 20
    weight = weight.t().contiguous().t() if transposed else weight
    bias = torch.randn(len(weight)) if bias else None
    rows = x.numel() // 512
    with torch.no_grad():
        assert plain(x, weight) and (rows > 1 and faster_as_columns(rows, weight)) == (path == "columns")
        assert path == "columns" or (rows > 1 and faster_in_onednn(rows, weight)) == (path == "onednn")
        wide = torch.stack([x, x], -1)[..., 0]
        for given in (x, x.transpose(0, -2), wide):
            out = linear(given, weight, bias)
            close(out, F.linear(given, weight, bias))
            assert out.is_contiguous()


def test_parts_of_wider_tensors_are_read_where_they_lie():
    wide, weight = torch.randn(8, 9, 1024), torch.randn(512, 512) / 20
    with torch.no_grad():
        close(linear(wide[..., 512:], weight), F.linear(wide[..., 512:], weight))
        close(linear(wide[:, ::2, :512], weight), F.linear(wide[:, ::2, :512], weight))


@pytest.mark.parametrize("shape", [(6, 40, 64), (240, 64)])
@pytest.mark.parametrize("out, bias", [(160, True), (64, False)])
def test_much_work_has_the_gradients_of_the_plain_product_twice_over(shape, out, bias, monkeypatch):
    monkeypatch.setattr("mm.nn.linear.WORK", 240 * 64 * 64)
    x, weight, slope = torch.randn(64, *shape[:-1]).movedim(0, -1), torch.randn(out, 64), torch.randn(*shape[:-1], out)
    given = (x, weight, torch.randn(out)) if bias else (x, weight)
    given = [one.requires_grad_() for one in given]
    assert type(linear(*given).grad_fn).__name__ == "ProductBackward"

    def all_of(f, *inputs):
        made = f(*inputs)
        first = torch.autograd.grad((made * slope.to(made.dtype)).sum(), inputs, create_graph=True)
        return made, *first, *torch.autograd.grad(sum(one.square().sum() for one in first[:2]), inputs[:2])
    exact = all_of(F.linear, *[one.detach().double().requires_grad_() for one in given])
    for ours, theirs in zip(all_of(linear, *given), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())


def test_products_side_by_side_and_their_gradients(monkeypatch):
    x, weight = torch.randn(3, 80, 32, requires_grad=True), torch.randn(3, 48, 32, requires_grad=True)
    slope = torch.randn(3, 80, 48)

    def all_of():
        made = each(x, weight)
        return made, *torch.autograd.grad((made * slope).sum(), (x, weight))
    usual = all_of()
    monkeypatch.setattr("mm.nn.linear.WORK", 80 * 48 * 32)
    assert worth_it(80, weight[0]) and not worth_it(79, weight[0])
    monkeypatch.setattr(torch, "bmm", None)
    for ours, theirs in zip(all_of(), usual, strict=True):
        close(ours, theirs)


def test_other_dtypes_transforms_and_small_weights_take_the_plain_path():
    x, weight = torch.randn(64, 512), torch.randn(512, 512)
    seen = torch.func.vmap(lambda one: one * plain(one, weight))(x)
    assert not seen.any()
    assert linear(x, weight.requires_grad_()[:100]).grad_fn.name() != "ProductBackward"
    with torch.inference_mode():
        assert plain(x, weight) and not plain(x.double(), weight.double())
        assert not faster_in_onednn(64, weight[:100]) and not faster_as_columns(2, weight[:100])
        with torch.autocast("cpu", torch.bfloat16):
            assert not plain(x, weight)


@pytest.mark.parametrize("f, usual", [(add, torch.add), (multiply, torch.mul)])
def test_results_take_the_memory_that_is_given_away_unless_a_gradient_needs_it(f, usual):
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    expected, kept = usual(x, y), x.clone()
    assert f(x, y).data_ptr() != x.data_ptr() and torch.equal(x, kept)
    with torch.no_grad():
        assert f(x.bfloat16(), y).dtype == torch.float32
        assert f(x, y).data_ptr() == x.data_ptr()
    assert torch.equal(x, expected)


def test_parts_without_a_bias_get_none():
    fused = FusedLinear(8, (4, 6, 2), (True, False, True))
    torch.nn.init.normal_(fused.bias)
    x = torch.randn(3, 8)
    parts = [F.linear(x, weight, bias) for weight, bias in
             zip(fused.weight.split((4, 6, 2)), (fused.bias[:4], None, fused.bias[4:]), strict=True)]
    for ours, theirs in zip(fused(x), parts, strict=True):
        close(ours, theirs)
