"""One client's conversation: what it sends becomes frames for the engine, what the engine says becomes messages."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
from aiohttp import WSMsgType, web

from mm.errors import InputError

from . import protocol
from .engine import Engine, Seat, Spoken
from .hall import KEEPALIVE, Hall
from .limits import Allowance, Limits
from .protocol import Control, Kind
from .sound import wire
from .wishes import Wishes

REFUSED, FAILED, LEAVING = 1008, 1011, 1001  # why a websocket is closed
log = logging.getLogger("mm.talk")


class Over(Exception):
    """A conversation ends by no fault of the client's."""

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code


class Session:
    """`run` it on an accepted websocket. Sound is coded and decoded in `pool`, off the event loop."""

    def __init__(self, socket: web.WebSocketResponse, wishes: Wishes, engine: Engine, hall: Hall, limits: Limits,
                 pool: Executor, about: dict[str, Any]):
        self.socket, self.wishes, self.engine, self.hall, self.limits = socket, wishes, engine, hall, limits
        self.pool, self.about, self.loop = pool, about, asyncio.get_running_loop()
        self.wire = wire(wishes.format, engine.partner.rate)
        self.seat = Seat(wishes, self.from_engine(self.post),
                         self.from_engine(lambda sentence: self.end(Over(sentence, FAILED))))
        self.seated = self.paused = False
        self.held = np.zeros(0, np.float32)
        self.outbox: deque[Spoken] = deque()
        self.news = asyncio.Event()
        self.over: Exception | None = None
        self.heard_at, self.unsent, self.told = time.monotonic(), 0, (0, 0)
        self.messages = Allowance(limits.messages, limits.messages_a_second,
                                  f"more than {limits.messages_a_second:g} messages a second are too many")
        self.bytes = Allowance(limits.bytes, limits.bytes_a_second,
                               f"more than {limits.bytes_a_second} bytes a second are too many")
        self.sound = Allowance(limits.ahead, 1.05, f"more than {limits.ahead:g} s of sound ahead of time are too many: "
                                                   "send it as fast as it is spoken")

    def from_engine(self, call: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda x: self.loop.call_soon_threadsafe(call, x)

    async def run(self) -> None:
        """Until the client leaves. Raises InputError for what it did wrong, and `Over`."""
        tasks = [asyncio.create_task(self.listen()), asyncio.create_task(self.converse())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception) and not isinstance(end, ConnectionError):
                raise end

    def end(self, why: Exception) -> None:
        """Break off."""
        self.over = why
        self.news.set()

    # ------------------------------------------------------------------------------------- hearing
    async def listen(self) -> None:
        async for message in self.socket:
            self.messages.take(1)
            if message.type == WSMsgType.TEXT:
                raise InputError("messages should be binary: a byte that says the kind, and the rest")
            if message.type != WSMsgType.BINARY:
                return
            if len(message.data) > self.limits.message_bytes:
                raise InputError(f"a message of {len(message.data)} bytes is longer than {self.limits.message_bytes}")
            self.bytes.take(len(message.data))
            if (known := protocol.parse(message.data)) is not None:
                await self.take(known)

    async def take(self, message: protocol.Message) -> None:
        """Sound and control; other kinds mean nothing from a client."""
        if message.kind is Kind.AUDIO:
            pieces = self.wire.heard(message.payload)
            while (wave := await self.loop.run_in_executor(self.pool, next, pieces, None)) is not None:
                self.hear(wave)
        elif message.kind is Kind.CONTROL:
            self.obey(protocol.control(message.payload))

    def hear(self, wave: np.ndarray) -> None:
        """Before the conversation begins, and while it pauses, the sound is not for the model."""
        partner = self.engine.partner
        self.sound.take(len(wave) / partner.rate)
        if len(wave):
            self.heard_at = time.monotonic()
        if not self.seated or self.paused:
            return
        self.held = np.concatenate([self.held, wave])
        while len(self.held) >= partner.frame:
            frame, self.held = np.split(self.held, [partner.frame])
            self.engine.hear(self.seat, frame)

    def obey(self, control: Control | None) -> None:
        if control in (Control.START, Control.PAUSE):
            self.paused = control is Control.PAUSE
        elif control is Control.RESTART and self.seated:
            self.engine.restart(self.seat)

    # ------------------------------------------------------------------------------------- speaking
    async def converse(self) -> None:
        async with self.hall.place(self.tell_place):
            self.check()
            await self.socket.send_bytes(protocol.HANDSHAKE)
            self.engine.enter(self.seat)
            self.engine.metrics.add("sessions")
            self.seated, self.heard_at = True, time.monotonic()
            await self.tell()
            try:
                async with asyncio.timeout(self.limits.session):
                    await self.speak()
            except TimeoutError:
                raise Over(f"a conversation lasts at most {self.limits.session / 60:g} minutes here", REFUSED) from None
            finally:
                self.seated = False
                self.engine.leave(self.seat)

    async def speak(self) -> None:
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE):
                    await self.news.wait()
            except TimeoutError:
                await self.socket.send_bytes(protocol.PING)
            self.news.clear()
            self.check()
            while self.outbox:
                await self.say(self.outbox.popleft())
            if self.told != (self.seat.dropped, self.unsent):
                await self.tell()

    async def say(self, spoken: Spoken) -> None:
        data = await self.loop.run_in_executor(self.pool, self.wire.said, spoken.wave)
        if data:
            await self.socket.send_bytes(protocol.audio(data))
        if spoken.text:
            await self.socket.send_bytes(protocol.text(spoken.text))
        self.engine.metrics.observe("answer_seconds", time.monotonic() - spoken.heard_at)

    def check(self) -> None:
        if self.over is not None:
            raise self.over
        if not self.engine.is_alive():
            raise Over("the engine has stopped; the server's log shows why", FAILED)
        if self.seated and time.monotonic() - self.heard_at > self.limits.silence:
            raise InputError(f"nothing was heard for {self.limits.silence:g} s")

    def post(self, spoken: Spoken) -> None:
        """A frame to send. Where the client does not take them, the oldest are left out, not their text."""
        self.outbox.append(spoken)
        if len(self.outbox) > self.limits.unsent:
            oldest = self.outbox.popleft()
            self.outbox[0] = replace(self.outbox[0], text=oldest.text + self.outbox[0].text)
            self.unsent += 1
            self.engine.metrics.add("answers_dropped")
        self.news.set()

    async def tell(self) -> None:
        """What the conversation is like, in the terms of Kyutai's page, and how many frames were left out."""
        self.told = self.seat.dropped, self.unsent
        await self.socket.send_bytes(protocol.metadata(self.facts() | {
            "dropped_frames": self.told[0], "unsent_frames": self.told[1]}))

    async def tell_place(self, place: int) -> None:
        self.check()
        await self.socket.send_bytes(protocol.metadata(self.facts() | {"queue": place}))

    def facts(self) -> dict[str, Any]:
        return self.wishes.told() | self.about
