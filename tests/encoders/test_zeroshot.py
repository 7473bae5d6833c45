"""Classifiers from labels: against the definition, and labels from which none can be made."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mm.encoders.zeroshot import TEMPLATES, classify, zeroshot_classifier
from mm.errors import InputError


class Toy(torch.nn.Module):
    """Letters in, random vectors of different lengths out."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(256, 8))
        self.seen = []

    def tokenize(self, texts):
        self.seen.append(len(texts))
        return torch.tensor([[len(text), *(text.encode()[i % len(text)] for i in range(40))] for text in texts])

    def encode_text(self, ids):
        return self.table[ids[:, 1:]].mean(1) * ids[:, :1]


@given(st.lists(st.text("abcdef", min_size=1, max_size=5), min_size=1, max_size=9), st.integers(1, 3),
       st.integers(1, 12))
def test_the_mean_of_normalised_embeddings(labels, count, batch):
    torch.manual_seed(0)
    toy, templates = Toy(), ("{}", "one {} here", "{} or {}")[:count]
    found = zeroshot_classifier(toy, labels, templates, batch=batch)
    assert found.shape == (8, len(labels)) and max(toy.seen) <= max(batch, count)
    for label, column in zip(labels, found.T, strict=True):
        texts = [template.replace("{}", label) for template in templates]
        mean = sum(F.normalize(toy.encode_text(toy.tokenize([text]))[0], dim=0) for text in texts) / count
        torch.testing.assert_close(column, F.normalize(mean, dim=0), atol=1e-6, rtol=1e-5)
    assert not found.requires_grad


def test_equals_open_clip():
    reference = pytest.importorskip("open_clip").build_zero_shot_classifier
    toy, labels = Toy(), ["dog", "cat", "red bicycle"]

    class Theirs(torch.nn.Module):
        def encode_text(self, ids, normalize):
            return F.normalize(toy.encode_text(ids), dim=-1)

    expected = reference(Theirs(), toy.tokenize, labels, TEMPLATES["photo"], num_classes_per_batch=2)
    torch.testing.assert_close(zeroshot_classifier(toy, labels, TEMPLATES["photo"]), expected, atol=1e-6, rtol=1e-5)


def test_probabilities():
    features, classifier = torch.randn(5, 8, dtype=torch.bfloat16), F.normalize(torch.randn(8, 3), dim=0)
    found = classify(features, classifier, torch.tensor(2.0))
    cosines = F.cosine_similarity(features.float()[:, None], classifier.T[None], dim=-1)
    torch.testing.assert_close(found, torch.softmax(cosines * 2.718281828 ** 2, -1))
    torch.testing.assert_close(classify(features * 8, classifier, 2.0), found)


def test_labels_may_hold_braces():
    found = zeroshot_classifier(Toy(), ["{} {0} {x}", "a"], ("see {}, {y}",))
    assert found.isfinite().all()


@pytest.mark.parametrize(("labels", "templates", "told"), [
    ([], ("{}",), "0 and 1"), (["a"], (), "1 and 0"), (["a", " "], ("{}",), "label 2 of 2 is blank"),
    (["a"], ("a photo",), "'a photo' has no"), ("dog", ("{}",), "not one string"), (["a"], "{}", "not one string")])
def test_what_makes_no_classifier(labels, templates, told):
    with pytest.raises(InputError, match=told):
        zeroshot_classifier(Toy(), labels, templates)


def test_the_sets_are_sound():
    for name, templates in TEMPLATES.items():
        assert len(set(templates)) == len(templates) and all(t.count("{}") == 1 for t in templates), name
    assert len(TEMPLATES["plain"]) < len(TEMPLATES["photo"]) < len(TEMPLATES["broad"])
