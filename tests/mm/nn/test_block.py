"""Blocks: placements written out, activations, LayerScale, dropout and stochastic depth, gradients."""

from itertools import product

import pytest
import torch
from support import attention, close, model, redraw, stack
from transformers.activations import ACT2FN

from mm import spec
from mm.errors import InputError
from mm.nn.attention import AttentionInputs
from mm.nn.block import Block
from mm.nn.mlp import ACTIVATIONS, Mlp
from mm.positions.visibility import along
from mm.spec import CAUSAL, Layer, RMSNorm, Rope

NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_are_transformers(act):
    x = torch.linspace(-6, 6, 500)
    close(ACTIVATIONS[act](x), ACT2FN[NAMES.get(act, act)](x), 1e-6)


@pytest.mark.parametrize("gated, up_bias, down_bias", product([False, True], repeat=3))
def test_mlp_written_out(gated, up_bias, down_bias):
    mlp = redraw(Mlp(8, spec.Mlp(hidden=12, act="silu", gated=gated, up_bias=up_bias, down_bias=down_bias,
                                 inner_norm=RMSNorm())))
    weights, x = dict(mlp.named_parameters()), torch.randn(5, 8)
    assert ("up.bias" in weights, "down.bias" in weights) == (up_bias, down_bias)
    def linear(name, y):
        return y @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)
    def silu(y):
        return y * y.sigmoid()
    hidden = silu(linear("gate", x)) * linear("up", x) if gated else silu(linear("up", x))
    close(mlp(x), linear("down", mlp.inner_norm(hidden)), 1e-6)


# ---------------------------------------------------------------------------------------------- placements
FORMULAS = {
    "pre": lambda y, f, norm, post_norm, gain: y + gain * f(norm(y)),
    "post_branch": lambda y, f, norm, post_norm, gain: y + gain * norm(f(y)),
    "sandwich": lambda y, f, norm, post_norm, gain: y + gain * post_norm(f(norm(y))),
    "residual_post": lambda y, f, norm, post_norm, gain: norm(y + gain * f(y)),
}


def branches(block, inputs, memory, memory_at):
    """(branch, norm, post-norm, scale) of each part that the block has."""
    parts = {"mixer": lambda y: block.mixer(y, inputs), "cross": lambda y: block.cross(y, inputs.at, memory, memory_at),
             "mlp": lambda y: block.mlp(y)}
    return [(run, *(getattr(block, f"{name}_{what}", None) for what in ("norm", "post_norm", "scale")))
            for name, run in parts.items() if getattr(block, name) is not None]


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("cross, mlp", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("placement", FORMULAS)
def test_serial_placements_written_out(placement, cross, mlp, scale):
    block = redraw(Block(32, Layer(mixer=attention(), cross=attention() if cross else None, placement=placement,
                                   mlp=spec.Mlp(hidden=48) if mlp else None, layer_scale=scale)))
    y = x = torch.randn(2, 9, 32)
    memory, inputs, memory_at = torch.randn(2, 5, 32), AttentionInputs(along(2, 9)), along(2, 5)
    parts = branches(block, inputs, memory, memory_at)
    assert len(parts) == 1 + cross + mlp
    for run, norm, post_norm, learned in parts:
        assert (learned is None) == (scale is None)
        gain = 1 if learned is None else learned
        y = FORMULAS[placement](y, run, norm, post_norm, gain)
    close(block(x, inputs, memory, memory_at), y, 1e-6)


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("placement", ["parallel", "parallel_norms"])
def test_parallel_placements_written_out(placement, scale):
    block = redraw(Block(32, Layer(mixer=attention(), mlp=spec.Mlp(hidden=48), placement=placement, layer_scale=scale)))
    x, inputs = torch.randn(2, 9, 32), AttentionInputs(along(2, 9))
    second = block.mixer_norm if placement == "parallel" else block.mlp_norm
    a, b = (1, 1) if scale is None else (block.mixer_scale, block.mlp_scale)
    close(block(x, inputs), x + a * block.mixer(block.mixer_norm(x), inputs) + b * block.mlp(second(x)), 1e-6)


def test_layer_scale_starts_at_its_value():
    block = Block(32, Layer(mixer=attention(), mlp=spec.Mlp(hidden=48), layer_scale=1e-4))
    assert block.mixer_scale.eq(1e-4).all() and block.mlp_scale.eq(1e-4).all() and block.cross_scale is None
    assert block.mixer_scale.requires_grad


def test_a_parallel_layer_needs_an_mlp_and_no_memory():
    for parts in (dict(), dict(mlp=spec.Mlp(hidden=8), cross=attention())):
        with pytest.raises(InputError, match="parallel"):
            Layer(mixer=attention(), placement="parallel", **parts)


# ---------------------------------------------------------------------------------- dropout, stochastic depth
def branch_ratio(**layer):
    """Training over evaluation output of a single branch: (300, 20, 32)."""
    net = model(stack(attention(), mlp=None, **layer), torch.float64)
    x = torch.randn(300, 20, 32, dtype=torch.float64)
    whole = net(x) - x
    return (net.train()(x) - x) / whole


def test_layer_dropout_zeroes_and_rescales_elements():
    ratio = branch_ratio(dropout=0.3)
    kept = ratio.abs() > 0.1
    close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.7), 1e-2)
    assert abs(kept.float().mean() - 0.7) < 0.01 and kept.float().mean((1, 2)).std() < 0.1


