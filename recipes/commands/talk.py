"""`mm talk`: speak with a duplex model on a local web page, or let it answer a sound file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import ssl
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from mm.errors import InputError

from ..common.command import Port

if TYPE_CHECKING:
    from ..talk.limits import Limits
    from ..talk.partner import Partner
    from ..talk.server import Address

MODEL = "duplex_small"
PORT = 8998  # where Kyutai's clients look
TOKEN = "MM_TALK_TOKEN"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The server.

    Args:
        host: the address to listen on; the default is this machine only.
        port: 8998 is where Kyutai's clients look; 0 is a free one.
        no_browser: do not open a browser.
        sessions: conversations at once; none is as many as a step is fast enough for, at most 64.
        queue: clients that may wait for a place.
        minutes: the longest conversation.
        token: a secret that clients must send as ?token= in the address; none takes that of $MM_TALK_TOKEN, if any.
        origin: a page elsewhere that may connect; may stand several times.
        cert: serve https with this certificate, a PEM file.
        key: the certificate's key, a PEM file.
        static: the folder of another page than ours, such as Kyutai's.
    """

    host: str = "127.0.0.1"
    port: Port = PORT
    no_browser: bool = False
    sessions: PositiveInt | None = None
    queue: PositiveInt = 32
    minutes: PositiveFloat = 15.0
    token: str | None = None
    origin: tuple[str, ...] = ()
    cert: Path | None = None
    key: Path | None = None
    static: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Talk(Serving):
    """Speak with a duplex model on a local web page, or let it answer a sound file.

    Args:
        model: a directory that `mm train duplex` wrote, a hub name such as kyutai/moshiko-pytorch-bf16, a file, or the
            model that ships here.
        codec: another Mimi than the model's own.
        condition: NAME=WORD for a model with conditions, such as description=very_good; may stand several times.
        sinks: first frames of a conversation that stay in sight when it is longer than the model's context.
        device: where the model runs, such as cpu or cuda:0; none is a GPU if there is one.
        threads: of the model on a CPU; none is all cores but one, at most 4.
        file: answer this sound file and end, without a server.
        to: the sound file of the answer; its suffix is the format.
        after: seconds of silence that follow the file.
        seed: of the answer to a file.
    """

    model: str = MODEL
    codec: str | None = None
    condition: tuple[str, ...] = ()
    sinks: NonNegativeInt = 0
    device: str | None = None
    threads: PositiveInt | None = None
    file: Path | None = None
    to: Path | None = None
    after: PositiveFloat = 4.0
    seed: int = 0

    def run(self) -> None:
        if (self.file is None) != (self.to is None):
            raise InputError("--file and --to go together: the sound that is asked, and where the answer is written")
        import torch

        torch.set_num_threads(self.threads or max(1, min(4, (os.cpu_count() or 1) - 1)))
        if self.file is not None:
            from ..talk.file import answer

            partner = opened(self)
            partner.arrange(1)
            answer(partner, self.file, self.to, after=self.after, seed=self.seed)
            return
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("mm.talk").setLevel(logging.INFO)
        address, most = address_of(self), limits_of(self)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run(opened(self), address, most, self))


def opened(args: Talk) -> Partner:
    from ..talk.partner import Partner

    return Partner.open(args.model, args.codec, args.device, dict(map(condition, args.condition)), args.sinks)


async def run(partner, address: Address, limits: Limits, args: Talk) -> None:
    """Until SIGINT or SIGTERM, on which conversations are told and end."""
    from ..talk.capacity import capacity
    from ..talk.server import Server, serve

    places = args.sessions or capacity(partner)
    partner.arrange(places)

    def ready(url: str) -> None:
        shown = url + (f"?token={quote(address.token)}" if address.token else "")
        print(f"{partner.name} for {places} at once: {shown} (Ctrl-C ends it)", flush=True)
        if not args.no_browser:
            webbrowser.open(shown)
    task = asyncio.current_task()
    with contextlib.suppress(NotImplementedError):  # where a system has no signals
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serve(Server(partner, places, address, limits), ready)


def limits_of(args: Talk) -> Limits:
    from ..talk.limits import Limits

    return Limits(session=60 * args.minutes, queue=args.queue)


def address_of(args: Talk) -> Address:
    """Raises InputError for certificates that cannot be read, and a folder without a page."""
    from ..talk.server import Address

    if (args.cert is None) != (args.key is None):
        raise InputError("--cert and --key go together")
    tls = None
    if args.cert is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(args.cert, args.key)
        except (ssl.SSLError, OSError) as error:
            raise InputError(f"--cert {args.cert} --key {args.key}: no certificate and its key ({error})") from None
    if args.static is not None and not (args.static / "index.html").is_file():
        raise InputError(f"--static {args.static}: there is no index.html")
    return Address(host=args.host, port=args.port, tls=tls, token=args.token or os.environ.get(TOKEN),
                   origins=tuple(args.origin), static=args.static)


def condition(text: str) -> tuple[str, str]:
    """The name and the word of NAME=WORD. Raises InputError."""
    name, equals, word = text.partition("=")
    if not (name and equals and word):
        raise InputError(f"--condition: expected NAME=WORD, got {text!r}")
    return name, word
