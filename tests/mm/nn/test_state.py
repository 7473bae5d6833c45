"""Streaming state: any chunking, pausing, resetting, joining and rewinding gives what the whole sequence gives."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import attention, close, model, stack
from torch.utils import _pytree as pytree

from mm import spec
from mm.errors import InputError
from mm.nn.transformer import Transformer
from mm.positions.visibility import At, along, padded
from mm.spec import CAUSAL, Rope, Window, schema
from mm.tree import tensors

ROWS, LENGTH, CHUNK = 3, 64, 3
RINGS = (attention(window=Window(left=4, right=0), rope=Rope(), sinks=True), attention(window=Window(right=0, chunk=5)))
MIX = (*RINGS, attention(window=CAUSAL, rope=Rope(layout="interleaved"), extra_key=True, gate="head"))
DIFFERENTIAL = spec.Differential(base=attention(heads=2, kv_heads=1, window=Window(left=2, right=0), rope=Rope()),
                                 lambda_init=0.4)
LATENT = spec.Latent(heads=4, q_rank=12, kv_rank=16, nope_dim=6, rope_dim=4, value_dim=5, rope=Rope())
LATE_NORM = attention(window=CAUSAL, rope=Rope(), qk_norm=spec.QKNorm(norm=spec.L2Norm(), after_rope=True))
STACKS = {
    "rings": stack(*RINGS),
    "first": stack(attention(window=Window(left=6, right=0, first=2), rope=Rope()),
                   attention(window=Window(left=6, right=0)),
                   attention(window=Window(left=4, right=0, first=4), rope=Rope(dim=4, layout="interleaved"),
                             sinks=True, scale=0.5)),
    "static": stack(attention(window=CAUSAL, softcap=3.0), relative=spec.Alibi()),
    "both": stack(*MIX),
    "buckets": stack(attention(window=Window(left=6, right=0)), attention(window=CAUSAL), relative=spec.Buckets()),
    "differential": stack(DIFFERENTIAL, LATE_NORM, placement="parallel"),
    "latent": stack(LATENT, spec.Latent(heads=2, kv_rank=8, nope_dim=6, rope_dim=4, value_dim=20, bias=True,
                                        rope=Rope(layout="interleaved"), window=Window(left=4, right=0))),
}


def fresh(name):
    torch.manual_seed(0)
    net = model(STACKS[name])
    return net, net.init_state(ROWS, length=LENGTH, chunk=CHUNK)


class Company:
    """A state beside the tokens that each row has been given; every step is compared with the whole sequence."""

    def __init__(self, name):
        self.net, self.state = fresh(name)
        self.history = [torch.zeros(0, 32) for _ in range(ROWS)]
        self.furthest = [0] * ROWS

    def step(self, length, rows):
        x = torch.randn(ROWS, length, 32)
        grown = [torch.cat([past, new]) if on else past for past, new, on in zip(self.history, x, rows, strict=True)]
        if max(map(len, grown)) > LENGTH:
            return
        y = self.net(x, state=self.state, rows=None if all(rows) else torch.tensor(rows))
        self.history = grown
        self.furthest = [max(far, len(past)) for far, past in zip(self.furthest, grown, strict=True)]
        for row, on in enumerate(rows):
            if on:
                close(y[row], self.net(grown[row][None])[0, -length:])

    def reset(self, rows):
        self.state.reset(None if all(rows) else torch.tensor(rows))
        for row in range(ROWS):
            if rows[row]:
                self.history[row], self.furthest[row] = torch.zeros(0, 32), 0

    def rewind(self, back):
        """As far as a ring remembers: `chunk` tokens behind the furthest."""
        length = [max(len(past) - steps, far - CHUNK, 0) for past, steps, far in
                  zip(self.history, back, self.furthest, strict=True)]
        length = [min(new, len(past)) for new, past in zip(length, self.history, strict=True)]
        self.state.rewind(torch.tensor(length))
        self.history = [past[:new] for past, new in zip(self.history, length, strict=True)]

    def join(self, row, length):
        """Another conversation takes over a row."""
        x, other = torch.randn(1, length, 32), self.net.init_state(1, length=LENGTH, chunk=CHUNK)
        self.net(x, state=other)
        self.state.insert(torch.tensor([row]), other)
        self.history[row], self.furthest[row] = x[0], length

    def shuffle(self, order):
        self.state = self.state.select(torch.tensor(order)).clone()
        self.history, self.furthest = [self.history[i] for i in order], [self.furthest[i] for i in order]


rows = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)
steps = st.tuples(st.just("step"), st.integers(1, 9), rows)
events = st.one_of(steps, steps, steps, st.tuples(st.just("reset"), rows),
                   st.tuples(st.just("rewind"), st.lists(st.integers(0, 4), min_size=ROWS, max_size=ROWS)),
                   st.tuples(st.just("join"), st.integers(0, ROWS - 1), st.integers(1, 20)),
                   st.tuples(st.just("shuffle"), st.permutations(range(ROWS))))


@pytest.mark.parametrize("name", STACKS)
@settings(max_examples=12)
@given(st.lists(events, min_size=4, max_size=14))
@torch.no_grad()
def test_any_course_of_events_equals_the_whole_sequence(name, course):
    company = Company(name)
    for event, *details in course:
        getattr(company, event)(*details)
    for _ in range(3):
        company.step(5, [True] * ROWS)


@pytest.mark.parametrize("chunk", [1, 4, 50])
@torch.no_grad()
def test_far_past_every_window(chunk):
    """A ring of its own size forgets nothing that it needs, whatever the chunks."""
    net, x = model(STACKS["rings"]), torch.randn(2, 50, 32)
    state, whole = net.init_state(2, chunk=chunk), net(x)
    close(torch.cat([net(part, state=state) for part in x.split(7, 1)], 1), whole)


@pytest.mark.parametrize("cache", ["full", "int8"])
@pytest.mark.parametrize("chunk", [1, 4])
@torch.no_grad()
def test_a_stream_may_keep_its_first_tokens_in_sight(chunk, cache):
    """As a model does whose spec says so; the windows of layers are of two sizes."""
    def windows(first):
        layers = [attention(heads=2, window=Window(left=left, right=0, first=first), rope=Rope()) for left in (9, 5)]
        return stack(layers[0], spec.Differential(base=layers[1], lambda_init=0.4))
    net, other = model(windows(0)), Transformer(windows(3))
    other.load_state_dict(net.state_dict())
    x = torch.randn(2, 40, 32)
    state = net.init_state(2, chunk=chunk, first=3, cache=cache)
    sizes = [slots.size for slots in state.slots]
    made = torch.cat([net(part, state=state) for part in x.split(3, 1)], 1)
    close(made, other(x), 1e-5 if cache == "full" else 0.1)
    plain = net(x)
    assert (made - plain)[:, :6].abs().max() < 0.1 < (made - plain)[:, 10:].abs().amax(-1).min()
    assert sizes == [slots.size for slots in state.slots] == [9 + chunk, 5 + chunk]
    state.reset()
    assert torch.equal(torch.cat([net(part, state=state) for part in x.split(3, 1)], 1), made)


@torch.no_grad()
def test_a_full_static_cache_forgets_its_oldest_tokens():
    """Past its length, a causal layer is a layer with a window of that length."""
    net = model(stack(attention(window=CAUSAL)))
    near = model(stack(attention(window=Window(left=7, right=0))))
    near.load_state_dict(net.state_dict())
    x, state = torch.randn(2, 30, 32), net.init_state(2, length=8)
    close(torch.cat([net(x[:, i:i + 1], state=state) for i in range(30)], 1), near(x))


@torch.no_grad()
def test_ragged_prompts_then_steps():
    """Rows padded on either side, each as if alone; the steps go on from every row's own length."""
    net, state = fresh("both")
    x, steps = torch.randn(ROWS, 12, 32), torch.randn(ROWS, 4, 32)
    real = torch.tensor([[0] * 5 + [1] * 7, [1] * 12, [1] * 4 + [0] * 8]).bool()
    y = net(x, padded(real), state=state)
    assert state.offset.tolist() == [7, 12, 4]
    z = torch.cat([net(steps[:, i:i + 1], state=state) for i in range(4)], 1)
    for row in range(ROWS):
        alone = net(torch.cat([x[row][real[row]], steps[row]])[None])[0]
        close(torch.cat([y[row][real[row]], z[row]]), alone)


