"""Losses and the bias update that keep experts equally busy, against transformers and a plain loop in float64."""

import pytest
import torch
from support import attention, redraw
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mm import TextDecoder, spec
from mm.errors import InputError
from mm.nn.balance import balance_loss, load, move_corrections, z_loss
from mm.nn.moe import Moe, Route
from mm.nn.transformer import Transformer

EXPERTS, CHOSEN = 6, 2
EXPERT = spec.Mlp(hidden=10, act="silu", gated=True)


def route(tokens=20, dtype=torch.float64):
    logits = torch.randn(tokens, EXPERTS, dtype=dtype, requires_grad=True)
    return Route(logits, logits.topk(CHOSEN).indices, logits.topk(CHOSEN).values.softmax(-1))


def stack(router=None, depth=3):
    """Mixtures in every layer but the second."""
    moe = spec.Moe(experts=EXPERTS, chosen=CHOSEN, expert=EXPERT,
                   router=router or spec.Router(score="sigmoid", correction=True))
    layers = (spec.Layer(mixer=attention(window=spec.CAUSAL), mlp=EXPERT if i == 1 else moe) for i in range(depth))
    return spec.Stack(dim=32, layers=tuple(layers))


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_loss_equals_transformers(masked):
    torch.manual_seed(0)
    one, mask = route(24, torch.float32), (torch.rand(3, 8) > 0.4) if masked else None
    theirs = load_balancing_loss_func((one.logits,), EXPERTS, CHOSEN, mask)
    ours = balance_loss(one, mask)
    assert (ours - theirs).abs() <= 1e-6
    a, b = (torch.autograd.grad(loss, one.logits)[0] for loss in (ours, theirs))
    assert (a - b).abs().max() <= 1e-7


def plain_balance(one, mask):
    kept = [i for i in range(len(mask)) if mask[i]]
    total = 0
    for e in range(EXPERTS):
        share = sum(e in one.chosen[i].tolist() for i in kept) / len(kept)
        total = total + share * sum(torch.softmax(one.logits[i], 0)[e] for i in kept) / len(kept)
    return EXPERTS * total


def plain_z(one, mask):
    kept = [torch.log(one.logits[i].exp().sum()) ** 2 for i in range(len(mask)) if mask[i]]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("ours, plain", [(balance_loss, plain_balance), (z_loss, plain_z)])
def test_losses_equal_a_plain_loop_with_gradients(ours, plain):
    torch.manual_seed(1)
    one, mask = route(), torch.rand(20) > 0.3
    a, b = ours(one, mask), plain(one, mask)
    assert (a - b).abs() <= 1e-12
    assert (torch.autograd.grad(a, one.logits)[0] - torch.autograd.grad(b, one.logits)[0]).abs().max() <= 1e-12
    assert torch.equal(ours(one), ours(one, torch.ones(4, 5, dtype=torch.bool)))


def test_equal_use_is_the_least():
    level = Route(torch.zeros(12, EXPERTS), torch.arange(24).view(12, 2) % EXPERTS, torch.ones(12, 2))
    assert balance_loss(level) == pytest.approx(CHOSEN)
    assert load(level).tolist() == [4.0] * EXPERTS
    assert balance_loss(Route(torch.tensor([[9.0, 9, 0, 0, 0, 0]]), torch.tensor([[0, 1]]), torch.ones(1, 2))) > 5.9


def losses(model, x, every):
    model.checkpoint_blocks(every)
    routes = []
    out = model(x, routes=routes)
    loss = out.square().mean() + sum(balance_loss(one) + 0.1 * z_loss(one) for one in routes)
    return loss, routes, torch.autograd.grad(loss, list(model.parameters()))


def test_routes_are_the_same_with_checkpointed_blocks():
    torch.manual_seed(0)
    model, x = redraw(Transformer(stack())).double(), torch.randn(2, 7, 32).double()
    plain, routes, gradients = losses(model, x, 0)
    again, same, recomputed = losses(model, x, 1)
    assert len(routes) == len(same) == 2 and torch.equal(plain, again)
    for a, b in zip(gradients, recomputed, strict=True):
        assert (a - b).abs().max() <= 1e-12
    router = model.blocks[0].mlp.router
    first = torch.autograd.grad(balance_loss(routes_of(model, x)[0]), router.weight)[0]
    assert first.abs().max() > 0


def routes_of(model, x):
    routes = []
    model(x, routes=routes)
    return routes


def test_routes_come_out_of_compiled_blocks():
    torch._dynamo.reset()
    model, x = redraw(Transformer(stack(depth=1))), torch.randn(2, 7, 32)
    expected = routes_of(model, x)[0]
    model.blocks[0].compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found = routes_of(model, x)[0]
        assert torch.equal(found.chosen, expected.chosen)
        a, b = (torch.autograd.grad(balance_loss(one), model.blocks[0].mlp.router.weight, retain_graph=True)[0]
                for one in (found, expected))
        assert (a - b).abs().max() <= 1e-6


def test_a_decoder_gives_its_routes():
    model = TextDecoder(spec.DecoderSpec(embed=spec.Embed(vocab=50), stack=stack(), context=16))
    routes, ids = [], torch.randint(50, (2, 9))
    hidden = model.hidden(ids, routes=routes)
    assert [tuple(one.logits.shape) for one in routes] == [(18, EXPERTS)] * 2
    assert torch.equal(hidden, model.hidden(ids))
    with pytest.raises(InputError, match="whole pass"), torch.no_grad():
        model.hidden(ids, routes=routes, state=model.init_state(2))


def test_corrections_move_against_load_until_it_is_level():
    torch.manual_seed(0)
    model, x = Transformer(stack()), torch.randn(8, 16, 32) + torch.randn(32)
    spread = [load(one).std() for one in routes_of(model, x)]
    before = model.blocks[0].mlp.router.correction.clone()
    loads = [load(one) for one in routes_of(model, x)]
    move_corrections(model, loads, 0.01)
    moved = model.blocks[0].mlp.router.correction - before
    assert torch.equal(moved, 0.01 * (loads[0].mean() - loads[0]).sign())
    for _ in range(80):
        move_corrections(model, [load(one) for one in routes_of(model, x)], 0.02)
    for one, was in zip(routes_of(model, x), spread, strict=True):
        assert load(one).std() < 0.3 * was


def test_mixtures_without_a_correction_stay():
    model = Transformer(stack(spec.Router()))
    move_corrections(model, [torch.arange(EXPERTS).float()] * 2)
    assert all(module.router.correction is None for module in model.modules() if isinstance(module, Moe))


def test_wrong_sizes_are_named():
    with pytest.raises(InputError, match="2 mixtures of 6 experts"):
        move_corrections(Transformer(stack()), [torch.zeros(EXPERTS)])
    with pytest.raises(InputError, match="20 tokens"):
        balance_loss(route(), torch.ones(3, 5))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_correction_stays_float32_in_a_checkpoint_of_bfloat16(dtype, tmp_path):
    model = TextDecoder(spec.DecoderSpec(embed=spec.Embed(vocab=50), stack=stack(), context=16))
    correction = model.stack.blocks[0].mlp.router.correction
    correction.normal_()
    held = correction.clone()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path)
    again = TextDecoder.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(again.stack.blocks[0].mlp.router.correction, held)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
