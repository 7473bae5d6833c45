"""What masking and span corruption hide: how much, what never, and that the answer and the rest are the text again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import InputError
from mm.recipes.data.sampler import generator
from mm.recipes.lm.objectives import (
    NONE,
    NOWHERE,
    Corrupted,
    Masked,
    NextToken,
    Row,
    noise,
    objective_for,
    parts,
    sentinels,
)
from mm.recipes.lm.settings import LmData
from mm.recipes.lm.tokenizer import BOS, EOS, MASK, PAD, assembled
from mm.tokenizer.tokenizer import clip_tokenizer

SPECIAL = [PAD, BOS, EOS, MASK, *(f"<extra_id_{i}>" for i in range(12))]
TOKENIZER = assembled([*SPECIAL, *map(chr, range(33, 133))], [], SPECIAL, EOS, False)
DATA = LmData(path="x")


def row_of(lengths, seed, padding=0, learned=1.0):
    """Documents with a start and an end token, but the last one, and padding."""
    random, ids = np.random.default_rng(seed), []
    for i, n in enumerate(lengths):
        ids += [1, *random.integers(16, 116, n).tolist(), *([2] if i + 1 < len(lengths) or not seed % 2 else [])]
    numbers = np.repeat(np.arange(len(lengths)) * 3, [n + 2 for n in lengths])[: len(ids)]
    numbers = np.concatenate([numbers, np.full(padding, NOWHERE)])
    return Row(np.array(ids + [0] * padding), numbers, (numbers >= 0) & (random.random(len(numbers)) < learned))


ROWS = st.builds(row_of, st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(0, 99), st.integers(0, 9),
                 st.sampled_from([0.0, 0.5, 1.0]))


def pick(*seed):
    return generator(*seed)


@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(0, 9), st.sampled_from([0.05, 0.15, 0.5]))
def test_span_corruption_has_every_token_once_and_is_the_text_again(rows, seed, share):
    made = Corrupted(TOKENIZER, 116, share, 3.0)
    batch = made(rows, [pick(seed, i) for i in range(len(rows))])
    assert batch.ids.shape == batch.documents.shape
    assert batch.inputs.shape == batch.targets.shape == batch.target_documents.shape
    for i, row in enumerate(rows):
        ids, numbers = batch.ids[i].numpy(), batch.documents[i].numpy()
        targets, theirs, inputs = (part[i].numpy() for part in (batch.targets, batch.target_documents, batch.inputs))
        assert ((targets == NONE) == (theirs == NOWHERE)).all() and (ids[numbers == NOWHERE] == 0).all()
        assert set(theirs) <= set(numbers) | {NOWHERE}
        for document in set(row.documents) - {NOWHERE}:
            text, answer = row.ids[row.documents == document], targets[theirs == document].tolist()
            told = spelled(answer)
            assert inputs[theirs == document].tolist() == [0, *answer][:-1]
            assert not answer or answer[-1] == 2
            again = [i for token in ids[numbers == document].tolist() for i in told.pop(token, [token])]
            assert again == text.tolist() and not told
            hideable = row.learned[row.documents == document] & (text >= 16)
            hidden = sum(map(len, spelled(answer).values()))
            assert hidden <= max(round(hideable.sum() * share), 1) and (hidden > 0) == (hideable.sum() > 1)
            if row.learned[row.documents == document].all() and hideable.sum() > 1 and hidden <= 12:
                assert hidden == min(max(round(hideable.sum() * share), 1), hideable.sum() - 1)


def spelled(answer):
    """{sentinel: tokens} of a target, which names its sentinels in order."""
    told, last = {}, None
    for token in answer[:-1]:
        if 4 <= token < 16:
            told[last := token] = []
        else:
            assert token >= 16
            told[last].append(token)
    assert list(told) == list(range(4, 4 + len(told)))
    return told


@given(st.integers(2, 400), st.floats(0.01, 0.9), st.floats(1, 8), st.integers(1, 30), st.integers(0, 9))
def test_noise_has_its_share_in_spans_of_the_mean_length(count, share, mean, most, seed):
    hidden = noise(count, share, mean, most, np.random.default_rng(seed))
    spans = int(np.diff(hidden, prepend=False)[hidden].sum())
    assert len(hidden) == count and hidden.sum() == min(max(round(count * share), 1), count - 1) and not hidden[0]
    assert spans == min(max(round(hidden.sum() / mean), 1), hidden.sum(), count - hidden.sum(), most)


def test_parts_are_all_equally_likely():
    random = np.random.default_rng(0)
    seen = [tuple(parts(4, 3, random)) for _ in range(3000)]
    shares = {key: round(seen.count(key) / 3000, 1) for key in set(seen)}
    assert shares == {(1, 1, 2): 0.3, (1, 2, 1): 0.3, (2, 1, 1): 0.3}


@given(ROWS, st.integers(0, 9), st.sampled_from([0.15, 0.5]))
def test_masking_predicts_its_share_and_no_special_token(row, seed, share):
    batch = Masked(TOKENIZER, share)([row], [pick(seed)])
    ids, targets = batch.ids[0].numpy(), batch.targets[0].numpy()
    chosen, usable = targets != NONE, row.learned & (row.ids >= 16)
    assert not (chosen & ~usable).any()
    assert chosen.sum() == max(round(usable.sum() * share), min(usable.sum(), 1))
    assert (targets[chosen] == row.ids[chosen]).all() and (ids[~chosen] == row.ids[~chosen]).all()
    assert set(ids[chosen]) <= {3, *range(16, 116)} and (batch.documents[0].numpy() == row.documents).all()


def test_masking_is_80_10_10():
    row = Row(np.full(100_000, 50), np.zeros(100_000, int), np.ones(100_000, bool))
    batch = Masked(TOKENIZER, 0.15)([row], [pick(0)])
    ids = batch.ids[0][batch.targets[0] != NONE].numpy()
    assert len(ids) == 15000
    assert abs((ids == 3).mean() - 0.8) < 0.01 and abs((ids == 50).mean() - 0.101) < 0.01
    assert set(ids) == {3, *range(16, 116)}


@pytest.mark.parametrize("kind", ["masked", "spans"])
def test_a_batch_depends_on_its_key_alone(kind):
    rows, made = [row_of([40, 30], 0), row_of([40, 30], 2)], objective_for(kind, DATA, TOKENIZER, 116)
    first, again, other = (made(rows, [pick(step, i) for i in range(2)]) for step in (1, 1, 2))
    assert first.ids.tolist() == again.ids.tolist() and first.targets.tolist() == again.targets.tolist()
    assert first.ids.tolist() != other.ids.tolist()


def test_sentinels_come_from_the_tokenizer_or_from_spare_entries():
    assert sentinels(TOKENIZER, 116) == list(range(4, 16))
    assert sentinels(clip_tokenizer(), 49410) == [49409, 49408]
    with pytest.raises(InputError, match="no <extra_id_0>.*--sentinels 100"):
        sentinels(clip_tokenizer(), 49408)


def test_an_objective_fits_its_tokenizer():
    assert isinstance(objective_for("next", DATA, TOKENIZER, 116), NextToken)
    with pytest.raises(InputError, match="tokenizer has 116 entries, the model's embedding 100"):
        objective_for("next", DATA, TOKENIZER, 100)
    with pytest.raises(InputError, match="no mask token.*--mask true"):
        objective_for("masked", DATA, clip_tokenizer(), 49408)


@pytest.mark.parametrize(("wrong", "says"), [
    ({"share": 0.0}, "data.share"), ({"span": 0.5}, "data.span"), ({"holdout": 1.0}, "data.holdout"),
    ({"length": 1}, "data.length"), ({"batch_size": 0}, "data.batch_size"), ({"vocab": 0}, "data.vocab")])
def test_settings_that_make_no_sense(wrong, says):
    with pytest.raises(InputError, match=says):
        LmData(**{"path": "x", **wrong})
