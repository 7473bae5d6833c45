"""What one client may ask of the server."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """message_bytes: of one message. messages, bytes, ahead: how many messages, bytes and seconds of sound a client may
    be ahead of `messages_a_second`, `bytes_a_second` (samples at 48 kHz take 96,000) and the clock. silence: seconds
    without sound that end a session; session: its most seconds. queue: clients that may wait for a place. unsent:
    frames that wait for a client to take them."""

    message_bytes: int = 1 << 16
    messages_a_second: float = 200
    messages: float = 400
    bytes_a_second: float = 1 << 17
    bytes: float = 1 << 20
    ahead: float = 10
    silence: float = 30
    session: float = 900
    queue: int = 32
    unsent: int = 25


class Allowance:
    """So many at once, and so many more with every second. Raises InputError with `sentence` where that is too few."""

    def __init__(self, most: float, a_second: float, sentence: str):
        self.left, self.most, self.a_second, self.sentence = most, most, a_second, sentence
        self.at = time.monotonic()

    def take(self, amount: float) -> None:
        now = time.monotonic()
        self.left = min(self.most, self.left + (now - self.at) * self.a_second) - amount
        self.at = now
        if self.left < 0:
            raise InputError(self.sentence)