@torch.no_grad()
def test_one_row_of_positions_serves_the_batch():
    net, x = model(STACKS["both"]), torch.randn(ROWS, 3, 32)
    _, state = fresh("both")
    _, other = fresh("both")
    close(net(x, along(1, 3), state=state), net(x, along(ROWS, 3), state=other), 0)
    close(net(x, state=state), net(x, state=other), 0)


@torch.no_grad()
def test_coordinates_stream_beside_positions():
    """M-RoPE and learned axes: the window goes by position, the rotation by coordinates."""
    axes = spec.Sections(sizes=(1, 2, 1))
    net = model(stack(attention(window=Window(left=4, right=0), rope=Rope(axes=axes)),
                      attention(window=CAUSAL, kv_heads=4, rope=Rope(axes=spec.Mixed(axes=3)))))
    x, at = torch.randn(2, 20, 32), along(2, 20, coords=torch.rand(2, 20, 3) * 9)
    state = net.init_state(2, length=20, chunk=3)
    parts = [net(x[:, i:i + 5], at.rows(i, i + 5), state=state) for i in range(0, 20, 5)]
    close(torch.cat(parts, 1), net(x, at))


@torch.no_grad()
def test_a_decoder_streams_beside_its_memory():
    near = attention(window=Window(left=4, right=0), rope=Rope())
    net = model(stack(near, attention(window=CAUSAL), cross=attention(sinks=True)))
    x, memory, at = torch.randn(2, 20, 32), torch.randn(2, 9, 32), padded(torch.arange(9) < torch.tensor([[5], [9]]))
    state = net.init_state(2, length=20, chunk=3)
    parts = [net(part, state=state, memory=memory, memory_at=at) for part in x.split(7, 1)]
    close(torch.cat(parts, 1), net(x, memory=memory, memory_at=at))


