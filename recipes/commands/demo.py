"""`mm demo`: search emoji with the weights that ship here, in the browser or into a folder."""

from __future__ import annotations

import asyncio
import contextlib
import webbrowser
from dataclasses import dataclass
from pathlib import Path

from ..common.command import Port
from ..demo.library import Library


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Search emoji by words or by a picture, in the browser or into a folder.

    Args:
        once: write sample queries to this folder, as index.html and results.json, and end.
        port: port on 127.0.0.1; 0 is a free one.
        no_browser: do not open a browser.
        model: another CLIP than the one that ships here.
    """

    once: str | None = None
    port: Port = 0
    no_browser: bool = False
    model: str | None = None

    def run(self) -> None:
        library = Library.open(self.model)
        if self.once:
            from ..demo.once import write_samples

            print(f"wrote {write_samples(library, Path(self.once).expanduser())}")
            return
        from ..demo.server import serve

        def ready(address: str) -> None:
            print(f"{len(library.index)} pictures at {address} (Ctrl-C ends it)", flush=True)
            if not self.no_browser:
                webbrowser.open(address)

        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(library, self.port, ready))
