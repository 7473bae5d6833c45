"""Recall against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from mm.errors import InputError
from mm.recipes.common import metrics
from mm.recipes.common.metrics import recall, retrieval


def by_hand(scores: torch.Tensor, query: list[int], target: list[int], k: int) -> float:
    """Recall at k as the mean over all orders of tied targets, the right ones of a query counted as one."""
    total = 0.0
    for row, label in zip(scores.tolist(), query, strict=True):
        best = max(score for score, other in zip(row, target, strict=True) if other == label)
        wrong = [score for score, other in zip(row, target, strict=True) if other != label]
        above, tied = sum(score > best for score in wrong), sum(score == best for score in wrong)
        orders = list(itertools.permutations(range(tied + 1)))
        total += sum(above + order.index(0) < k for order in orders) / len(orders)
    return 100 * total / len(query)


def test_recall_with_ties_and_several_targets_equals_brute_force():
    random = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (30, 9), generator=random).float()  # few values, so many ties
    query, target = [i % 4 for i in range(30)], [0, 1, 2, 3, 0, 1, 0, 2, 2]
    found = recall(scores, query, target, (1, 3))
    assert found["R@1"] == pytest.approx(by_hand(scores, query, target, 1))
    assert found["R@3"] == pytest.approx(by_hand(scores, query, target, 3))


def test_a_model_that_says_the_same_of_everything_scores_chance():
    names = [f"n{i}" for i in range(20)]
    assert recall(torch.zeros(20, 20), names, names, (1, 5)) == pytest.approx({"R@1": 5.0, "R@5": 25.0})


def test_several_captions_of_a_picture_are_all_right_answers(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 2)  # more chunks than one
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0, 0.1, 1], [0, 5, 0.1], [0, 0.2, 0.1], [0, 0.1, 3]])
    found = retrieval(images, texts, ["a", "b", "c"], ["a", "a", "b", "b", "c"], ks=(1,))
    assert found["i2t"]["R@1"] == pytest.approx(100)
    assert found["t2i"]["R@1"] == pytest.approx(80)  # the second text of "a" is nearer to "c"


def test_retrieval_does_not_depend_on_the_length_of_vectors():
    random = torch.Generator().manual_seed(1)
    images, texts = torch.randn(8, 5, generator=random), torch.randn(8, 5, generator=random)
    labels = list(range(8))
    stretched = retrieval(images * torch.arange(1, 9)[:, None], texts, labels, labels)
    assert stretched == retrieval(images, texts, labels, labels)


@pytest.mark.parametrize(("scores", "query", "target", "says"), [
    (torch.zeros(2, 3), ["a", "b"], ["a", "b"], r"shape \(2, 2\)"),
    (torch.zeros(0, 2), [], ["a", "b"], "a query"),
    (torch.zeros(1, 2), ["c"], ["a", "b"], "'c'"),
    (torch.tensor([[float("nan"), 1.0]]), ["a"], ["a", "b"], "not finite"),
])
def test_what_cannot_be_counted_is_refused(scores, query, target, says):
    with pytest.raises(InputError, match=says):
        recall(scores, query, target)