def prefixed(positions, count):
    return At(positions[None], prefix=positions[None] < count)


@torch.no_grad()
def test_a_prefix_goes_through_the_cache_and_is_forgotten():
    """Prefix keys are seen from before them: one that outlived a reset or a rewind would show."""
    net = model(STACKS["static"])
    state, x, every = net.init_state(1, length=20), torch.randn(1, 9, 32), torch.arange(9)
    close(net(x[:, :6], prefixed(every[:6], 4), state=state), net(x, prefixed(every, 4))[:, :6])
    state.rewind(torch.tensor([2]))
    late = At(every[None, 2:3], prefix=torch.zeros(1, 1, dtype=torch.bool))
    close(net(x[:, 2:3], late, state=state), net(x[:, :3], prefixed(every[:3], 2))[:, 2:])
    net(x[:, 3:], prefixed(every[3:], 9), state=state)
    state.reset()
    close(net(x[:, :3], prefixed(every[:3], 1), state=state), net(x[:, :3], prefixed(every[:3], 1)))


@torch.no_grad()
def test_documents_go_through_the_cache():
    net = model(STACKS["static"])
    state, x, every = net.init_state(1, length=20), torch.randn(1, 9, 32), torch.arange(9)[None]
    parts = [net(part, At(at, torch.full_like(at, i)), state=state)
             for i, (part, at) in enumerate(zip(x.split(4, 1), every.split(4, 1), strict=True))]
    close(torch.cat(parts, 1), torch.cat([net(part) for part in x.split(4, 1)], 1))


# ----------------------------------------------------------------------------------- a tree of fixed tensors
@torch.no_grad()
def test_memory_stays_where_it_is():
    net, state = fresh("both")
    places = [(x.data_ptr(), x.shape) for _, x in tensors(state)]
    for length in (1, 9, 2, 1, 1):
        net(torch.randn(ROWS, length, 32), state=state, rows=torch.tensor([True, False, True]))
    state.rewind(torch.tensor([1, 2, 3]))
    state.reset(torch.tensor([True, False, False]))
    assert places == [(x.data_ptr(), x.shape) for _, x in tensors(state)]


