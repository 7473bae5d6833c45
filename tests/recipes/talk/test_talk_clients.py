"""Kyutai's own clients against the server of `mm talk`."""

import asyncio
import sys
import threading
import types

import numpy as np
import pytest
import talking
from talking import FRAME, Speaker, served, speech

from mm.recipes.talk import session


@pytest.fixture(scope="module")
def partner():
    return talking.partner()


class Device:
    """In place of sounddevice: blocks of a microphone, and of a loudspeaker that keeps them, as fast as asked for."""

    microphone, loudspeaker, going = [], [], threading.Event()

    def __init__(self, callback, blocksize, **_):
        self.callback, self.blocksize = callback, blocksize

    def __enter__(self):
        self.going.clear()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def __exit__(self, *_):
        self.going.set()
        self.thread.join()


class Microphone(Device):
    def run(self):
        for block in self.microphone:
            self.callback(block[:, None], self.blocksize, None, None)
            self.going.wait(0.01)


class Loudspeaker(Device):
    def run(self):
        while not self.going.is_set():
            block = np.zeros((self.blocksize, 1), np.float32)
            self.callback(block, self.blocksize, None, None)
            if block.any():
                self.loudspeaker.append(block[:, 0])
            self.going.wait(0.002)


def test_kyutais_python_client(partner, monkeypatch):
    """Its own code, unchanged, against the server: ten frames said, nine answered, text printed, no complaint but that
    it does not know handshakes and metadata."""
    fake = types.ModuleType("sounddevice")
    fake.InputStream, fake.OutputStream = Microphone, Loudspeaker
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    client_module = pytest.importorskip("moshi.client", reason="needs the package moshi")
    Device.microphone, Device.loudspeaker = list(speech(10).reshape(-1, FRAME)), []
    said, logged = [], []
    printer = types.SimpleNamespace(log=lambda level, message: logged.append((level, message)), print_lag=lambda: None,
                                    print_token=said.append, print_pending=lambda: None)

    async def go():
        async with served(partner) as (client, _), client.ws_connect("/api/chat") as socket:
            connection = client_module.Connection(printer, socket, asyncio.get_running_loop())
            running = asyncio.create_task(connection.run())
            async with asyncio.timeout(20):
                while len(Device.loudspeaker) < 9:
                    await asyncio.sleep(0.02)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    asyncio.run(go())
    assert len(Device.loudspeaker) == 9 and np.abs(np.concatenate(Device.loudspeaker)).max() > 0.1
    assert said and {level for level, _ in logged} == {"warning"}
    assert {message for _, message in logged} == {"unknown message kind 0", "unknown message kind 4"}


def test_what_kyutais_web_client_asks_of_a_server(partner, monkeypatch):
    """The handshake first, only kinds that it knows, metadata with all of its fields, and something every 10 s although
    nobody speaks."""
    monkeypatch.setattr(session, "KEEPALIVE", 0.1)

    async def go():
        query = ("text_temperature=0.7&text_topk=25&audio_temperature=0.8&audio_topk=250&pad_mult=0&text_seed=7&"
                 "audio_seed=8&repetition_penalty_context=64&repetition_penalty=1")
        async with served(partner) as (client, _), Speaker.joined(client, query) as speaker:
            await speaker.listen(lambda it: it.kinds.count(6) == 3)
            await speaker.say(speech(4))
            await speaker.listen(lambda it: it.kinds.count(1) == 3)
            return speaker
    speaker = asyncio.run(go())
    assert speaker.kinds[0] == 0 and set(speaker.kinds) <= set(range(8))
    assert max(np.diff(speaker.at)) < 10
    facts = speaker.told[0]
    for name in ("text_temperature", "text_topk", "audio_temperature", "audio_topk", "pad_mult",
                 "repetition_penalty_context", "repetition_penalty"):
        assert isinstance(facts[name], int | float)
    assert isinstance(facts["lm_model_file"], str) and isinstance(facts["instance_name"], str)
    assert len(facts["build_info"]) == 10 and all(isinstance(value, str) for value in facts["build_info"].values())
