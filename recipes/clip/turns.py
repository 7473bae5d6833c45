"""Whose turn it is: batches from several sources in proportion to their sizes, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

MOST = 1000  # turns of one source for one of the smallest


class Turns:
    """Sources take turns in a fixed round, evenly spread; `counts` are their sizes."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)

    @cached_property
    def round(self) -> list[tuple[int, int]]:
        """(source, how often it had its turn before in this round) of each step of a round."""
        shares = [min(MOST, round(count / min(self.counts))) for count in self.counts]
        due = [((time + 0.5) / share, source, time) for source, share in enumerate(shares) for time in range(share)]
        return [(source, time) for _, source, time in sorted(due)]

    def at(self, step: int) -> tuple[int, int]:
        """The source of a step and the number of its batch, each counted from 0."""
        rounds, place = divmod(step, len(self.round))
        source, time = self.round[place]
        return source, rounds * sum(other == source for other, _ in self.round) + time
