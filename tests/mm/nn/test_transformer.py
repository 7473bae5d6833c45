"""Stacks: kinds of numbers, the meta device, initial weights, features, checkpointed blocks, compile and export."""

import copy

import pytest
import torch
from support import attention, close, model, stack
from torch.export import Dim

from mm import spec
from mm.errors import InputError
from mm.nn.transformer import Transformer
from mm.positions import rope
from mm.positions.visibility import At, along, packed
from mm.spec import CAUSAL, LayerNorm, RMSNorm, Rope, Window

NEAR = attention(window=Window(left=4, right=0), rope=Rope(), sinks=True, qk_norm=spec.QKNorm(norm=RMSNorm()))
FAR = attention(window=CAUSAL, rope=Rope(layout="interleaved", scaling=spec.Yarn(factor=4.0, original=8)), softcap=3.0,
                gate="head")
PLAIN = attention(window=CAUSAL, inner_norm=LayerNorm())
PAIR = spec.Differential(base=attention(heads=2, kv_heads=1, window=CAUSAL, rope=Rope()), lambda_init=0.4)
GLU = spec.Mlp(hidden=48, act="silu", gated=True)
RICH = stack(NEAR, FAR, PLAIN, PAIR, mlp=GLU, norm=RMSNorm(), placement="sandwich", layer_scale=0.5,
             final_norm=LayerNorm())
PICTURE = stack(attention(rope=Rope(axes=spec.Axial())), attention(kv_heads=4, rope=Rope(axes=spec.Mixed())),
                attention(extra_key=True), placement="parallel")
BIASED = stack(attention(window=CAUSAL), attention(window=CAUSAL), relative=spec.Buckets())


def coords(batch, length):
    return along(batch, length, coords=torch.rand(batch, length, 2, generator=torch.Generator().manual_seed(0)))


# --------------------------------------------------------------------------------------- kinds of numbers
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.3), (torch.float16, 0.05)])
@pytest.mark.parametrize("settings", [RICH, PICTURE, BIASED])
def test_every_dtype_runs_forward_and_back(settings, dtype, tolerance):
    net, x = model(settings), torch.randn(2, 20, 32)
    at = coords(2, 20) if settings is PICTURE else along(2, 20)
    wanted = net(x, at)
    narrow = copy.deepcopy(net).to(dtype)
    y = narrow(x.to(dtype), at)
    assert y.dtype == dtype
    close(y.float(), wanted, tolerance)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in narrow.parameters())


@pytest.mark.parametrize("settings", [RICH, PICTURE, BIASED])
def test_autocast_runs_forward_and_back(settings):
    net, x = model(settings), torch.randn(2, 20, 32)
    at = coords(2, 20) if settings is PICTURE else along(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, at)
    close(y.float(), net(x, at), 0.3)
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.3), (torch.float16, 0.05)])
def test_half_precision_streams(dtype, tolerance):
    net, x = model(RICH, dtype), torch.randn(2, 20, 32).to(dtype)
    state = net.init_state(2, length=20, chunk=3)
    close(torch.cat([net(part, state=state) for part in x.split(6, 1)], 1), net(x), tolerance)


# ------------------------------------------------------------------------------- meta device, initial weights
@pytest.mark.parametrize("settings", [RICH, PICTURE, BIASED])
def test_meta_device_then_reset_is_a_fresh_model(settings):
    with torch.device("meta"):
        net = Transformer(settings)
        x = torch.zeros(2, 20, 32)
        at = along(2, 20, device="meta", coords=torch.zeros(2, 20, 2) if settings is PICTURE else None)
        assert net(x, at).shape == x.shape and net(x, at).device.type == "meta"
    net = net.to_empty(device="cpu")
    for parameter in net.parameters():
        parameter.data.fill_(torch.nan)
    torch.manual_seed(3)
    net.reset_parameters()
    fresh = Transformer(settings)
    torch.manual_seed(3)
    fresh.reset_parameters()
    for ours, theirs in zip(net.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_initial_weights_keep_the_residual_stream_in_bounds():
    net = Transformer(stack(*[attention(kv_heads=4, head_dim=32)] * 12, dim=128, mlp=spec.Mlp(hidden=512)))
    weights = dict(net.named_parameters())
    for name, std in (("mixer.qkv", 128**-0.5), ("mixer.out", (128 * 24) ** -0.5), ("mlp.up", 256**-0.5),
                      ("mlp.down", (128 * 24) ** -0.5)):
        assert abs(weights[f"blocks.5.{name}.weight"].std() / std - 1) < 0.05
        assert weights[f"blocks.5.{name}.bias"].eq(0).all()
    y = net(torch.randn(2, 30, 128))
    assert 1 < y.std() < 2


def test_initial_values_of_what_is_not_a_matrix():
    net = Transformer(stack(attention(sinks=True, extra_key=True), norm=RMSNorm(order="one_plus"), relative=None))
    block = net.blocks[0]
    assert block.mixer_norm.weight.eq(0).all() and block.mixer.sinks.eq(0).all() and block.mixer.extra_k.eq(0).all()
    mixed = Transformer(PICTURE).blocks[1].mixer.mixed
    assert mixed.shape == (2, 4, 4) and mixed.norm(dim=0).max() < 1.001 and mixed.requires_grad


# ----------------------------------------------------------------------------------------------- features
def test_features_are_the_stream_after_each_block():
    net, x = model(RICH), torch.randn(2, 9, 32)
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, y: seen.append(y))
    close(net.final_norm(net.features(x, [3])[0]), net(x), 0)
    del seen[4:]
    for ours, theirs in zip(net.features(x, [0, 2, -1, -3]), [seen[0], seen[2], seen[3], seen[1]], strict=True):
        assert torch.equal(ours, theirs)


