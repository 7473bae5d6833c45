"""The Triton kernels in Triton's interpreter, against the oracle in double precision: outputs and gradients.

Run by test_kernel.py in a process of its own, because TRITON_INTERPRET=1 must be set before Triton is imported:
    TRITON_INTERPRET=1 python -m pytest tests/mm/kernels/kernel_checks.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_interpreter import bfloat16_as_in_hardware

from mm.encoders.vision import grid
from mm.errors import InputError
from mm.kernels import operator
from mm.kernels import triton_launch as run
from mm.kernels.operator import by_kernel
from mm.kernels.options import AttentionOptions
from mm.kernels.plain import reference
from mm.kernels.triton_plan import KernelArgs
from mm.nn.state import Slots
from mm.positions import rope
from mm.positions.absolute import AlibiBias, BucketBias, ByOffset
from mm.positions.visibility import At, along, packed, padded
from mm.recipes.bench.attention_hopper import forward_on_hopper, suits_hopper
from mm.spec import CAUSAL, EVERYWHERE, Alibi, Axial, Buckets, Rope, Window

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
WINDOWS = [EVERYWHERE, CAUSAL, Window(left=5, right=0), Window(left=20, right=17), Window(right=2), Window(left=4),
          Window(right=0, chunk=19), Window(chunk=7)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name in ("forward_tile", "query_tile", "key_tile"):
        monkeypatch.setattr(run, name, lambda call: run.Tile(32, 32, 4, 1))


@pytest.fixture
def bf16(monkeypatch):
    bfloat16_as_in_hardware(monkeypatch)


class Case:
    """Random tensors for a call, and both answers to it."""

    def __init__(self, batch=1, kv=2, group=2, length=40, keys=None, width=32, value_width=None, dtype=torch.float32,
                 sinks=False, q_at=None, k_at=None, window=EVERYWHERE, **more):
        keys, value_width, heads = keys or length, value_width or width, kv * group
        shapes = ((batch, heads, length, width), (batch, kv, keys, width), (batch, kv, keys, value_width))
        self.q, self.k, self.v = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
        self.sinks = torch.randn(heads, requires_grad=True) if sinks else None
        self.bias = more.pop("bias", None)
        self.problem = {"q_at": q_at or along(batch, length), "k_at": k_at or along(batch, keys), "window": window,
                        "scale": width ** -0.5, "bias": self.bias, **more}
        self.upstream = torch.randn(batch, heads, length, value_width).to(dtype)

    def leaves(self):
        weight = getattr(self.bias, "weight", None)
        return [x for x in (self.q, self.k, self.v, self.sinks, weight) if x is not None]

    def kernel(self):
        return by_kernel(self.q, self.k, self.v, AttentionOptions(sinks=self.sinks, **self.problem))

    def oracle(self):
        sinks = None if self.sinks is None else self.sinks.double()
        return reference(self.q.double(), self.k.double(), self.v.double(),
                         AttentionOptions(sinks=sinks, **self.problem))

    def check(self, tolerance=None):
        """Relative to the largest number of each: outputs, then gradients of everything."""
        tolerance = tolerance or TOLERANCE[self.q.dtype]
        answers = []
        for y in (self.kernel(), self.oracle()):
            answers.append((y, *torch.autograd.grad(y, self.leaves(), self.upstream.to(y.dtype))))
        for ours, theirs in zip(*answers, strict=True):
            assert ours.isfinite().all()
            assert (ours - theirs).abs().max() <= tolerance * max(theirs.abs().max(), 1e-3), (
                (ours - theirs).abs().max() / theirs.abs().max())


def ragged(batch, length):
    """Rows with padding before and after."""
    mask = torch.ones(batch, length)
    mask[0, :5], mask[-1, length - 9:] = 0, 0
    return padded(mask)


def mixed_documents(length):
    return packed(torch.tensor([[0] * 21 + [1] * 9 + [4] * (length - 35) + [-1] * 5, [7] * length]))


def rotation(at, width, **more):
    return rope.rotation(at.rotary_positions, Rope(**more), width)


# ------------------------------------------------------------------------------------------------ window
@pytest.mark.parametrize("window", WINDOWS)
def test_plain_runs(window):
    Case(length=75, window=window, group=1, kv=1).check()  # three tiles, the last one incomplete


@pytest.mark.parametrize("window", [CAUSAL, Window(left=9, right=4), Window(chunk=19)])
@pytest.mark.parametrize("group", [3, 5])
def test_grouped_heads_share_a_tile(window, group):
    """Groups that do not divide a tile; keys that are more than the queries."""
    Case(length=23, keys=37, group=group, kv=1, window=window).check()


def test_packed_documents():
    at = mixed_documents(70)
    Case(2, length=70, q_at=at, k_at=at, window=CAUSAL, group=1, kv=1).check()


def test_ragged_rows_with_a_prefix():
    at = ragged(2, 45)
    at = At(at.position, prefix=at.position < 12)
    Case(2, length=45, q_at=at, k_at=at, window=CAUSAL).check()


def test_tiles_out_of_reach_are_never_read():
    """NaN in the keys and values of another document does not spread, as it would by a product with 0."""
    at = packed(torch.arange(128)[None] // 64)
    case = Case(batch=1, length=128, q_at=at, k_at=at, window=CAUSAL)
    with torch.no_grad():
        case.k[:, :, 64:], case.v[:, :, 64:] = torch.nan, torch.nan
        y = case.kernel()
    assert y[:, :, :64].isfinite().all() and y[:, :, 64:].isnan().all()


@pytest.mark.parametrize("features", [
    {}, dict(window=CAUSAL, sinks=True), dict(window=Window(left=40, right=0), softcap=3.0),
    dict(window=Window(chunk=90)), dict(keys=200, window=Window(left=70, right=30)),
])
def test_the_forward_pass_for_hopper(features):
    """By descriptors, as one program; and the sums that it leaves for the backward pass."""
    case = Case(length=150, kv=1, width=64, dtype=torch.float16, **features)
    call = KernelArgs(*operator.kernel_args(case.q, case.k, case.v, AttentionOptions(sinks=case.sinks, **case.problem)))
    assert suits_hopper(call)
    with torch.no_grad():
        (_, sums), y, lse = run.attention(call), run.by_token(case.q), torch.empty(1, 2, 150)
        forward_on_hopper(call, y, lse)
        assert (y - case.oracle()).abs().max() <= TOLERANCE[torch.float16] * case.oracle().abs().max()
        assert (lse - sums).abs().max() < 1e-2


# --------------------------------------------------------------------------------------------- features
@pytest.mark.parametrize("features", [
    dict(softcap=2.0, window=CAUSAL),
    dict(sinks=True, window=Window(left=9, right=0)),
    dict(sinks=True, softcap=3.0, q_at=ragged(1, 40), k_at=ragged(1, 40), window=CAUSAL),
    dict(scale=0.3, kv=1, group=4),
])
def test_softcap_sinks_and_scale(features):
    Case(**features).check()


@pytest.mark.parametrize("bias", [lambda: BucketBias(Buckets(count=8, distance=20), 4), lambda: AlibiBias(Alibi(), 4),
                                  lambda: BucketBias(Buckets(count=6, distance=9, two_sided=False), 4)])
@pytest.mark.parametrize("more", [{}, dict(q_at=ragged(1, 40), k_at=ragged(1, 40), window=CAUSAL, softcap=2.0)])
def test_biases_by_distance(bias, more):
    Case(bias=bias(), **more).check()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [None, 16])
def test_rotation_on_load(layout, dim):
    at = along(2, 40)
    both = rotation(at, 32, layout=layout, dim=dim)
    Case(2, q_at=at, k_at=at, q_rope=both, k_rope=both, window=CAUSAL).check()


def test_rotation_by_two_axes_and_of_queries_alone():
    at = At(torch.arange(40).expand(1, 40), coords=grid.index_grid(5, 8).expand(1, 40, 2))
    both = rotation(at, 80, axes=Axial())
    Case(width=80, q_at=at, k_at=at, q_rope=both, k_rope=both, kv=1).check()
    Case(2, q_rope=rotation(along(1, 40), 32), q_at=along(1, 40), k_at=along(1, 40), kv=1).check()  # one row for all
    Case(q_rope=rope.rotation(grid.index_grid(5, 8).expand(1, 40, 2), Rope(), 32, torch.rand(2, 4, 16))).check()


def test_learned_rotations_get_gradients():
    bands = torch.rand(2, 4, 16, requires_grad=True)
    both = rope.rotation(grid.index_grid(5, 8).expand(1, 40, 2), Rope(), 32, bands)
    case = Case(q_rope=both, k_rope=both, group=1, kv=4)
    wanted, = torch.autograd.grad(case.oracle(), bands, case.upstream.double(), retain_graph=True)
    ours, = torch.autograd.grad(case.kernel(), bands, case.upstream)
    assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# --------------------------------------------------------------------------------- widths and precision
@pytest.mark.parametrize("width, value_width", [(16, 24), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128),
                                                (256, 256)])
def test_head_widths(width, value_width):
    Case(batch=1, kv=1, length=19, keys=35, width=width, value_width=value_width, window=Window(right=12)).check()


@pytest.mark.parametrize("features", [
    dict(window=CAUSAL),
    dict(window=CAUSAL, sinks=True, softcap=3.0, q_at=ragged(1, 40), k_at=ragged(1, 40)),
    dict(q_rope=rotation(along(1, 40), 32), k_rope=rotation(along(1, 40), 32)),
])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, features, bf16):
    Case(dtype=dtype, **features).check()


@settings(max_examples=5)
@given(st.sampled_from(WINDOWS), st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 30),
       st.integers(1, 30), st.sampled_from([(16, 16), (24, 40), (32, 64)]),
       st.sets(st.sampled_from(["softcap", "sinks", "bias", "prefix", "rope"])), st.integers(0, 2**32 - 1))
def test_any_shapes_positions_documents_and_gaps(window, batch, kv, group, length, keys, widths, features, seed):
    torch.manual_seed(seed)
    def where(count):
        draw, document = torch.randint(-2, 30, (batch, count)), torch.randint(0, 3, (batch, count)).sort(1).values
        return At(draw, document, torch.rand(batch, count) < 0.3 if "prefix" in features else None)
    q_at, k_at = where(length), where(keys)
    given = {"softcap": 2.0, "sinks": True, "bias": BucketBias(Buckets(count=8, distance=20), kv * group),
             "rope": rotation(q_at, widths[0])}
    given = {{"rope": "q_rope"}.get(name, name): given[name] for name in features - {"prefix"}}
    Case(batch, kv, group, length, keys, *widths, q_at=q_at, k_at=k_at, window=window, **given).check()


# ---------------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("length, features", [
    (1, dict(window=CAUSAL, sinks=True)), (3, dict(window=Window(left=30, right=0), softcap=3.0)),
    (1, dict(window=CAUSAL, width=192, value_width=128, kv=1, group=5)),
])
def test_split_keys_over_a_ring(length, features, monkeypatch):
    """A ring that has gone round in one row and is nearly empty in another; only the new queries are rotated."""
    monkeypatch.setattr(run, "splits", lambda call: 3)
    slots = Slots(torch.full((2, 71, 3), -1))
    for start in range(0, 100, 10):
        position = torch.arange(start, start + 10).expand(2, 10)
        slots.write(At(torch.where(torch.tensor([[True], [start == 0]]), position, -1)))
    at = At(torch.tensor([[100], [10]]) + torch.arange(length))
    k_at = slots.write(at).k_at
    Case(2, **{"kv": 2, "group": 4, "length": length, "keys": 71, "q_at": at, "k_at": k_at,
            "q_rope": rotation(at, features.get("width", 32)), **features}).check()


def test_a_part_that_sees_nothing_adds_nothing(monkeypatch):
    monkeypatch.setattr(run, "splits", lambda call: 2)
    k_at = At(torch.where(torch.arange(256) < 3, torch.arange(256), -1)[None])
    Case(batch=1, length=1, keys=256, q_at=At(torch.tensor([[5]])), k_at=k_at, window=CAUSAL, sinks=True).check()


# ---------------------------------------------------------------------------------------- dropout, limits
def test_dropout_is_replayed_in_the_backward_pass(monkeypatch):
    """Identity values turn the output into the weights, which tell the mask; the oracle then takes the same mask."""
    case = Case(batch=1, kv=1, group=2, length=40, keys=48, value_width=48, dropout=0.4)
    seed = torch.tensor([77])
    monkeypatch.setattr(operator.torch, "randint", lambda *_, **__: seed)
    with torch.no_grad():
        value, case.v.data = case.v.data, torch.eye(48).expand(1, 1, 48, 48).contiguous()
        mask = case.kernel() > 0
        case.v.data = value
    assert abs(mask.float().mean() - 0.6) < 0.03 and not torch.equal(mask[0, 0], mask[0, 1])
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    weights = torch.softmax(q @ k.transpose(-1, -2) * case.problem["scale"], -1) * mask / 0.6
    wanted = torch.autograd.grad(weights @ v, case.leaves(), case.upstream.double())
    for ours, theirs in zip(torch.autograd.grad(case.kernel(), case.leaves(), case.upstream), wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_query_that_sees_nothing_gives_0_and_no_gradient():
    at = packed(torch.tensor([[0, 0, -1, 1, 1]]))
    for sinks in (False, True):
        case = Case(batch=1, length=5, q_at=at, k_at=at, window=CAUSAL, sinks=sinks)
        y = case.kernel()
        grads = torch.autograd.grad(y.sum(), case.leaves())
        assert y[:, :, 2].eq(0).all() and y[:, :, [0, 1, 3, 4]].ne(0).all()
        assert all(x.isfinite().all() for x in grads) and grads[0][:, :, 2].eq(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_finite_spreads_as_in_the_oracle(bad, where):
    """Over the queries that see it; the oracle also spreads values from unseen keys, by 0 * NaN."""
    case = Case(batch=1, kv=1, group=1, length=70, window=CAUSAL)
    with torch.no_grad():
        getattr(case, where)[0, 0, 33, 5] = bad
        ours, wanted = case.kernel()[0, 0], case.oracle()[0, 0]
    rows = slice(33, None) if where == "v" else slice(None)
    assert torch.equal(ours[rows].isnan(), wanted[rows].isnan())
    assert torch.equal(ours[rows].isinf(), wanted[rows].isinf())
    assert not wanted[rows].isfinite().all() and ours[:32].isfinite().all()


def test_the_same_twice():
    case = Case(kv=1, length=40, window=CAUSAL, sinks=True, bias=BucketBias(Buckets(count=8, distance=20), 2))
    first, second = (torch.autograd.grad(case.kernel(), case.leaves(), case.upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------- as an operator
def views(case):
    """Heads as projections leave them, (B, T, H, E) in memory, keys expanded over the batch, values transposed."""
    q = case.q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k = case.k.detach()[:1].expand(2, -1, -1, -1).requires_grad_()
    v = case.v.detach().mT.contiguous().mT.requires_grad_()
    return q, k, v


def test_strided_and_overlapping_tensors():
    """Read where they lie or from a copy, and never written to: gradients have memory of their own."""
    both = rotation(along(2, 40), 32)
    both = rope.Rotation(both.cos.mT.contiguous().mT, both.sin.mT.contiguous().mT, both.layout)
    case = Case(2, kv=1, q_rope=both, k_rope=both)
    case.q, case.k, case.v = views(case)
    case.sinks = torch.tensor([0.3]).requires_grad_().expand(2)
    case.upstream = torch.ones(()).expand_as(case.upstream)
    case.check()
    grads = torch.autograd.grad(case.kernel(), (case.q, case.k, case.v), case.upstream)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in grads)


def test_what_a_tile_cannot_reach_is_copied():
    """A depth transformer's heads, (T, B, 3, H, E) in memory: two tokens of one row lie 2**25 numbers apart."""
    heads = torch.empty_strided((2**15, 4, 32, 64), (3 * 4 * 64, 64, 2**27, 1), device="meta")
    assert operator.dense(heads).stride() == (32 * 4 * 64, 64, 4 * 64, 1)
    near = torch.empty_strided((2, 4, 32, 64), (0, 64, 3 * 4 * 64, 1), device="meta")
    assert operator.dense(near) is near


