"""Every pool against its definition, with prefix tokens and with padding."""

import pytest
import torch
from torch import nn

from mm.encoders.spec import (
    ArgmaxPool,
    EosPool,
    FlattenPool,
    MaxPool,
    MeanMaxPool,
    MeanPool,
    ProbePool,
    Projection,
    QueryPool,
    TokenPool,
)
from mm.encoders.spec import Head as HeadSpec
from mm.encoders.vision.pooling import Head, build_pool
from mm.errors import InputError
from mm.spec import LayerNorm, Mlp

X = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [True] * 2 + [False] * 5])


@pytest.mark.parametrize(("settings", "expected"), [
    (TokenPool(), X[:, 0]),
    (TokenPool(index=-1), X[:, 6]),
    (MeanPool(), X[:, 2:].mean(1)),
    (MeanMaxPool(), (X[:, 2:].mean(1) + X[:, 2:].amax(1)) / 2),
    (MeanPool(prefix=True), X.mean(1)),
    (MaxPool(), X[:, 2:].max(1).values),
    (MaxPool(prefix=True), X.max(1).values),
    (FlattenPool(tokens=5), X[:, 2:].reshape(3, 60)),
])
def test_pools_of_pictures(settings, expected):
    torch.testing.assert_close(build_pool(settings, 12)(X, prefix=2), expected)


def test_padding_is_not_pooled():
    for settings, one in ((MeanPool(), lambda x: x.mean(0)), (MaxPool(), lambda x: x.max(0).values)):
        expected = torch.stack([one(row[keep]) for row, keep in zip(X, REAL, strict=True)])
        torch.testing.assert_close(build_pool(settings, 12)(X, real=REAL), expected)


def test_argmax_takes_the_first_of_the_largest():
    ids = torch.tensor([[1, 9, 3, 9, 0, 0, 0], [9, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7]])
    assert torch.equal(build_pool(ArgmaxPool(), 12)(X, ids=ids), X[[0, 1, 2], [1, 0, 6]])


def test_eos_takes_the_first_or_the_start_where_there_is_none():
    ids = torch.tensor([[1, 5, 9, 5, 0, 0, 0], [9, 9, 5, 9, 5, 0, 0], [9, 9, 9, 9, 9, 9, 9]])
    assert torch.equal(build_pool(EosPool(id=5), 12)(X, ids=ids), X[[0, 1, 2], [1, 2, 0]])


def redrawn(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def torch_attention(attention, dim, memory_dim, heads):
    """torch's own multi-head attention with the weights of a cross-attention."""
    theirs = nn.MultiheadAttention(dim, heads, kdim=memory_dim, vdim=memory_dim, batch_first=True)
    theirs._qkv_same_embed_dim = False
    theirs.q_proj_weight = attention.q.weight
    theirs.k_proj_weight, theirs.v_proj_weight = (nn.Parameter(w) for w in attention.kv.weight.chunk(2))
    theirs.in_proj_bias = nn.Parameter(torch.cat([attention.q.bias, attention.kv.bias]))
    theirs.out_proj = attention.out
    return theirs


def test_probe_pool_of_patches_alone():
    whole = redrawn(build_pool(ProbePool(heads=3, mlp=Mlp(hidden=20)), 12))
    patches = build_pool(ProbePool(heads=3, mlp=Mlp(hidden=20), prefix=False), 12)
    patches.load_state_dict(whole.state_dict())
    for real in (None, REAL):
        expected = whole(X[:, 1:], real=None if real is None else real[:, 1:])
        torch.testing.assert_close(patches(X, prefix=1, real=real), expected)


def test_probe_pool():
    pool = redrawn(build_pool(ProbePool(heads=3, mlp=Mlp(hidden=20, act="gelu_tanh")), 12))
    theirs = torch_attention(pool.attention, 12, 12, 3)
    for mask in (None, REAL):
        y, _ = theirs(pool.probe.expand(3, 1, -1), X, X, key_padding_mask=None if mask is None else ~mask)
        expected = y + pool.mlp.down(nn.functional.gelu(pool.mlp.up(pool.norm(y)), approximate="tanh"))
        torch.testing.assert_close(pool(X, real=mask), expected[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("then", "expected"), [
    (TokenPool(), lambda y: y[:, 0]), (MeanPool(), lambda y: y[:, 1:].mean(1))])
def test_query_pool(then, expected):
    pool = redrawn(build_pool(QueryPool(queries=4, heads=2, dim=8, then=then), 12))
    tokens = pool.token_norm(X)
    y, _ = torch_attention(pool.attention, 8, 12, 2)(pool.query_norm(pool.query).expand(3, -1, -1), tokens, tokens)
    torch.testing.assert_close(pool(X), expected(pool.norm(y)), atol=1e-5, rtol=1e-5)


def test_head_normalises_after_the_pool():
    head = redrawn(Head(12, HeadSpec(pool=MeanPool(), norm=LayerNorm(), proj=Projection(dim=5, bias=True))))
    pooled = nn.functional.layer_norm(X.mean(1), (12,), head.norm.weight, head.norm.bias)
    torch.testing.assert_close(head.pooled(X), pooled)
    torch.testing.assert_close(head.proj(head.pooled(X)), pooled @ head.proj.weight.T + head.proj.bias)


def test_head_without_norm_and_projection_is_the_pool():
    head = Head(12, HeadSpec(pool=TokenPool()))
    assert torch.equal(head.proj(head.pooled(X)), X[:, 0])
    assert not list(head.parameters())


def test_query_pool_heads_must_divide_its_width():
    with pytest.raises(InputError, match="QueryPool.dim 8 cannot be split over 3 heads"):
        QueryPool(queries=1, heads=3, dim=8, then=TokenPool())


def test_flatten_serves_one_number_of_patches():
    head = Head(12, HeadSpec(pool=FlattenPool(tokens=5), proj=Projection(dim=4)))
    assert head.proj(head.pooled(X, prefix=2)).shape == (3, 4)
    with pytest.raises(InputError, match="made for 5 patches cannot serve 6"):
        head.pooled(X, prefix=1)
