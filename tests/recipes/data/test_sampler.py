"""The order of data depends on the seed and the step alone."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from mm.errors import InputError
from mm.recipes.data.sampler import Order, Steps, generator, torch_seed


def test_every_pass_has_every_item_once_and_passes_differ():
    order = Order(count=7, batch=3, seed=1)
    rows = list(itertools.islice(itertools.chain.from_iterable(map(order.rows, itertools.count())), 28))
    passes = [[item for epoch, item, _ in rows if epoch == number] for number in range(4)]
    assert all(sorted(items) == list(range(7)) for items in passes)
    assert len({tuple(items) for items in passes}) == 4


def test_a_batch_does_not_depend_on_the_number_of_processes():
    whole = Order(count=10, batch=8, seed=3, each=2)
    parts = [Order(count=10, batch=8, seed=3, each=2, rank=rank, world=4) for rank in range(4)]
    for step in range(5):
        assert whole.rows(step) == [row for part in parts for row in part.rows(step)]
        assert not set(parts[0].rows(step)) & set(parts[1].rows(step))


def test_items_that_come_several_times_come_side_by_side():
    rows = Order(count=5, batch=6, seed=0, each=2).rows(1)
    assert [time for _, _, time in rows] == [0, 1] * 3
    assert rows[0][:2] == rows[1][:2] and rows[0][:2] != rows[2][:2]


def test_the_order_is_the_same_in_another_process():
    what = "Order(count=9, batch=4, seed=5).rows(1234567), torch_seed(1, 2)"
    code = f"from mm.recipes.data.sampler import Order, torch_seed; print({what})"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == f"{Order(count=9, batch=4, seed=5).rows(1234567)} {torch_seed(1, 2)}"


def test_keys_make_independent_generators():
    assert generator(1, 2).random() == generator(1, 2).random()
    assert len({generator(*key).random() for key in [(1, 2), (2, 1), (1, 3), (1,), (1, 2, 0, 1)]}) == 5


def test_steps_start_where_they_are_told_and_count_from_nothing():
    assert list(Steps(3, 6)) == [3, 4, 5] and len(Steps(3, 6)) == 6


@pytest.mark.parametrize(("wrong", "says"), [
    ({"count": 0}, "nothing to train on"), ({"batch": 0}, "0 rows"), ({"batch": 5, "world": 2}, "2 processes"),
    ({"batch": 6, "each": 4}, "multiple of 4"), ({"batch": 4, "world": 2, "each": 4}, "multiple of 4")])
def test_batches_that_cannot_be_shared_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        Order(**{"count": 3, "batch": 4, "seed": 0, **wrong})
