"""The demo's web page and what it asks: a small server for one person, on this machine only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from mm.errors import InputError

from .library import LICENCES, SAMPLES, Answer, Library

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("page.html")
UPLOAD = 8 << 20  # bytes of a dropped picture
TOP, MOST = 30, 200  # results


class Server:
    """GET / the page; GET /about; GET /search?text=&top=; POST /search with the bytes of a picture; /pictures/..."""

    def __init__(self, library: Library) -> None:
        self.library, self.turn = library, asyncio.Lock()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=UPLOAD, middlewares=[errors_as_sentences])
        app.router.add_get("/", self.page)
        app.router.add_get("/about", self.about)
        app.router.add_get("/search", self.by_text)
        app.router.add_post("/search", self.by_picture)
        app.router.add_static("/pictures", self.library.folder)
        return app

    async def page(self, _: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGE)

    async def about(self, _: web.Request) -> web.Response:
        pictures = await asyncio.to_thread(len, self.library.index)
        return web.json_response({"pictures": pictures, "samples": SAMPLES, "licences": LICENCES, "upload": UPLOAD})

    async def by_text(self, request: web.Request) -> web.Response:
        text, top = request.query.get("text", ""), _top(request)
        return await self.answer(lambda: self.library.by_text(text, top))

    async def by_picture(self, request: web.Request) -> web.Response:
        data, top = await request.read(), _top(request)
        return await self.answer(lambda: self.library.by_picture(data, top))

    async def answer(self, ask: Callable[[], Answer]) -> web.Response:
        async with self.turn:  # one query at a time has all cores
            return web.json_response(asdict(await asyncio.to_thread(ask)))


@web.middleware
async def errors_as_sentences(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    """What goes wrong reaches the page as {"error": one sentence}."""
    try:
        return await handler(request)
    except InputError as error:
        return _complain(400, str(error))
    except web.HTTPRequestEntityTooLarge:
        return _complain(413, f"the picture is larger than {UPLOAD >> 20} MB")
    except web.HTTPException as error:
        return _complain(error.status, f"{request.method} {request.path}: {error.reason}")
    except Exception as error:
        logging.getLogger(__name__).exception("%s %s", request.method, request.path)
        return _complain(500, f"the demo failed with {type(error).__name__}; its terminal shows where")


def _complain(status: int, sentence: str) -> web.Response:
    return web.json_response({"error": sentence}, status=status)


def _top(request: web.Request) -> int:
    text = request.query.get("top", str(TOP))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST:
        raise InputError(f"top should be a whole number from 1 to {MOST}, not {text!r}")
    return int(text)


async def serve(library: Library, port: int, ready: Callable[[str], None]) -> None:
    """Serves until cancelled; `ready` gets the address. Port 0 takes a free one. Raises InputError if it is taken."""
    runner = web.AppRunner(Server(library).app(), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, HOST, port).start()
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}") from None
        ready(f"http://{HOST}:{runner.addresses[0][1]}/")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
