"""The gated MLP of steps that have weights of their own: the product of the plain one, and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from mm.nn.gated import silu_mlp


@pytest.mark.parametrize("trained", [(0, 1, 2), (0,), (1,), (2,)])
def test_gradients_are_those_of_the_plain_products(trained):
    shapes = (3, 5, 4), (3, 12, 4), (3, 4, 6)
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=i in trained) for i, shape in enumerate(shapes)]
    x, up, down = inputs
    gate, other = torch.bmm(x, up.mT).chunk(2, -1)
    wanted, slope = torch.bmm(F.silu(gate) * other, down.mT), torch.randn(3, 5, 4, dtype=torch.double)
    made, moved = silu_mlp(x, up, down), [inputs[i] for i in trained]
    torch.testing.assert_close(made, wanted)
    for ours, theirs in zip(grad(made, moved, slope), grad(wanted, moved, slope), strict=True):
        torch.testing.assert_close(ours, theirs)
