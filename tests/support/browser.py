"""Debian's Chromium, headless, with a WAV file in place of a microphone, driven by its own protocol."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--mute-audio",
         "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", "--remote-debugging-port=0",
         "--autoplay-policy=no-user-gesture-required", "--disable-dev-shm-usage", "--disable-background-networking")


def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs a browser: apt-get install chromium")
    return found


class Page:
    """A tab. `run` gives the value of an expression, awaited; `complaints` are what went wrong in the page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket, self.numbers, self.complaints = socket, itertools.count(1), []

    async def call(self, method: str, **params):
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            reply = await self.socket.receive_json(timeout=20)
            if reply.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(reply["params"]["exceptionDetails"])
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]

    async def run(self, expression: str):
        found = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True,
                                userGesture=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while not await self.run(expression):
                await asyncio.sleep(0.1)


@asynccontextmanager
async def browsing(url: str, microphone: Path, home: Path):
    """A page that is open in a browser of its own."""
    process = await asyncio.create_subprocess_exec(
        chromium(), *FLAGS, f"--user-data-dir={home}", f"--use-file-for-fake-audio-capture={microphone}", url,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(60):
            line = b""
            while b"DevTools listening on " not in line:
                line = await process.stderr.readline()
                assert line, "the browser ended"
        draining = asyncio.create_task(process.stderr.read())
        host = line.decode().split("ws://")[1].split("/")[0]
        async with aiohttp.ClientSession() as http:
            tab = None
            while tab is None:
                tabs = json.loads(await (await http.get(f"http://{host}/json")).text())
                tab = next((tab for tab in tabs if tab["type"] == "page" and tab["url"].startswith("http")), None)
                await asyncio.sleep(0.1)
            async with http.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                await page.call("Runtime.enable")
                yield page
        draining.cancel()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
