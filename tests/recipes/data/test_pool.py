"""Pieces of work in one process and in several."""

from functools import partial
from operator import methodcaller

import pytest

from mm.recipes.data.pool import spread


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_piece_is_done_once(jobs):
    begin = partial(methodcaller, "bit_length")
    assert sorted(spread(begin, range(9), jobs)) == [0, 1, 2, 2, 3, 3, 3, 3, 4]
    with pytest.raises(AttributeError, match="bit_length"):
        list(spread(begin, [1, "one", 2], jobs))
