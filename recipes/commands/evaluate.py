"""`mm eval`: zero-shot accuracy on a folder of classes, recall on pictures with captions, and EmojiCross."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from jsonargparse.typing import PositiveInt

from ..common.command import argument


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a CLIP: zero-shot accuracy on a folder of classes, recall on pictures with captions, or EmojiCross.

    Args:
        model: a shipped model, a directory or a hub name.
        data: a folder of classes, pairs as for mm train clip, or emojicross.
        templates: for classes, a named set of prompts, or one with {}.
        batch: pictures per forward pass.
        json: print JSON.
        device: where the model runs, such as cpu or cuda:0; none is a GPU if there is one.
    """

    model: str = argument()
    data: str = argument()
    templates: str = "photo"
    batch: PositiveInt = 64
    json: bool = False
    device: str | None = None

    def run(self) -> None:
        from ..clip.evaluation import Meter, flat, open_source
        from ..search.classify import choose_templates
        from ..search.embed import Embedder

        templates = choose_templates(self.templates)
        source = open_source(self.data, templates)
        meter = Meter(clip=Embedder.load(self.model, self.device).clip, templates=templates, batch=self.batch)
        values = meter(source)
        if self.json:
            report = {"model": self.model, "data": self.data, **values, "skipped": len(meter.skipped)}
            print(json.dumps(report, indent=2))
        else:
            print("\n".join(f"{name:<12}{value:7.2f} %" for name, value in flat(values)))
        for sentence in meter.skipped.values():
            print(f"skipped {sentence}", file=sys.stderr)