def arguments(case):
    return (case.q, case.k, case.v, case.sinks, *[None] * 12, False, True, -1, 0, -1, 0.2, 0.0, 0.0)


def test_the_operator_is_well_formed():
    """Schema, shapes and strides of meta tensors, tracing."""
    case = Case(sinks=True, length=20)
    for x in case.leaves():
        x.requires_grad_(False)
    torch.library.opcheck(torch.ops.mm.attention.default, arguments(case))


def test_it_compiles_in_one_graph():
    case = Case(window=CAUSAL, sinks=True, length=20)
    compiled = torch.compile(case.kernel, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(y(), case.leaves(), case.upstream) for y in (compiled, case.kernel)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_shapes_on_meta():
    case = Case()
    q, k, v = (x.detach().to("meta") for x in (case.q, case.k, case.v))
    assert by_kernel(q, k, v, AttentionOptions(**case.problem)).shape == case.upstream.shape


@pytest.mark.parametrize("wrong, words", [
    (lambda c: setattr(c, "q", c.q.detach().double()), "float16, bfloat16 and float32, not torch.float64"),
    (lambda c: setattr(c, "v", c.v.detach()[..., :12]), "values have 12"),
    (lambda c: c.problem.update(bias=lambda q, k: 0), "function of distance"),
    (lambda c: c.problem.update(bias=AlibiBias(Alibi(), 3)), "a bias for 3 heads does not fit 4"),
    (lambda c: c.problem.update(q_rope=rotation(along(1, 40), 32),
                                k_rope=rotation(along(1, 40), 32, dim=16)), "in one layout"),
    (lambda c: c.problem.update(k_at=At(torch.empty(1, 40, device="meta").long())), "must be on cpu, not on meta"),
])
def test_what_is_not_supported_is_said_before_any_launch(wrong, words):
    case = Case()
    wrong(case)
    with pytest.raises(InputError, match=words):
        case.kernel()


def test_biases_by_offset_are_the_biases():
    bias, at = BucketBias(Buckets(count=8, distance=20), 4), along(1, 60)
    given = bias.by_offset(torch.device("cpu"))
    assert isinstance(given, ByOffset)
    offset = (torch.arange(60) - torch.arange(60)[:, None]).clamp(-20, 20) + 20
    assert torch.equal(given.weight[given.buckets[offset]].permute(2, 0, 1), bias(at, at)[0])
