"""Every path of `attend` against the plain oracle in double precision: outputs, gradients, memory, mistakes."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import close
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mm.errors import InputError
from mm.kernels import attend, debug, explain
from mm.kernels.options import AttentionOptions
from mm.kernels.plain import reference
from mm.positions import rope
from mm.positions.visibility import At, along, packed, padded
from mm.spec import CAUSAL, EVERYWHERE, Rope, Window

tiled = import_module("mm.kernels.plain")
WINDOWS = [EVERYWHERE, CAUSAL, Window(left=5, right=0), Window(left=2, right=3), Window(right=2), Window(left=4),
          Window(right=0, chunk=6), Window(chunk=7)]


class Slope:
    """A bias with a gradient, computed from positions."""

    def __init__(self, heads):
        self.weight = torch.randn(heads, dtype=torch.float64, requires_grad=True)

    def __call__(self, q_at, k_at):
        offset = k_at.position.unsqueeze(-2) - q_at.position.unsqueeze(-1)
        return self.weight[:, None, None] * offset.double().unsqueeze(1) / 10


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "ROWS", 8)


def tensors(batch, heads, kv, length, keys, width=4, value_width=4, dtype=torch.float64):
    shapes = ((batch, heads, length, width), (batch, kv, keys, width), (batch, kv, keys, value_width))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def compare(q, k, v, tolerance=1e-10, **call):
    """attend and the oracle: same output, same gradients of everything, all finite."""
    problem = AttentionOptions(**{"window": EVERYWHERE, "scale": q.shape[-1] ** -0.5, **call})
    leaves = [q, k, v, *(x for x in (call.get("sinks"), getattr(call.get("bias"), "weight", None)) if x is not None)]
    outputs = []
    for y in (attend(q, k, v, **call), reference(q, k, v, problem)):
        upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        outputs.append((y, *torch.autograd.grad(y, leaves, upstream, allow_unused=True)))
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.isfinite().all()
            close(ours, theirs, tolerance)


def test_the_oracle_is_torchs_attention():
    q, k, v = tensors(2, 4, 4, 9, 12)
    seen = torch.rand(9, 12) < 0.5
    seen[:, 0] = True
    bias = torch.randn(4, 9, 12, dtype=torch.float64)
    at = At(torch.zeros(2, 9).long()), At(torch.zeros(2, 12).long())
    def mask(q_at, k_at):
        return bias.masked_fill(~seen, -torch.inf)
    wanted = F.scaled_dot_product_attention(q, k, v, mask(*at), scale=0.3)
    close(reference(q, k, v, AttentionOptions(*at, EVERYWHERE, 0.3, bias=mask)), wanted, 1e-12)


def test_the_oracles_softcap_and_sinks_written_out():
    q, k, v = tensors(1, 2, 1, 3, 5)
    at, sinks = (along(1, 3), along(1, 5)), torch.randn(2, dtype=torch.float64)
    y = reference(q, k, v, AttentionOptions(*at, EVERYWHERE, 0.3, sinks=sinks, softcap=2.0))
    for head in range(2):
        for i in range(3):
            scores = 2.0 * torch.tanh((k[0, 0] @ q[0, head, i]) * 0.3 / 2.0)
            weights = scores.exp() / (scores.exp().sum() + sinks[head].exp())
            close(y[0, head, i], weights @ v[0, 0], 1e-12)


# ------------------------------------------------------------------------------------------ plain runs
@pytest.mark.parametrize("extras", ["", "softcap", "sinks", "bias", "softcap sinks bias"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_plain_run_in_tiles(window, extras, small_tiles):
    """T = 21 in tiles of 8: windows shorter and longer than a tile, grouped heads, values wider than keys."""
    at = along(2, 21)
    given = {"softcap": 2.0, "sinks": torch.randn(4, dtype=torch.float64, requires_grad=True), "bias": Slope(4)}
    compare(*tensors(2, 4, 2, 21, 21, value_width=6), q_at=at, k_at=at, window=window, scale=0.7,
            **{name: given[name] for name in extras.split()})


@pytest.mark.parametrize("window", [CAUSAL, Window(left=5, right=1), Window(right=0, chunk=12)])
@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}])
def test_a_plain_run_with_a_prefix_in_tiles(window, extras, small_tiles):
    at = along(1, 21)
    at = replace(at, prefix=at.position < 14)
    compare(*tensors(1, 2, 2, 21, 21), q_at=at, k_at=at, window=window, **extras)


@pytest.mark.parametrize("window", [Window(left=300, right=0), Window(left=3, right=0), Window(right=0, chunk=200)])
def test_a_plain_run_in_tiles_of_full_size(window):
    at = along(1, 600)
    compare(*tensors(1, 2, 1, 600, 600), q_at=at, k_at=at, window=window, tolerance=1e-9)
    compare(*tensors(1, 2, 1, 600, 600), q_at=at, k_at=at, window=window, softcap=3.0, tolerance=1e-9)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation_happens_inside(layout, small_tiles):
    at = along(2, 21)
    rotation = rope.rotation(at.position, Rope(layout=layout), 4)
    for more in ({}, {"window": Window(left=4, right=0)}, {"softcap": 2.0}):
        compare(*tensors(2, 2, 2, 21, 21), q_at=at, k_at=at, q_rope=rotation, k_rope=rotation, **more)
        compare(*tensors(2, 2, 2, 21, 21), q_at=at, k_at=at, q_rope=rotation, **more)


# ---------------------------------------------------------------------------------------- any positions
@given(st.sampled_from(WINDOWS), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 20),
       st.integers(1, 20), st.sampled_from([(4, 4), (6, 2)]), st.sets(st.sampled_from(["softcap", "sinks", "bias"])),
       st.booleans(), st.integers(0, 2**32 - 1))
def test_any_shapes_positions_documents_and_gaps(window, batch, kv, group, length, keys, widths, extras, prefix, seed):
    """Rows that see nothing give 0 and no NaN gradients; tiles of 8 queries."""
    generator = torch.Generator().manual_seed(seed)
    def where(count):
        draw = torch.randint(-1, 15, (batch, count), generator=generator)
        document = torch.randint(0, 2, (batch, count), generator=generator)
        return At(draw, document, torch.rand(batch, count, generator=generator) < 0.3 if prefix else None)
    q_at, k_at, heads = where(length), where(keys), kv * group
    given = {"softcap": 2.0, "sinks": torch.randn(heads, dtype=torch.float64, requires_grad=True), "bias": Slope(heads)}
    before, tiled.ROWS = tiled.ROWS, 8
    try:
        compare(*tensors(batch, heads, kv, length, keys, *widths), q_at=q_at, k_at=k_at, window=window,
                **{name: given[name] for name in extras})
    finally:
        tiled.ROWS = before


@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}, {"sinks": torch.zeros(2).double()}, {"bias": Slope(2)}])
def test_a_query_that_sees_nothing_gives_0(extras):
    q, k, v = tensors(1, 2, 2, 5, 5)
    at = packed(torch.tensor([[0, 0, -1, 1, 1]]))
    y = attend(q, k, v, q_at=at, k_at=at, window=CAUSAL, **extras)
    assert y[:, :, 2].eq(0).all() and y[:, :, [0, 1, 3, 4]].ne(0).all()
    y.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v)) and q.grad[:, :, 2].eq(0).all()


def test_one_row_of_positions_serves_the_batch(small_tiles):
    q, k, v = tensors(3, 2, 2, 20, 20)
    one, at = along(1, 20), along(3, 20)
    for window in (CAUSAL, Window(left=3, right=0)):
        close(attend(q, k, v, q_at=one, k_at=one, window=window),
              attend(q, k, v, q_at=at, k_at=at, window=window), 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("extras", [{}, {"window": CAUSAL}, {"window": Window(left=5, right=0)}, {"softcap": 2.0}])
def test_precision(dtype, tolerance, extras):
    at, rotation = along(2, 30), rope.rotation(along(2, 30).position, Rope(), 16)
    rough = tensors(2, 4, 2, 30, 30, 16, 16, dtype)
    exact = [x.detach().double().requires_grad_() for x in rough]
    wanted = reference(*exact, AttentionOptions(
        at, at, extras.get("window", EVERYWHERE), 0.25, rotation, rotation, softcap=extras.get("softcap", 0.0)))
    y = attend(*rough, q_at=at, k_at=at, q_rope=rotation, k_rope=rotation, **extras)
    assert y.dtype == dtype
    close(y.double(), wanted, tolerance)
    with torch.no_grad():
        close(attend(*rough, q_at=at, k_at=at, q_rope=rotation, k_rope=rotation, **extras).double(), wanted, tolerance)
    upstream = torch.randn_like(wanted)
    for ours, theirs in zip(torch.autograd.grad(y, rough, upstream.to(dtype)),
                            torch.autograd.grad(wanted, exact, upstream), strict=True):
        assert ours.dtype == dtype
        close(ours.double(), theirs, tolerance)


# --------------------------------------------------------------------------------------- dropout, memory
@pytest.mark.parametrize("extras", [{}, {"window": CAUSAL}, {"window": Window(left=9, right=0)}, {"softcap": 2.0},
                                    {"sinks": torch.zeros(1)}, {"bias": lambda q_at, k_at: torch.zeros(())}])
def test_dropout_drops_and_rescales_weights(extras):
    """Identity values turn the output into the weights themselves."""
    q, k, _ = (x.detach() for x in tensors(1, 1, 1, 200, 200, dtype=torch.float32))
    at, v = along(1, 200), torch.eye(200)[None, None]
    weights = attend(q, k, v, q_at=at, k_at=at, **extras)
    dropped = attend(q, k, v, q_at=at, k_at=at, dropout=0.3, **extras)
    kept = dropped > 0
    close(dropped[kept], weights[kept] / 0.7)
    assert abs(kept.sum() / (weights > 0).sum() - 0.7) < 0.05


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation put out."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in torch.utils._pytree.tree_leaves(out)
                                        if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("extras", [{"softcap": 2.0}, {"sinks": torch.zeros(2)}, {"window": Window(left=30, right=0)},
                                    {"bias": lambda q_at, k_at: torch.zeros(1, 2, 1, 1)}, {"documents": True}])
def test_no_scores_outlive_a_tile(extras):
    """Neither saved for the backward pass nor made at once: T x S would be 2 * 2048 * 2048 elements."""
    extras, length = dict(extras), 2048
    at = packed(torch.arange(length)[None] // 100) if extras.pop("documents", False) else along(1, length)
    q, k, v = tensors(1, 2, 2, length, length, dtype=torch.float32)
    saved = {}  # bytes by storage
    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    largest = Largest()
    with saved_tensors_hooks(pack, lambda x: x), largest:
        y = attend(q, k, v, q_at=at, k_at=at, **extras)
    assert sum(saved.values()) < 20 * q.nbytes
    with largest:
        y.sum().backward()
    assert largest.numel <= 2 * tiled.ROWS * (length + 1)
    if "window" in extras:
        assert largest.numel <= max(2 * tiled.ROWS * (tiled.ROWS + 31), q.numel())


def test_dropout_in_tiles_is_the_same_when_recomputed():
    """The gradient of a dropped weight is 0: with identity values, exactly where the output is 0."""
    (q, k, _), v = tensors(1, 1, 1, 600, 600, dtype=torch.float32), torch.eye(600, requires_grad=True)
    y = attend(q, k, v[None, None], q_at=along(1, 600), k_at=along(1, 600), softcap=2.0, dropout=0.3)
    torch.manual_seed(1)
    y[0, 0].diagonal().sum().backward()
    close(v.grad.diagonal(), y[0, 0].diagonal())


# ---------------------------------------------------------------------------------------------- the choice
@pytest.mark.parametrize("path, call", [
    ("sdpa", {}),
    ("sdpa", {"k_at": along(2, 9)}),
    ("sdpa causal", {"window": CAUSAL}),
    ("tiled", {"window": CAUSAL, "k_at": along(2, 9)}),
    ("tiled", {"window": Window(left=3, right=0)}),
    ("tiled", {"softcap": 1.0}),
    ("tiled", {"sinks": torch.zeros(2)}),
    ("tiled", {"bias": lambda q_at, k_at: 0}),
    ("sdpa", {"q_at": padded(torch.ones(2, 5))}),
    ("tiled", {"k_at": padded(torch.ones(2, 5))}),
    ("tiled", {"window": CAUSAL, "k_at": At(torch.arange(5).expand(2, 5), prefix=torch.ones(2, 5) > 0, regular=True)}),
])
def test_explain_names_the_path_and_the_reason(path, call):
    given = {"q_at": along(2, 5), "k_at": along(2, 5), **call}
    q, k = (torch.zeros(2, 2, given[name].position.shape[1], 16) for name in ("q_at", "k_at"))
    said = explain(q, k, k, **given)
    assert said.split(": ")[0] == path and len(said.split(": ")[1]) > 10


# ------------------------------------------------------------------------------------------------ mistakes
GOOD = dict(q=(2, 4, 5, 8), k=(2, 2, 7, 8), v=(2, 2, 7, 6), q_at=(2, 5), k_at=(2, 7))


@pytest.mark.parametrize("wrong, words", [
    (dict(q=(4, 5, 8)), r"q must be \(B, H, T, E\), not of shape \(4, 5, 8\)"),
    (dict(k=(3, 2, 7, 8)), "do not fit together"),
    (dict(v=(2, 2, 6, 6)), "do not fit together"),
    (dict(k=(2, 2, 7, 6)), "queries are 8 wide and keys 6"),
    (dict(k=(2, 3, 7, 8), v=(2, 3, 7, 6)), "4 query heads cannot share 3"),
    (dict(q_at=(2, 6)), r"q_at has positions \(2, 6\) for 2 rows of 5 tokens"),
    (dict(k_at=(3, 7)), r"k_at has positions \(3, 7\) for 2 rows of 7 tokens"),
])
def test_wrong_shapes_are_named(wrong, words):
    shapes = GOOD | wrong
    q, k, v = (torch.zeros(shapes[name]) for name in "qkv")
    q_at, k_at = (along(*shapes[name]) for name in ("q_at", "k_at"))
    with pytest.raises(InputError, match=words):
        attend(q, k, v, q_at=q_at, k_at=k_at)


@pytest.mark.parametrize("more, words", [
    (dict(k_at=At(torch.zeros(1, 5).long(), torch.zeros(1, 4))), r"k_at has documents \(1, 4\) for 1 rows of 5 tokens"),
    (dict(k_at=At(torch.zeros(1, 5).long(), prefix=torch.zeros(5))), r"k_at has a prefix \(5,\)"),
    (dict(q_at=At(torch.zeros(1, 5))), "positions of q_at must be integers, not torch.float32"),
    (dict(q_rope=rope.rotation(along(1, 4).position, Rope(), 8)), r"q_rope has rotations \(1, 1, 4, 8\)"),
    (dict(k_rope=rope.rotation(along(1, 5).position, Rope(), 16)), r"k_rope has rotations \(1, 1, 5, 16\)"),
    (dict(softcap=-1.0), "softcap must not be negative"),
    (dict(dropout=1.0), r"dropout lie in 0\.\.1"),
    (dict(sinks=torch.zeros(3)), r"sinks \(2,\), not \(3,\)"),
])
def test_what_does_not_fit_the_tokens_is_named(more, words):
    x = torch.zeros(1, 2, 5, 8)
    with pytest.raises(InputError, match=words):
        attend(x, x, x, **{"q_at": along(1, 5), "k_at": along(1, 5), **more})


def test_tensors_of_two_kinds_are_named():
    at, x = along(1, 5), torch.zeros(1, 2, 5, 8)
    with pytest.raises(InputError, match="one dtype"):
        attend(x, x, x.half(), q_at=at, k_at=at)
    with pytest.raises(InputError, match="one device, not cpu, meta, cpu"):
        attend(x, x.to("meta"), x, q_at=at, k_at=at)


# -------------------------------------------------------------------------------------------------- values
def ids(*numbers):
    return At(torch.zeros(1, len(numbers)).long(), torch.tensor([numbers]))


@pytest.mark.parametrize("q_at, k_at, words", [
    (At(torch.tensor([[0, 1, -2]])), None, "q_at has the position -2; positions count from 0, and -1 marks padding"),
    (along(1, 3), At(torch.tensor([[0, -3, 1]])), "k_at has the position -3"),
    (along(1, 3), At(torch.tensor([[0, -1, 1]]), whole=True), "said to be `whole`, and row 0 has padding"),
    (At(torch.tensor([[0, 1, 2], [0, 0, 1]]), regular=True), None, "`regular`, and row 1 does not count from 0"),
    (ids(5, 5, 7, 5), None, "document 5 of row 0 ends and begins again"),
])
def test_debug_reads_the_values(q_at, k_at, words):
    k_at = k_at or q_at
    q, k = (torch.zeros(len(at.position), 1, at.position.shape[1], 8) for at in (q_at, k_at))
    attend(q, k.expand(len(q), -1, -1, -1), k.expand(len(q), -1, -1, -1), q_at=q_at, k_at=k_at)
    with debug(), pytest.raises(InputError, match=words):
        attend(q, k, k, q_at=q_at, k_at=k_at)


def test_debug_lets_pass_what_is_right():
    """Falling numbers of documents and padding between them, a ring of keys, a learned extra key."""
    ring = At(torch.tensor([[4, 5, -1, -2]]), torch.tensor([[9, 3, 9, 0]]))
    x = torch.zeros(1, 1, 4, 8)
    with debug():
        attend(x, x, x, q_at=ids(9, 9, -1, 3), k_at=ring, window=CAUSAL)
        attend(x, x, x, q_at=along(1, 4), k_at=along(1, 4))
    attend(x, x, x, q_at=ids(5, 7, 5, 7), k_at=ring)  # not looked at any more
