"""The one mask rule against a plain loop, and what packing and padding promise."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import attention, close, model, stack

from mm.positions.visibility import ANYWHERE, EMPTY, At, all_visible, along, packed, padded, visible
from mm.spec import CAUSAL, EVERYWHERE, Rope, Window

limits = st.none() | st.integers(0, 5)
windows = st.builds(Window, left=limits, right=limits, chunk=st.none() | st.integers(1, 5)) | st.builds(
    lambda left, first: Window(left=left, right=0, first=min(left, first)), st.integers(1, 5), st.integers(1, 5))


def by_hand(q, k, window):
    """Whether query (position, document) sees key (position, document, prefix)."""
    (at, document), (key, home, prefix) = q, k
    if key == ANYWHERE:
        return True
    if key < 0 or (document is not None and document != home):
        return False
    if window.left is not None and key < at - window.left + window.first and key >= window.first:
        return False
    if window.right is not None and key > at + window.right and not prefix:
        return False
    return window.chunk is None or key // window.chunk == at // window.chunk


@given(windows, st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_visible_is_the_loop(window, documents, prefixes, seed):
    draw = random.Random(seed)
    q = [(draw.randint(EMPTY, 12), draw.randint(0, 1)) for _ in range(10)]
    k = [(draw.randint(ANYWHERE, 12), draw.randint(0, 1), draw.random() < 0.3) for _ in range(20)]
    q_at, k_at = (At(torch.tensor([[x[0] for x in side]]), torch.tensor([[x[1] for x in side]]) if documents else None)
                  for side in (q, k))
    if prefixes:
        k_at = At(k_at.position, k_at.document, torch.tensor([[x[2] for x in k]]))
    wanted = [[by_hand((at, doc if documents else None), (key, home, prefix and prefixes), window)
               for key, home, prefix in k] for at, doc in q]
    assert visible(q_at, k_at, window).tolist() == [wanted]


@given(windows, st.integers(1, 10))
def test_only_what_every_query_sees_is_called_all_visible(window, length):
    at = along(2, length)
    if all_visible(at, at, window):
        assert visible(at, at, window).all()
    assert all_visible(At(at.position), at, window) == (window == EVERYWHERE)
    assert not all_visible(at, At(at.position), window)
    assert all_visible(at, at, EVERYWHERE)


def test_rows_cuts_every_field():
    at = At(torch.arange(5)[None], torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[True, False, False, True, True]]),
            torch.randn(1, 5, 2))
    part = at.rows(1, 4)
    for name in ("position", "document", "prefix", "coords"):
        assert torch.equal(getattr(part, name), getattr(at, name)[:, 1:4])
    whole = along(1, 5)
    assert whole.rows(0, 3).regular and not whole.rows(1, 3).regular


# ------------------------------------------------------------------------------------- packing and padding
def test_packed_restarts_positions_and_leaves_padding_out():
    at = packed(torch.tensor([[3, 3, 3, 7, 7, -1, 9, -1, -1]]))
    assert at.position.tolist() == [[0, 1, 2, 0, 1, EMPTY, 0, EMPTY, EMPTY]]


def test_padded_counts_real_tokens_on_either_side():
    at = padded(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]))
    assert at.position.tolist() == [[-1, -1, 0, 1, 2], [0, 1, -1, -1, -1], [-1, 0, -1, 1, -1], [-1] * 5]


WINDOWS = [CAUSAL, EVERYWHERE, Window(left=3, right=0), Window(left=2, right=2), Window(right=0, chunk=4)]


@pytest.mark.parametrize("window", WINDOWS)
def test_packed_documents_are_as_if_alone(window):
    net = model(stack(attention(window=window, rope=Rope()), attention(window=window, softcap=3.0)))
    lengths = (7, 11, 1, 5)
    parts = [torch.randn(1, length, 32) for length in lengths]
    document = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
    together = net(torch.cat(parts, 1), packed(document)).split(lengths, 1)
    for ours, part in zip(together, parts, strict=True):
        close(ours, net(part), 2e-6)


@pytest.mark.parametrize("window", WINDOWS)
def test_padding_changes_nothing_on_either_side(window):
    net, x = model(stack(attention(window=window), attention(window=window, softcap=3.0))), torch.randn(1, 6, 32)
    rubbish, real = torch.randn(1, 5, 32) * 9, torch.ones(1, 6, dtype=torch.bool)
    left = padded(torch.cat([torch.zeros(1, 5, dtype=torch.bool), real], 1))
    right = padded(torch.cat([real, torch.zeros(1, 5, dtype=torch.bool)], 1))
    close(net(torch.cat([rubbish, x], 1), left)[:, 5:], net(x), 2e-6)
    close(net(torch.cat([x, rubbish], 1), right)[:, :6], net(x), 2e-6)


def test_a_row_of_padding_alone_stays_finite_with_gradients():
    net, x = model(stack(attention(window=CAUSAL), attention(softcap=3.0))), torch.randn(2, 6, 32, requires_grad=True)
    y = net(x, padded(torch.tensor([[True] * 6, [False] * 6])))
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_a_prefix_is_seen_by_the_tokens_before_it():
    """Prefix language models: causal, but the first tokens see each other both ways."""
    net, x = model(stack(attention(window=CAUSAL))), torch.randn(1, 9, 32)
    at = At(torch.arange(9)[None], prefix=torch.arange(9)[None] < 4)
    both_ways = model(stack(attention()))
    both_ways.load_state_dict(net.state_dict())
    close(net(x, at)[:, :4], both_ways(x[:, :4]), 2e-6)
    close(net(x, at)[:, 8:], net(x)[:, 8:], 2e-6)