@torch.no_grad()
def test_ring_sizes_are_window_plus_chunk():
    """left + chunk slots, one more for tokens that do not exist; equal sizes share one table."""
    state = model(stack(*MIX, RINGS[0])).init_state(2, length=LENGTH, chunk=CHUNK)
    assert [cache.k.shape[2] for cache in state.caches] == [4 + CHUNK + 1, 4 + CHUNK + 1, LENGTH + 1, 4 + CHUNK + 1]
    assert len(state.slots) == 2


@torch.no_grad()
def test_a_step_reads_nothing_back():
    """On the meta device every value is unknown: whatever asked for one would fail."""
    net, state = fresh("both")
    net, state = net.to("meta"), state.to("meta")
    rows = torch.ones(ROWS, dtype=torch.bool, device="meta")
    y = net(torch.randn(ROWS, 9, 32, device="meta"), state=state, rows=rows)
    state.reset(rows)
    assert y.shape == (ROWS, 9, 32) and y.device.type == "meta"


@torch.no_grad()
def test_clone_select_and_to_are_copies():
    net, state = fresh("both")
    net(torch.randn(ROWS, 5, 32), state=state)
    clone, part, x = state.clone(), state.select(torch.tensor([2, 0])), torch.randn(ROWS, 1, 32)
    net(torch.randn(ROWS, 5, 32), state=state)
    y = net(x, state=clone)
    close(net(x[[2, 0]], state=part), y[[2, 0]])
    assert clone.fingerprint == state.fingerprint and clone.chunk == CHUNK
    assert {x.device.type for _, x in tensors(state.to("meta"))} == {"meta"}
    assert {x.device.type for _, x in tensors(net.init_state(1, length=4, device="meta"))} == {"meta"}


@torch.no_grad()
def test_a_state_is_a_pytree():
    _, state = fresh("both")
    leaves, form = pytree.tree_flatten(state)
    assert all(isinstance(x, torch.Tensor) and len(x) == ROWS for x in leaves)
    again = pytree.tree_unflatten(leaves, form)
    assert type(again) is type(state) and again.fingerprint == state.fingerprint
    assert [name for name, _ in tensors(state)][:3] == ["offset", "slots.0.table", "slots.1.table"]


@torch.no_grad()
def test_reset_forgets_even_nan():
    net, state = fresh("both")
    x = torch.randn(ROWS, 5, 32)
    wanted = net(x)
    net(x * torch.tensor([1, torch.nan, 1])[:, None, None], state=state)
    state.reset(torch.tensor([False, True, False]))
    close(net(x, state=state)[1], wanted[1])


@torch.no_grad()
def test_a_cache_in_half_the_precision():
    net, x = model(STACKS["both"]), torch.randn(ROWS, 20, 32)
    state = net.init_state(ROWS, length=LENGTH, dtype=torch.bfloat16)
    y = torch.cat([net(part, state=state) for part in x.split(1, 1)], 1)
    assert y.dtype == torch.float32 and {c.k.dtype for c in state.caches} == {torch.bfloat16}
    close(y, net(x), 5e-2)


# ---------------------------------------------------------------------------------------------------- files
ELSEWHERE = """
import json, sys, torch
from mm.spec.schema import from_json
from mm.nn.transformer import Transformer
folder = sys.argv[1]
net = Transformer(from_json(open(folder + "/spec").read())).eval()
net.load_state_dict(torch.load(folder + "/weights"))
with torch.no_grad():
    state = net.init_state(3, length=64, chunk=3).load(folder + "/state")
    print(json.dumps(net(torch.ones(3, 2, 32), state=state)[..., 0].tolist()))
"""


@torch.no_grad()
def test_saved_here_and_loaded_in_another_process(tmp_path):
    net, state = fresh("both")
    for length in (5, 2):
        net(torch.randn(ROWS, length, 32), state=state)
    state.save(tmp_path / "state")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    torch.save(net.state_dict(), tmp_path / "weights")
    (tmp_path / "spec").write_text(schema.to_json(net.stack))
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path], capture_output=True, text=True, check=True)
    close(torch.tensor(json.loads(done.stdout)), net(torch.ones(ROWS, 2, 32), state=state)[..., 0])


