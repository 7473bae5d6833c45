"""`mm dialogues OUT`: the spoken dialogues on which the shipped duplex model is trained, made from free voices."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .search.arguments import positive
from .search.progress import Bar

if TYPE_CHECKING:
    from .data.talkers import Line
    from .data.voices import Sources

UTTERANCES = "utterances"


def dialogues(argv: list[str]) -> int:
    from .data.talkers import lines
    from .data.voices import GET_KOKORO, GET_RHYME, Sources

    parser = argparse.ArgumentParser(prog="mm dialogues", description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that is written; a run that was stopped goes "
                        "on where it was")
    parser.add_argument("--kokoro", type=Path, metavar="DIR", help=f"Kokoro's voices: package after {GET_KOKORO}")
    parser.add_argument("--rhyme", type=Path, metavar="DIR", help="clips of the Modified Rhyme Test: "
                        f"mcvqoe/intelligibility/audio_clips after {GET_RHYME}")
    parser.add_argument("--sentences", type=positive, metavar="N", help="the most that one talker says (default: the "
                        "voices that train 106, the others 43, people 50)")
    parser.add_argument("--jobs", type=positive, default=1, help="processes that synthesise (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    utter(args.out / UTTERANCES, Sources(args.kokoro, args.rhyme), lines(args.seed, args.sentences), args.jobs)
    return 0


def utter(folder: Path, sources: Sources, script: list[Line], jobs: int) -> None:
    """The sentences as sound, those that are not there yet."""
    from .data.voices import keep_all, missing

    wanted = missing(folder, script)
    sources.check(wanted)
    with Bar("saying", len(wanted)) as bar:
        for _ in keep_all(folder, wanted, sources, jobs):
            bar.step()
    print(f"{folder}: {len(script)} sentences, {len(wanted)} of them new", flush=True)
