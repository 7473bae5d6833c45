"""`mm talk`: speak with a duplex model on a local web page, or let it answer a sound file."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import ssl
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from mm.errors import InputError

from ..common.options import device_option, positive

if TYPE_CHECKING:
    from ..talk.limits import Limits
    from ..talk.partner import Partner
    from ..talk.server import Address

MODEL = "duplex_small"
PORT = 8998  # where Kyutai's clients look
TOKEN = "MM_TALK_TOKEN"


def talk(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    if (args.file is None) != (args.to is None):
        raise InputError("--file and --to go together: the sound that is asked, and where the answer is written")
    import torch

    torch.set_num_threads(args.threads or max(1, min(4, (os.cpu_count() or 1) - 1)))
    if args.file is not None:
        from ..talk.file import answer

        partner = opened(args)
        partner.arrange(1)
        return answer(partner, args)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("mm.talk").setLevel(logging.INFO)
    address, most = address_of(args), limits_of(args)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(opened(args), address, most, args))
    return 0


def opened(args: argparse.Namespace) -> Partner:
    from ..talk.partner import Partner

    return Partner.open(args.model, args.codec, args.device, dict(args.condition), args.sinks)


async def run(partner, address: Address, limits: Limits, args: argparse.Namespace) -> None:
    """Until SIGINT or SIGTERM, on which conversations are told and end."""
    from ..talk.capacity import capacity
    from ..talk.server import Server, serve

    places = args.sessions or capacity(partner)
    partner.arrange(places)

    def ready(url: str) -> None:
        shown = url + (f"?token={quote(address.token)}" if address.token else "")
        print(f"{partner.name} for {places} at once: {shown} (Ctrl-C ends it)", flush=True)
        if args.browser:
            webbrowser.open(shown)
    task = asyncio.current_task()
    with contextlib.suppress(NotImplementedError):  # where a system has no signals
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serve(Server(partner, places, address, limits), ready)


def limits_of(args: argparse.Namespace) -> Limits:
    from ..talk.limits import Limits

    return Limits(session=60 * args.minutes, queue=args.queue)


def address_of(args: argparse.Namespace) -> Address:
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


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mm talk", description=__doc__)
    add = parser.add_argument
    add("--model", default=MODEL, metavar="DIR", help="a duplex model: a directory that `mm train duplex` wrote, a hub "
        f"name such as kyutai/moshiko-pytorch-bf16, or a file (default: {MODEL}, which ships with this package)")
    add("--codec", metavar="DIR", help="another Mimi than its own")
    add("--condition", type=condition, action="append", default=[], metavar="NAME=WORD",
        help="what a model with conditions is told, such as description=very_good (the default of Hibiki)")
    add("--sinks", type=positive, default=0, metavar="N", help="of a conversation longer than the model's context the "
        "first N frames stay in sight (default: none)")
    device_option(parser)
    add("--threads", type=positive, help="of the model on a CPU (default: all cores but one, at most 4)")
    add("--file", type=Path, metavar="SOUND", help="answer this sound file and end, without a server")
    add("--to", type=Path, metavar="SOUND", help="where the answer goes; the suffix says the format")
    add("--after", type=seconds, default=4.0, help="seconds of silence that follow the file (default: 4)")
    add("--seed", type=int, default=0, help="of the answer to a file (default: 0)")
    serving = parser.add_argument_group("the server").add_argument
    serving("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    serving("--port", type=port, default=PORT, help=f"default: {PORT}, where Kyutai's clients look; 0: a free one")
    serving("--no-browser", dest="browser", action="store_false", help="do not open a browser")
    serving("--sessions", type=positive, help="conversations at once (default: as many as a step is fast enough for, "
            "at most 64)")
    serving("--queue", type=positive, default=32, help="clients that may wait for a place (default: 32)")
    serving("--minutes", type=seconds, default=15.0, help="the longest conversation (default: 15)")
    serving("--token", help=f"what clients must know, as ?token= in the address (default: ${TOKEN}, or none)")
    serving("--origin", action="append", default=[], metavar="URL", help="a page elsewhere that may connect")
    serving("--cert", type=Path, metavar="PEM", help="serve https with this certificate")
    serving("--key", type=Path, metavar="PEM", help="and its key")
    serving("--static", type=Path, metavar="DIR", help="another page than ours, such as Kyutai's")
    return parser


def condition(text: str) -> tuple[str, str]:
    name, equals, word = text.partition("=")
    if not (name and equals and word):
        raise argparse.ArgumentTypeError(f"expected NAME=WORD, got {text!r}")
    return name, word


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)