def test_drop_path_drops_whole_rows_and_rescales_the_others():
    ratio = branch_ratio(drop_path=0.4)
    rows = ratio.median(-1).values.median(-1).values
    close(ratio, rows[:, None, None].expand_as(ratio), 1e-2)
    kept = rows > 0.5
    close(rows[kept], torch.full_like(rows[kept], 1 / 0.6), 1e-3)
    assert abs(kept.float().mean() - 0.6) < 0.1


def test_drop_path_draws_for_each_branch():
    net = model(stack(attention(), drop_path=0.5, placement="parallel")).train()
    x = torch.randn(1, 4, 32).expand(400, -1, -1)
    outcomes = net(x).sum((1, 2)).mul(100).round().unique()
    assert len(outcomes) == 4  # neither, either, both


def test_mlp_dropout_is_before_the_last_product():
    mlp, x = redraw(Mlp(8, spec.Mlp(hidden=100, dropout=0.25))), torch.randn(400, 8)
    given = []
    mlp.down.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    mlp(x), mlp.train()(x)
    kept = given[1] != 0
    close(given[1][kept], given[0][kept] / 0.75, 1e-6)
    assert abs(kept.float().mean() - 0.75) < 0.01


@pytest.mark.parametrize("mixer", [dict(), dict(softcap=5.0), dict(window=spec.Window(left=3, right=3))])
def test_attention_dropout_drops_weights_while_training_alone(mixer):
    """Values of 1 turn the heads into sums of weights: 1 in evaluation, 1 on average in training."""
    net = model(stack(attention(dropout=0.5, **mixer), mlp=None))
    qkv, heads = net.blocks[0].mixer.qkv, []
    qkv.weight.data[48:], qkv.bias.data[48:] = 0, 1
    net.blocks[0].mixer.out.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    x = torch.randn(50, 20, 32)
    net(x), net.train()(x)
    close(heads[0], torch.ones_like(heads[0]))
    assert abs(heads[1].mean() - 1) < 0.05 and heads[1].std() > 0.1


def test_nothing_is_random_in_evaluation():
    net = model(stack(attention(dropout=0.5), dropout=0.5, drop_path=0.5, mlp=spec.Mlp(hidden=8, dropout=0.5)))
    x = torch.randn(3, 10, 32)
    assert torch.equal(net(x), net(x))
    assert not torch.equal(net.train()(x), net(x))


def test_drop_path_ramps_up_to_its_rate():
    close(torch.tensor(spec.drop_path_ramp(0.2, 5)), torch.linspace(0, 0.2, 5), 1e-7)
    assert spec.drop_path_ramp(0.2, 1) == [0.0]


# ----------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("mixer", [
    attention(head_dim=4, rope=Rope(), window=CAUSAL, qk_norm=spec.QKNorm(norm=RMSNorm(), over="flat")),
    attention(head_dim=4, rope=Rope(layout="interleaved"), softcap=2.0, sinks=True,
              window=spec.Window(left=2, right=0)),
    attention(head_dim=4, extra_key=True, gate="head", qk_norm=spec.QKNorm(norm=spec.L2Norm(), after_rope=True),
              rope=Rope()),
    spec.Differential(base=attention(heads=2, kv_heads=1, head_dim=4, rope=Rope()), lambda_init=0.5),
])
def test_gradients_in_double_precision(mixer):
    net = model(stack(mixer, dim=8, mlp=spec.Mlp(hidden=6, act="silu", gated=True), layer_scale=0.5), torch.float64)
    names, values = zip(*net.named_parameters(), strict=True)
    def run(x, *weights):
        return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x,))
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)
