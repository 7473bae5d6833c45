"""Places for conversations, and the queue of those who wait for one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from mm.errors import InputError

KEEPALIVE = 5.0  # seconds after which a client hears something: Kyutai's page gives up after 10


class Full(InputError):
    """Neither a place nor one in the queue is left."""


class Hall:
    """`capacity` conversations at once, and `queue` clients in line, first come, first served."""

    def __init__(self, capacity: int, queue: int):
        self.capacity, self.most = capacity, queue
        self.live = 0
        self.line: list[object] = []
        self.moved = asyncio.Event()

    @contextlib.asynccontextmanager
    async def place(self, tell: Callable[[int], Awaitable[None]]) -> AsyncIterator[None]:
        """A place, once there is one; until then `tell` gets the place in the queue, at once, when it changes and every
        few seconds. Raises `Full`."""
        if self.live + len(self.line) >= self.capacity + self.most:
            raise Full(f"all {self.capacity} places are taken and {self.most} clients wait already; come later")
        ticket = object()
        self.line.append(ticket)
        try:
            while self.line[0] is not ticket or self.live >= self.capacity:
                await tell(self.line.index(ticket) + 1)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KEEPALIVE):
                        await self.moved.wait()
            self.live += 1
        finally:
            self.line.remove(ticket)
            self.move()
        try:
            yield
        finally:
            self.live -= 1
            self.move()

    def move(self) -> None:
        """All who wait look where they are."""
        self.moved.set()
        self.moved = asyncio.Event()