@torch.no_grad()
def test_files_that_do_not_fit_are_named_and_change_nothing(tmp_path):
    net, state = fresh("both")
    net(torch.randn(ROWS, 5, 32), state=state)
    good, bad = tmp_path / "good", tmp_path / "bad"
    state.save(good)
    before = [x.clone() for _, x in tensors(state)]

    def refuses(words, holder=state):
        with pytest.raises(InputError, match=words):
            holder.load(bad)

    refuses("bad is not a saved state")  # no file
    bad.write_bytes(good.read_bytes()[:-100])
    refuses("bad is not a saved state")
    save_file(load_file(good), bad)
    refuses("unknown")
    content = load_file(good)
    del content["caches.1.k"]
    save_file(content, bad, {"fingerprint": state.fingerprint})
    refuses(r"caches.1.k has shape None")
    state.save(bad)
    refuses("made by a model", model(STACKS["rings"]).init_state(ROWS, length=LENGTH, chunk=CHUNK))
    refuses(r"has shape \(3, ", net.init_state(ROWS, length=LENGTH + 1, chunk=CHUNK))
    refuses(r"offset has shape \(3,\), expected \(2,\)", net.init_state(2, length=LENGTH, chunk=CHUNK))
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, tensors(state), strict=True))


# ------------------------------------------------------------------------------------------------- mistakes
def test_a_state_and_gradients_do_not_go_together():
    net, state = fresh("both")
    with pytest.raises(InputError, match="no_grad"):
        net(torch.randn(ROWS, 1, 32), state=state)


@torch.no_grad()
def test_foreign_states_rows_and_lengths_are_refused():
    net, state = fresh("both")
    x = torch.randn(ROWS, 1, 32)
    with pytest.raises(InputError, match="made by a model with spec"):
        model(STACKS["rings"])(x, state=state)
    with pytest.raises(InputError, match="holds 3 rows and the input 2"):
        net(x[:2], state=state)
    for wrong in (torch.ones(2, dtype=torch.bool), torch.ones(ROWS)):
        with pytest.raises(InputError, match=r"rows should be \(3,\) bool"):
            net(x, state=state, rows=wrong)
    with pytest.raises(InputError, match="other state: offset has shape"):
        state.insert(torch.tensor([0, 1]), net.init_state(1, length=LENGTH, chunk=CHUNK))
    with pytest.raises(InputError, match="other state: "):
        state.insert(torch.tensor([0]), net.init_state(1, length=LENGTH - 1, chunk=CHUNK))
    static = model(STACKS["static"])
    with pytest.raises(InputError, match="9 tokens at once do not fit a state of length 8"):
        static(torch.randn(1, 9, 32), state=static.init_state(1, length=8))


@pytest.mark.parametrize("window, words", [(Window(), "looks ahead"), (Window(left=3, right=2), "looks 2 tokens ahead"),
                                          (CAUSAL, "needs init_state")])
def test_what_cannot_stream_says_so(window, words):
    with pytest.raises(InputError, match=words):
        model(stack(attention(window=window))).init_state(1)


WINDOW = Window(left=4, right=0)


@pytest.mark.parametrize("settings, more, words", [
    (stack(attention(window=CAUSAL)), {"length": 9}, "2 positions that stay in sight need a causal window"),
    (stack(attention(window=Window(left=1, right=0))), {}, "need a causal window that is longer"),
    (stack(attention(window=WINDOW)), {"length": 2}, "a stream of length 2 is too short"),
    (stack(attention(window=WINDOW, extra_key=True)), {}, "and no extra key"),
    (stack(attention(window=WINDOW), relative=spec.Alibi()), {}, "no distance for a position bias"),
    (stack(replace(LATENT, window=WINDOW)), {}, "latent attention has no positions that stay"),
    (stack(attention(window=WINDOW, rope=Rope(scaling=spec.DynamicNTK(factor=2, original=8)))), {}, "a rope of one")])
def test_what_cannot_keep_its_first_tokens_says_so(settings, more, words):
    with pytest.raises(InputError, match=words):
        model(settings).init_state(1, first=2, **more)