def test_layers_share_rotations_per_distinct_rope(monkeypatch):
    net, rotated = model(stack(NEAR, FAR, NEAR, PLAIN)), []
    monkeypatch.setattr(rope, "rotation",
                        lambda *args, original=rope.rotation: rotated.append(args[1]) or original(*args))
    net(torch.randn(1, 9, 32))
    assert rotated == [NEAR.rope, FAR.rope]


def test_an_empty_stack_is_its_norm():
    x = torch.randn(1, 3, 32)
    close(Transformer(spec.Stack(dim=32, layers=(), final_norm=LayerNorm()))(x), torch.layer_norm(x, (32,)))


# ------------------------------------------------------------------------------- activation checkpointing
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less():
    dropped = stack(*[attention(window=CAUSAL, dropout=0.2, rope=Rope())] * 4, dropout=0.3, drop_path=0.3,
                    mlp=spec.Mlp(hidden=256, dropout=0.2))
    net, x, outcome = model(dropped).train(), torch.randn(4, 20, 32), {}
    for every in (0, 1, 2):
        net.checkpoint_blocks(every)
        assert net.checkpointed == frozenset(range(0, 4, every) if every else ())
        net.zero_grad()
        torch.manual_seed(1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            y = net(x)
        y.square().sum().backward()
        outcome[every] = (y, [p.grad.clone() for p in net.parameters()], sum(kept))
    for every in (1, 2):
        assert torch.equal(outcome[every][0], outcome[0][0])
        assert all(map(torch.equal, outcome[every][1], outcome[0][1]))
    assert outcome[1][2] < 0.3 * outcome[0][2] < outcome[2][2] < outcome[0][2]


# --------------------------------------------------------------------------------------- compile and export
@pytest.mark.parametrize("settings", [RICH, PICTURE])
def test_compiles_into_one_graph(settings):
    net, x = model(settings), torch.randn(2, 20, 32)
    at = coords(2, 20) if settings is PICTURE else packed(torch.tensor([[0] * 8 + [1] * 12, [2] * 15 + [-1] * 5]))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    y = compiled(x, at)
    close(y, net(x, at))
    y.square().sum().backward()
    assert net.blocks[0].mixer.qkv.weight.grad.isfinite().all()


def test_long_windows_compile_into_one_graph():
    """More than one tile, with the recomputation that the backward pass asks for."""
    net, x = model(stack(NEAR, dim=32)), torch.randn(1, 300, 32)
    torch._dynamo.reset()
    y = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    wanted = net(x)
    close(y, wanted)
    theirs, = torch.autograd.grad(wanted.square().sum(), net.blocks[0].mixer.qkv.weight)
    ours, = torch.autograd.grad(y.square().sum(), net.blocks[0].mixer.qkv.weight)
    close(ours, theirs, 1e-4)


@torch.no_grad()
def test_a_step_with_state_compiles_into_one_graph_and_is_not_compiled_again():
    net, x = model(stack(NEAR, FAR, PLAIN)), torch.randn(2, 12, 32)
    state, rows = net.init_state(2, length=20), torch.ones(2, dtype=torch.bool)
    torch._dynamo.reset()
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    step = torch.compile(net, fullgraph=True, backend=backend)
    y = torch.cat([step(x[:, i:i + 1], state=state, rows=rows) for i in range(12)], 1)
    close(y, net(x))
    assert len(graphs) == 1


@pytest.mark.full
def test_inductor_agrees():
    net, x = model(stack(NEAR)), torch.randn(2, 20, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(net, fullgraph=True)(x), net(x))


@pytest.mark.parametrize("settings", [RICH, BIASED])
def test_exports_with_any_batch_and_length(settings):
    net = model(settings)
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=1024)}
    program = torch.export.export(net, (torch.randn(2, 20, 32),), dynamic_shapes={"x": sizes}, strict=False)
    for batch, length in ((1, 7), (3, 50), (2, 300)):
        x = torch.randn(batch, length, 32)
        close(program.module()(x), net(x), 2e-5)


def test_exports_with_positions_as_inputs():
    net, document = model(RICH), torch.tensor([[0] * 8 + [1] * 12])
    program = torch.export.export(net, (torch.randn(1, 20, 32), packed(document)), strict=False)
    x, other = torch.randn(1, 20, 32), packed(torch.tensor([[3] * 5 + [4] * 11 + [-1] * 4]))
    close(program.module()(x, other), net(x, other))


# ------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize("x, at, words", [
    (torch.zeros(2, 5, 31), None, r"expected \(B, T, 32\)"),
    (torch.zeros(5, 32), None, r"expected \(B, T, 32\)"),
    (torch.zeros(2, 0, 32), None, "T of at least 1"),
    (torch.zeros(2, 5, 32), along(2, 6), r"positions \(2, 6\) do not fit tokens \(2, 5, 32\)"),
    (torch.zeros(2, 5, 32), along(3, 5), "do not fit"),
])
def test_wrong_shapes_are_named(x, at, words):
    net = model(stack(NEAR, FAR))
    with pytest.raises(InputError, match=words):
        net(x, at)
    with pytest.raises(InputError, match=words), torch.no_grad():
        net(x, at, state=net.init_state(2, length=8))


def test_an_empty_batch_is_an_empty_answer():
    assert model(RICH)(torch.zeros(0, 5, 32)).shape == (0, 5, 32)


def test_a_picture_without_coordinates_is_refused():
    with pytest.raises(InputError, match="needs coordinates"):
        model(PICTURE)(torch.zeros(1, 4, 32), At(torch.arange(4)[None]))
