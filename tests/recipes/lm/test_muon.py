"""Muon against its definition by singular values, and what it is given to move."""

import pytest
import torch

from mm import spec
from mm.recipes.lm.muon import Muon, matrices, muon, orthogonal, step_of
from mm.recipes.lm.settings import LmOptim, LmShape
from mm.recipes.lm.start import new_decoder
from mm.recipes.train.plans import split_order
from mm.text.decoder import TextDecoder


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The quintic of Jordan et al. on singular values, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s.unsqueeze(-2)) @ v


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (3, 12, 5)])
def test_a_step_is_orthogonal(shape):
    matrix = torch.randn(shape)
    torch.testing.assert_close(orthogonal(matrix).double(), by_singular_values(matrix), atol=1e-5, rtol=1e-5)


def test_parts_and_experts_are_turned_one_by_one():
    weight, experts = torch.nn.Parameter(torch.randn(12, 6)), torch.nn.Parameter(torch.randn(2, 4, 6))
    optimizer = Muon([{"params": [weight], "parts": [8, 4], "split": 1, "weight_decay": 0.5},
                      {"params": [experts], "parts": [4], "split": 1, "weight_decay": 0.0}], 0.9, lr=0.1)
    before, grads = (weight.detach().clone(), experts.detach().clone()), (torch.randn(12, 6), torch.randn(2, 4, 6))
    for p, grad in zip((weight, experts), grads, strict=True):
        p.grad = grad.clone()
    optimizer.step()
    scaled = [0.2 * max(part.shape) ** 0.5 * by_singular_values(part).float()
              for part in (grads[0][:8], grads[0][8:])]  # the first step's momentum only scales the gradient
    torch.testing.assert_close(weight, before[0] * (1 - 0.1 * 0.5) - 0.1 * torch.cat(scaled), atol=1e-5, rtol=1e-5)
    turned = torch.stack([0.2 * 6**0.5 * by_singular_values(part).float() for part in grads[1]])
    torch.testing.assert_close(experts, before[1] - 0.1 * turned, atol=1e-5, rtol=1e-5)
    assert torch.equal(weight.grad, grads[0])


def test_rows_that_were_dealt_out_make_the_same_step():
    matrix, order = torch.randn(24, 6), split_order([16, 4, 4], 2)
    assert order.tolist() == [*range(8), 16, 17, 20, 21, *range(8, 16), 18, 19, 22, 23]
    torch.testing.assert_close(step_of(matrix[order], [16, 4, 4], 2), step_of(matrix, [16, 4, 4], 1)[order])


def test_momentum_and_weight_decay_are_those_of_torch():
    ours, theirs = (torch.nn.Parameter(torch.eye(6, 9)) for _ in range(2))
    mine = Muon([{"params": [ours], "parts": [6], "split": 1, "weight_decay": 0.1}], 0.8, lr=0.05)
    peer = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(6, 9)
        mine.step()
        peer.step()
    gap, way = (ours - theirs).norm(), (theirs - torch.eye(6, 9)).norm()
    assert gap < 0.02 * way  # torch's works in bfloat16


def test_matrices_inside_blocks_move_by_muon_and_the_rest_by_adamw():
    model = TextDecoder(new_decoder(LmShape(width=32, depth=1, heads=4, kv_heads=2, tied=False), 50, 8))
    assert matrices(model) == {
        "stack.blocks.0.mixer.qkv.weight": ((32, 16, 16), 1), "stack.blocks.0.mixer.out.weight": ((32,), 1),
        "stack.blocks.0.mlp.up.weight": ((96,), 1), "stack.blocks.0.mlp.gate.weight": ((96,), 1),
        "stack.blocks.0.mlp.down.weight": ((32,), 1)}
    optimizer = muon(model, LmOptim(kind="muon"))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    kept = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    turned = {name for name, state in kept.items() if state == {"step", "momentum"}}
    assert turned == set(matrices(model))
    assert all(state == {"step", "exp_avg", "exp_avg_sq"} for name, state in kept.items() if name not in turned)


def test_experts_are_matrices_too():
    expert = spec.Mlp(hidden=8, gated=True, up_bias=False, down_bias=False)
    layer = spec.Layer(mixer=spec.Attention(heads=2, kv_heads=2, head_dim=8), mlp=spec.Moe(
        experts=3, chosen=2, expert=expert))
    model = TextDecoder(spec.DecoderSpec(embed=spec.Embed(vocab=20), context=8,
                                         stack=spec.Stack(dim=16, layers=(layer,))))
    found = {name: parts for name, parts in matrices(model).items() if "mlp" in name}
    assert found == {f"stack.blocks.0.mlp.experts.{name}.weight": ((rows,), 1)
                     for name, rows in (("up", 8), ("gate", 8), ("down", 16))}
