"""The web server of `mm talk`: the page, the websocket, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

import mm
from mm.errors import InputError

from . import protocol
from .engine import Engine
from .hall import Full, Hall
from .limits import Limits
from .metrics import Metrics, memory
from .partner import Partner
from .session import FAILED, LEAVING, REFUSED, Over, Session
from .wishes import Wishes

PAGE = Path(__file__).with_name("page.html")
HEARTBEAT = 15.0  # seconds between the websocket's own pings: who does not answer is gone
HARD = 1 << 20  # bytes of a message that are read at all
BUILD = ("build_timestamp", "build_date", "git_branch", "git_timestamp", "git_date", "git_hash", "git_describe",
         "rustc_host_triple", "rustc_version", "cargo_target_triple")  # what Kyutai's page wants to be told
log = logging.getLogger("mm.talk")


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server listens. origins: pages elsewhere that may connect, besides the server's own; token: what a
    client must know; static: a folder to serve in place of the page."""

    host: str = "127.0.0.1"
    port: int = 0
    tls: ssl.SSLContext | None = None
    token: str | None = None
    origins: tuple[str, ...] = ()
    static: Path | None = None


@dataclass
class Server:
    """GET / the page, /api/chat the conversation, /health, /metrics. `close` ends all conversations."""

    partner: Partner
    capacity: int
    address: Address = Address()
    limits: Limits = Limits()
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.engine = Engine(self.partner, self.capacity, self.metrics)
        self.hall = Hall(self.capacity, self.limits.queue)
        self.pool = ThreadPoolExecutor(1, "mm-talk-sound")
        self.sessions: set[Session] = set()
        self.closing, self.count = False, 0

    def app(self) -> web.Application:
        app = web.Application(middlewares=[errors_as_sentences])
        app.router.add_get("/api/chat", self.chat)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.exposition)
        app.router.add_get("/", self.page)
        if self.address.static is not None:
            app.router.add_static("/", self.address.static)
        app.on_startup.append(self.start)
        app.on_shutdown.append(self.close)
        return app

    async def start(self, _: web.Application) -> None:
        self.engine.start()

    async def close(self, _: web.Application) -> None:
        self.closing = True
        for session in self.sessions:
            session.end(Over("the server is being stopped", LEAVING))
        for _ in range(40):
            if self.sessions:
                await asyncio.sleep(0.05)
        await asyncio.to_thread(self.engine.stop)
        self.pool.shutdown()

    # ------------------------------------------------------------------------------------- requests
    async def page(self, _: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGE if self.address.static is None else self.address.static / "index.html")

    async def health(self, _: web.Request) -> web.Response:
        well = self.engine.is_alive() and not self.closing
        about = {"status": "ok" if well else "stopping" if self.closing else "the engine has stopped",
                 "model": self.partner.name, "version": mm.__version__, **self.gauges()}
        return web.json_response(about, status=200 if well else 503)

    async def exposition(self, request: web.Request) -> web.Response:
        self.check_token(request)
        text = self.metrics.text(self.gauges() | {"memory_bytes": memory()})
        return web.Response(text=text, content_type="text/plain", charset="utf-8")

    def gauges(self) -> dict[str, float]:
        return {"live": self.hall.live, "waiting": len(self.hall.line), "capacity": self.capacity}

    async def chat(self, request: web.Request) -> web.WebSocketResponse:
        self.check_token(request)
        self.check_origin(request)
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT, max_msg_size=HARD, compress=False)
        await socket.prepare(request)
        self.count += 1
        number, began = self.count, time.monotonic()
        log.info("client %d came from %s", number, request.remote)
        sentence, code = await self.converse(socket, request)
        if sentence and not socket.closed:
            await farewell(socket, sentence, code)
        log.info("client %d left after %.1f s%s", number, time.monotonic() - began, sentence and f": {sentence}")
        return socket

    async def converse(self, socket: web.WebSocketResponse, request: web.Request) -> tuple[str, int]:
        """Why it ended, in words and as a websocket's code; no words where the client left."""
        session = None
        try:
            if self.closing:
                raise Over("the server is being stopped", LEAVING)
            wishes = Wishes.of(request.query, self.partner.wishes)
            session = Session(socket, wishes, self.engine, self.hall, self.limits, self.pool, self.about())
            self.sessions.add(session)
            await session.run()
        except InputError as error:
            self.metrics.add("refused" if isinstance(error, Full) else "complaints")
            return str(error), REFUSED
        except Over as over:
            return str(over), over.code
        except Exception:
            log.exception("a conversation failed")
            return "the server failed; its log shows where", FAILED
        finally:
            self.sessions.discard(session)
        return "", 0

    def about(self) -> dict[str, Any]:
        """lag: frames from a frame heard to the first that can answer it."""
        p = self.partner
        return {"lm_model_file": p.name, "mimi_model_file": p.name, "instance_name": f"mm {mm.__version__}",
                "build_info": dict.fromkeys(BUILD, ""), "sample_rate": p.rate, "frame": p.frame,
                "lag": p.model.spec.lag, "capacity": self.capacity}

    # ------------------------------------------------------------------------------------- who may
    def check_token(self, request: web.Request) -> None:
        """As `token`, as the `worker_auth_id` of Kyutai's page, or as a bearer."""
        wanted = self.address.token
        if wanted is None:
            return
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = (request.query.get("token"), request.query.get("worker_auth_id"), bearer)
        if not any(one and same(one, wanted) for one in given):
            self.metrics.add("refused")
            raise web.HTTPUnauthorized(reason="this server wants a token: add ?token=... to the address")

    def check_origin(self, request: web.Request) -> None:
        """A browser says which page connects: not any page that a person happens to read may."""
        origin = request.headers.get("Origin")
        if origin is None or origin in self.address.origins or origin.partition("://")[2] == request.host:
            return
        self.metrics.add("refused")
        raise web.HTTPForbidden(reason=f"pages of {origin!r} may not connect; --origin allows them")


def same(given: str, wanted: str) -> bool:
    """In a time that tells nothing of either, whatever bytes a client sent."""
    return hmac.compare_digest(*(one.encode(errors="surrogatepass") for one in (given, wanted)))


async def farewell(socket: web.WebSocketResponse, sentence: str, code: int) -> None:
    """The sentence as a message and as the reason of the end, to a client that may be gone."""
    try:
        async with asyncio.timeout(2):
            await socket.send_bytes(protocol.error(sentence))
            await socket.close(code=code, message=sentence.encode()[:120].decode(errors="ignore").encode())
    except (ConnectionError, TimeoutError):
        pass


@web.middleware
async def errors_as_sentences(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    """What is refused before a websocket exists is {"error": one sentence}."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return web.json_response({"error": error.reason}, status=error.status)


def shown(host: str) -> str:
    """A host that was listened on, as it stands in an address."""
    if host in ("127.0.0.1", "0.0.0.0", "::", "::1"):
        return "localhost"
    return f"[{host}]" if ":" in host else host


async def serve(server: Server, ready: Callable[[str], None]) -> None:
    """Until cancelled; `ready` gets the page's address. Raises InputError when the port cannot be had."""
    address = server.address
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=3)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, address.host, address.port, ssl_context=address.tls).start()
        except OSError as error:
            raise InputError(f"--host {address.host} --port {address.port}: {error.strerror}") from None
        ready(f"{'https' if address.tls else 'http'}://{shown(address.host)}:{runner.addresses[0][1]}/")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
