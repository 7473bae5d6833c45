"""Rows of packed documents: every token once a pass, any row alone, the same ones on any number of processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import InputError
from mm.recipes.data.report import Account
from mm.recipes.data.sampler import Order
from mm.recipes.lm.data import Batches, Fixed, Packed, held_out, shorter, whole
from mm.recipes.lm.objectives import NONE, NextToken
from mm.recipes.lm.token_file import Encoded, TokenFile, write_tokens


def file_of(folder, lengths, learned=None, vocab=60000, name="a"):
    """Documents of these lengths; token i of all is the number i."""
    starts = np.cumsum([0, *lengths])
    documents = [Encoded(list(range(a, a + n)), learned or [(0, n)], True, (0, i))
                 for i, (a, n) in enumerate(zip(starts, lengths, strict=False))]
    write_tokens(folder / name, documents, vocab, ["texts.txt"], Account)
    return TokenFile(folder / name)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 16), st.integers(0, 1), st.integers(0, 3))
def test_a_pass_has_every_token_once_in_order_within_its_document(tmp_path_factory, lengths, length, extra, epoch):
    file = file_of(tmp_path_factory.mktemp("t"), lengths)
    packed = Packed(whole(file), length, 7, extra)
    rows = [packed.row(epoch, i) for i in range(len(packed))]
    fresh = [row.ids[:length][row.documents[:length] >= 0].tolist() for row in rows[:-1]]
    tokens = [i for row in fresh for i in row] + rows[-1].ids[rows[-1].documents >= 0].tolist()
    assert sorted(tokens) == list(range(sum(lengths)))
    ends = np.cumsum(lengths)
    for row in rows:
        there = row.documents >= 0
        assert not row.ids[~there].any() and not row.learned[~there].any() and row.learned[there].all()
        assert (np.searchsorted(ends, row.ids[there], "right") == row.documents[there]).all()
        follow = row.documents[1:][there[1:]] == row.documents[:-1][there[1:]]
        assert (np.diff(row.ids)[there[1:]][follow] == 1).all()
    targets = [batch.targets[batch.targets != NONE].tolist() for batch in
               Fixed(Packed(whole(file), length, None, 1), NextToken(), 3)]
    assert sorted(i for part in targets for i in part) == sorted(set(range(sum(lengths))) - {0, *ends[:-1].tolist()})


def test_passes_differ_and_any_step_stands_alone(tmp_path):
    spans = whole(file_of(tmp_path, [50, 3, 17, 40, 8, 90]))
    packed = Packed(spans, 8, 1, 1)
    batches = Batches(packed, NextToken(), Order(count=len(packed), batch=4, seed=1))
    again = Batches(Packed(whole(TokenFile(tmp_path / "a")), 8, 1, 1), NextToken(), batches.order)
    assert all(torch.equal(a, b) for a, b in zip(batches[1000][:3], again[1000][:3], strict=True))
    assert not torch.equal(batches[0].ids, batches[1000].ids)
    assert packed.laid(0)[0].tolist() != packed.laid(1)[0].tolist()


def test_processes_share_a_batch(tmp_path):
    packed = Packed(whole(file_of(tmp_path, [50, 3, 17, 40, 8, 90])), 8, 1, 1)
    parts = [Batches(packed, NextToken(), Order(count=len(packed), batch=4, seed=1, rank=r, world=2)) for r in (0, 1)]
    full = Batches(packed, NextToken(), Order(count=len(packed), batch=4, seed=1))
    for step in (0, 9):
        for i, whole_part in enumerate(full[step][:3]):
            assert torch.equal(whole_part, torch.cat([part[step][i] for part in parts]))


def test_targets_are_the_next_tokens_that_are_learned(tmp_path):
    file = file_of(tmp_path, [6, 5], learned=[(2, 4)])
    batch = Fixed(Packed(whole(file), 16, None, 1), NextToken(), 2)[0]
    assert batch.ids[0].tolist() == [*range(11), *[0] * 5]
    assert batch.documents[0].tolist() == [0] * 6 + [1] * 5 + [-1] * 5
    assert batch.targets[0].tolist() == [NONE, 2, 3, *[NONE] * 4, 8, 9, *[NONE] * 7]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=10), st.floats(0.01, 0.5))
def test_what_is_held_out_and_the_rest_are_all(tmp_path_factory, lengths, share):
    if sum(lengths) < 10:
        lengths = [*lengths, 10]
    file = file_of(tmp_path_factory.mktemp("t"), lengths)
    sides = held_out(file, share)
    tokens = [set().union(*(range(a, b) for a, b in zip(side.starts, side.stops, strict=True))) for side in sides]
    assert not tokens[0] & tokens[1] and tokens[0] | tokens[1] == set(range(sum(lengths)))
    assert share * sum(lengths) <= len(tokens[1]) <= share * sum(lengths) * 1.5 + 2
    assert [side.starts.tolist() for side in held_out(file, share)] == [side.starts.tolist() for side in sides]


def test_nothing_to_hold_out_of(tmp_path):
    with pytest.raises(InputError, match="cannot be held out of 1 tokens"):
        held_out(file_of(tmp_path, [1]), 0.1)


def test_long_spans_are_cut(tmp_path):
    spans = shorter(whole(file_of(tmp_path, [7, 2, 9])), 3)
    assert list(zip(spans.starts.tolist(), spans.stops.tolist(), strict=True)) == [
        (0, 3), (3, 6), (6, 7), (7, 9), (9, 12), (12, 15), (15, 18)]
    assert spans.where(5) == "texts.txt, line 2"


@pytest.mark.parametrize(("vocab", "kind"), [(65536, np.uint16), (65537, np.uint32)])
def test_a_token_file_opens_as_safetensors_and_travels(tmp_path, vocab, kind):
    from safetensors.numpy import load_file

    file = file_of(tmp_path, [3, 2], learned=[(1, 2)], vocab=vocab)
    held = load_file(tmp_path / "a")
    assert held["tokens"].dtype == kind and held["tokens"][:5].tolist() == [0, 1, 2, 3, 4]
    assert held["ends"].tolist() == [3, 5] and held["learned"].tolist() == [[1, 2], [4, 5]]
    again = pickle.loads(pickle.dumps(file))
    assert again.tokens[:5].tolist() == [0, 1, 2, 3, 4] and again.fingerprint == file.fingerprint
    assert file.fingerprint != file_of(tmp_path, [2, 3], vocab=vocab, name="b").fingerprint


def test_a_broken_token_file_is_named(tmp_path):
    file_of(tmp_path, [3, 2])
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-60])
    with pytest.raises(InputError, match="not a whole token file.*ends early"):
        TokenFile(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"short")
    with pytest.raises(InputError, match="not a whole token file"):
        TokenFile(tmp_path / "a")


def test_a_corpus_that_fails_leaves_no_file(tmp_path):
    def documents():
        yield Encoded([1, 2], [(0, 2)], True, (0, 1))
        raise InputError("broken")
    with pytest.raises(InputError, match="broken"):
        write_tokens(tmp_path / "a", documents(), 100, ["x"], Account)
    assert not list(tmp_path.iterdir())
