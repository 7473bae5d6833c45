"""The page of `mm talk` in a browser: a WAV file is the microphone, sound and text come back."""

import asyncio

import numpy as np
import pytest
import soundfile
import talking
from aiohttp.test_utils import TestServer
from browser import browsing, chromium

from mm.recipes.talk.server import Address, Server

RATE = 16000  # Hz: not that of Kyutai's codec, so that the page has to go by what it is told


@pytest.fixture
def spoken(tmp_path):
    """A microphone that repeats a second of 440 Hz."""
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    soundfile.write(tmp_path / "question.wav", wave, 48000, subtype="PCM_16")
    return tmp_path / "question.wav"


def test_a_conversation_in_a_browser(spoken, tmp_path, monkeypatch):
    chromium()
    server = Server(talking.partner(RATE), 1, Address(token="secret"))
    heard = []
    hear = server.engine.hear
    monkeypatch.setattr(server.engine, "hear", lambda seat, frame: (heard.append(frame), hear(seat, frame)))

    async def go():
        async with TestServer(server.app()) as running, \
                browsing(str(running.make_url("/")), spoken, tmp_path / "profile") as page:
            await page.until("document.readyState === 'complete' && !!document.getElementById('go')")
            await page.run("at('go').click()")
            await page.until("talk === null")
            refused = await page.run("at('state').textContent")
            await page.run("history.replaceState(null, '', '?token=secret'); "
                           "document.querySelector('[name=text_topk]').value = 7; at('go').click()")
            await page.until("talk && talk.frames > 30 && at('text').textContent.trim().length > 2")
            await page.until("parseFloat(at('theirs').style.width) > 20 && parseFloat(at('mine').style.width) > 20")
            found = {name: await page.run(f"at('{name}').textContent") for name in (
                "state", "text", "delay", "buffer", "unheard", "late", "unsent", "gaps", "skipped")}
            found["topk"] = await page.run("talk.facts.text_topk")
            await page.run("at('go').click()")
            await page.until("talk === null")
            async with asyncio.timeout(10):
                while server.hall.live:
                    await asyncio.sleep(0.05)
            await page.run("const give = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices); "
                           "navigator.mediaDevices.getUserMedia = async asked => window.given = await give(asked); "
                           "at('go').click(); at('go').click()")  # a microphone that is given when nobody wants it
            await page.until("window.given?.getTracks().every(track => track.readyState === 'ended')")
            return refused, found, page.complaints
    refused, found, complaints = asyncio.run(go())
    assert "this server wants a token" in refused and not complaints and found["topk"] == 7
    assert found["state"] == "Go on, say something." and found["text"].strip()
    assert 0 < float(found["delay"].split()[0]) < 5000 and float(found["buffer"].split()[0]) < 1000
    assert found["unsent"] == "0" and found["unheard"] == "0 ms" and found["late"].isdigit()
    wave = np.concatenate(heard)[RATE // 2:RATE * 3 // 2]  # a second of what the server heard, past the beginning
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    assert abs(int(spectrum.argmax()) - 440) <= 1 and np.abs(wave).max() > 0.1
