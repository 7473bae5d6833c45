"""The thread that computes: all sessions that have a frame waiting go on in one step, about every frame's length.

A step begins when every session that is talking has a frame, when one has two, or a frame's length after the last step
began, whichever is first: sessions fall into one step, a lone one waits for nobody, and one that fell behind catches
up. A session with more than `LATE` frames waiting loses its oldest, all but `KEPT`: what the model says then belongs to
now, and the frames lost are counted and told.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mm.decode.requests import TextStream

from .dialogues import Dialogues
from .metrics import Metrics
from .partner import Partner
from .wishes import Wishes

LATE, KEPT = 12, 2  # frames
TALKING = 1.0  # seconds without a frame after which nobody waits for a session
log = logging.getLogger("mm.talk")


@dataclass(frozen=True)
class Spoken:
    """A frame (frame,) that the model said and its text, often empty; `heard_at` is when (time.monotonic) the frame
    came that it followed on."""

    wave: np.ndarray
    text: str
    heard_at: float


@dataclass(eq=False)
class Seat:
    """One session in the engine. `deliver` and `fail` are called from the engine's thread. `fresh`: the next frame
    begins a conversation."""

    wishes: Wishes
    deliver: Callable[[Spoken], None]
    fail: Callable[[str], None]
    inbox: deque[tuple[float, np.ndarray]] = field(default_factory=deque)
    heard_at: float = -math.inf
    dropped: int = 0
    fresh: bool = True
    words: TextStream | None = None


Batch = dict[Seat, tuple[float, np.ndarray]]  # when it came, and what


class Engine(threading.Thread):
    """`enter`, `hear`, `restart` and `leave` may be called from any thread; `stop` waits for the step that goes on."""

    def __init__(self, partner: Partner, capacity: int, metrics: Metrics):
        super().__init__(name="mm-talk-engine", daemon=True)
        self.partner, self.capacity, self.metrics = partner, capacity, metrics
        self.dialogues = Dialogues(partner, capacity)
        self.seats: list[Seat] = []
        self.changed = threading.Condition()
        self.ending, self.began = False, 0.0

    def enter(self, seat: Seat) -> None:
        with self.changed:
            self.seats.append(seat)

    def hear(self, seat: Seat, frame: np.ndarray) -> None:
        """frame (frame,) float32. Drops a session's oldest frames when too many wait."""
        with self.changed:
            seat.heard_at = time.monotonic()
            seat.inbox.append((seat.heard_at, frame))
            late = len(seat.inbox) - KEPT if len(seat.inbox) > LATE else 0
            for _ in range(late):
                seat.inbox.popleft()
            seat.dropped += late
            self.metrics.add("frames_dropped", late)
            self.changed.notify()

    def restart(self, seat: Seat) -> None:
        """The session forgets what was said."""
        with self.changed:
            seat.inbox.clear()
            seat.fresh = True

    def leave(self, seat: Seat) -> None:
        with self.changed:
            if seat in self.seats:
                self.seats.remove(seat)
            self.changed.notify()

    def stop(self) -> None:
        with self.changed:
            self.ending = True
            self.changed.notify()
        if self.is_alive():
            self.join()

    # ------------------------------------------------------------------------------------- the thread
    def run(self) -> None:
        while True:
            with self.changed:
                while not self.ending and (wait := self.patience(time.monotonic())) > 0:
                    self.changed.wait(None if wait == math.inf else wait)
                if self.ending:
                    return
                seats = list(self.seats)
                batch = {seat: seat.inbox.popleft() for seat in seats if seat.inbox}
                self.began = time.monotonic()
            try:
                self.arrange(seats, batch)
                self.advance(batch)
            except Exception:  # whatever it was, it ends these sessions and not the server
                log.exception("a step failed")
                self.recover(seats)

    def patience(self, now: float) -> float:
        """Seconds until there is something to do."""
        ready = [seat for seat in self.seats if seat.inbox]
        if not ready:
            left = any(key is not None and key not in self.seats for key in self.dialogues.keys)
            return 0.0 if left else math.inf
        talking = [seat for seat in self.seats if seat.inbox or now - seat.heard_at < TALKING]
        if len(ready) == len(talking) or any(len(seat.inbox) > 1 for seat in ready):
            return 0.0
        return self.began + self.partner.seconds - now

    def arrange(self, seats: list[Seat], batch: Batch) -> None:
        """No rows for who left, one for everybody who begins to talk."""
        for key in [key for key in self.dialogues.keys if key is not None]:
            if key not in seats or key.fresh:
                self.dialogues.leave(key)
        for seat in batch:
            if seat not in self.dialogues:
                seat.words, seat.fresh = TextStream(self.partner.model.tokenizer), False
                self.dialogues.enter(seat, seat.wishes)

    def advance(self, batch: Batch) -> None:
        start = time.monotonic()
        said = self.dialogues.step({seat: frame for seat, (_, frame) in batch.items()})
        if batch:
            self.metrics.observe("step_seconds", time.monotonic() - start)
            self.metrics.add("frames", len(batch))
        for seat, spoken in said.items():
            if spoken is not None:
                seat.deliver(Spoken(spoken.wave, self.text(seat, spoken.token), batch[seat][0]))

    def text(self, seat: Seat, token: int) -> str:
        """What a token adds to the text; padding is none."""
        s = self.partner.model.spec.text
        return "" if token in (s.padding, s.word_end) else seat.words.push(token)

    def recover(self, seats: list[Seat]) -> None:
        """Nobody is left, and who comes finds everything as in the beginning."""
        self.metrics.add("steps_failed")
        self.dialogues = Dialogues(self.partner, self.capacity)
        for seat in seats:
            self.leave(seat)
            seat.fail("the model failed in this step, and the conversation is lost; connect again")
