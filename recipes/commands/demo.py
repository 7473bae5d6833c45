"""`mm demo`: search emoji with the weights that ship here, in the browser or into a folder."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import webbrowser
from pathlib import Path

from ..demo.library import Library


def demo(argv: list[str]) -> int:
    args = _arguments().parse_args(argv)
    library = Library.open(args.model)
    if args.once:
        from ..demo.once import write_samples

        print(f"wrote {write_samples(library, Path(args.once).expanduser())}")
        return 0
    from ..demo.server import serve

    def ready(address: str) -> None:
        print(f"{len(library.index)} pictures at {address} (Ctrl-C ends it)", flush=True)
        if args.browser:
            webbrowser.open(address)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(library, args.port, ready))
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mm demo", description="Search emoji by words or by a picture.")
    parser.add_argument("--once", metavar="OUT", help="write sample queries to OUT/index.html and OUT/results.json")
    parser.add_argument("--port", type=_port, default=0, help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="do not open a browser")
    parser.add_argument("--model", metavar="DIR", help="another CLIP checkpoint than the one that ships here")
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)
