"""A cache of 8 bits: a quarter of the memory, close to the full one, a state like any other."""

import pytest
import torch
from support import attention, redraw, stack

from mm import TextDecoder, spec
from mm.decode import Engine, Sampling
from mm.nn.state import Int8Cache
from mm.spec import CAUSAL, DecoderSpec, Embed, Rope, Window
from mm.tree import tensors

SPEC = DecoderSpec(embed=Embed(vocab=31), context=64, stack=stack(
    attention(window=Window(left=6, right=0), rope=Rope(), head_dim=32),
    attention(window=CAUSAL, rope=Rope(), head_dim=32),
    final_norm=spec.RMSNorm()))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return redraw(TextDecoder(SPEC))


def run(model, ids, state, sizes=(1, 3, 4)):
    out, at = [], 0
    while at < ids.shape[1]:
        out.append(model(ids[:, at:at + sizes[len(out) % len(sizes)]], state=state))
        at += out[-1].shape[1]
    return torch.cat(out, 1)


@torch.no_grad()
def test_close_to_the_whole_sequence_past_the_window(model):
    ids = torch.randint(31, (3, 40))
    full, small = model(ids), run(model, ids, model.init_state(3, chunk=4, cache="int8"))
    assert (full - small).norm() / full.norm() < 0.02
    again = run(model, ids, model.init_state(3, chunk=4, cache="int8"), sizes=(2,))
    torch.testing.assert_close(again, small, atol=2e-2, rtol=0)


def test_rounding_is_half_a_step_at_most():
    x = torch.randn(2, 3, 5, 16) * torch.tensor([1e-3, 1.0, 100.0]).view(1, 3, 1, 1)
    cache = Int8Cache.like(torch.zeros(2, 3, 9, 16), torch.zeros(2, 3, 9, 16))
    from mm.nn.state import Slots
    from mm.positions.visibility import along
    slots = Slots(torch.full((2, 9, 3), -1))
    k, v, _ = cache.write(x, 0 * x, slots.write(along(2, 5)))
    assert ((k[:, :, :5] - x).abs() <= x.abs().amax(-1, keepdim=True) / 127 / 2 * 1.001).all() and not v.any()


@torch.no_grad()
def test_select_insert_save_reset_and_rewind(model, tmp_path):
    ids = torch.randint(31, (3, 20))
    state = model.init_state(3, chunk=4, cache="int8")
    run(model, ids, state)
    wanted = model(ids[:, :1], state=state.clone())
    state.save(tmp_path / "state.safetensors")
    loaded = model.init_state(3, chunk=4, cache="int8").load(tmp_path / "state.safetensors")
    assert torch.equal(model(ids[:, :1], state=loaded), wanted)
    some = torch.tensor([2, 0])
    other = model.init_state(2, chunk=4, cache="int8")
    other.insert(torch.tensor([0, 1]), state.select(some))
    torch.testing.assert_close(model(ids[some, :1], state=other), wanted[some])
    state.rewind(torch.tensor([17, 20, 18]))
    model(ids[:, :1], state=state)
    state.reset()
    assert all(not x.any() for cache in state.caches for _, x in tensors(cache))
    assert state.caches[0].k.dtype == torch.int8


@torch.no_grad()
def test_it_takes_little_memory(model):
    def size(kind):
        return sum(x.nbytes for _, x in tensors(model.init_state(2, cache=kind).caches))
    assert size("int8") / size("full") == (32 + 4) / 128


def test_an_engine_holds_more_rows_with_it(model):
    engine = Engine(model, 2, 40, 4, cache="int8")
    requests = [engine.submit([i, 5], Sampling(max_tokens=10)) for i in range(3)]
    engine.run()
    assert all(len(request.out) == 10 for request in requests)
