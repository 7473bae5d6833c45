"""Evaluation of a duplex model: how well it foresees held-out conversations, and how it holds a dialogue: whether its
answers are right, how soon they begin, and when it is silent.

An answer is the speech between the end of a question and the beginning of the next one. Silence is due at all other
times, but for `GRACE` after the end of the recorded answer. Sound that stays loud for a while is taken for speech.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.checkpoint.files import read_json
from mm.decode.requests import TextStream as Words
from mm.spec import TextStream
from mm.speech.duplex import DuplexLM
from mm.tokenizer.tokenizer import Tokenizer

from ...codecs.mimi import Mimi
from ...encoders.audio.spectrogram import RATE
from ...encoders.audio.transcribe import Settings, transcribe
from ...encoders.audio.whisper import Whisper
from ..data.dialogues import read_manifest
from ..talk.partner import Partner
from ..talk.replies import Manner, Reply, replies
from ..train.watch import Measure
from .data import DuplexModule, Fixed
from .loss import losses_of
from .questions import RIGHT, Recording, Turn, correct, recording
from .settings import DuplexJob, DuplexLoss

WINDOW = 0.02  # seconds
LOUD = -45.0  # dB of full scale, of a window
BRIDGED, SHORTEST = 0.3, 0.1  # seconds: shorter pauses belong to speech, shorter sounds are none
AROUND = 0.25  # seconds that are heard before and after speech: its first and last sounds may be faint
EARLY = 0.5  # seconds before the end of a question, from which on an answer may begin
GRACE = 1.0  # seconds
SOON = 1.0  # seconds, after which an answer should have begun
SHORT = Settings(temperatures=(0.0,), carry=False)  # how answers are heard: greedily, each on its own

Spans = list[tuple[float, float]]  # from when to when, in seconds, in order and apart


@dataclass
class Answer:
    """delay: seconds from the end of the question to the first sound, infinite where none begins. clip: what is said,
    at 16 kHz. written: the model's own text. heard: what a recogniser makes of the clip, once it was asked."""

    turn: Turn
    delay: float
    clip: Tensor | None
    written: str
    heard: str = ""

    @property
    def right(self) -> bool:
        return correct(self.turn.kind, self.turn.expect, self.heard)

    @property
    def written_right(self) -> bool:
        return correct(self.turn.kind, self.turn.expect, self.written)


@dataclass(frozen=True)
class Dialogue:
    """A dialogue as it was held. Seconds: in which questions were asked, in which the model spoke meanwhile, in which
    silence was due, in which it was broken; and how often the model began to speak there."""

    answers: list[Answer]
    asked: float
    both: float
    due: float
    broken: float
    starts: int


def observe(reply: Reply, turns: Sequence[Turn], rate: int, seconds: float, text: TextStream,
            tokenizer: Tokenizer | None) -> Dialogue:
    """A reply at `rate` Hz, of frames of so many seconds, to these questions."""
    speech = spoken(reply.wave, rate)
    asking = joined((turn.start, turn.end) for turn in turns)
    silence = between(joined((turn.end, turn.answered + GRACE) for turn in turns), len(reply.wave) / rate)
    answers = []
    for turn in turns:
        began, clip = heard_in(reply.wave, rate, speech, turn)
        first = int(min(turn.end, began) / seconds)
        tokens = reply.tokens[first : None if turn.until == math.inf else int(turn.until / seconds)]
        answers.append(Answer(turn, began - turn.end, clip, written(tokens, text, tokenizer)))
    return Dialogue(answers, total(asking), total(shared(speech, asking)), total(silence),
                    total(shared(speech, silence)), sum(any(a <= start < b for a, b in silence) for start, _ in speech))


def observed(partner: Partner, recordings: Iterable[Recording], said: Iterable[Reply]) -> Iterator[Dialogue]:
    """What was said to the people of recordings, one after the other."""
    model = partner.model
    for one, reply in zip(recordings, said, strict=True):
        yield observe(reply, one.turns, partner.rate, partner.seconds, model.spec.text, model.tokenizer)


def heard_in(wave: Tensor, rate: int, speech: Spans, turn: Turn) -> tuple[float, Tensor | None]:
    """When an answer begins, infinity where none does, and what is said until the next question at 16 kHz, None where
    nothing is. What the model was saying all along is no beginning."""
    began = min((start for start, _ in speech if turn.end - EARLY <= start < turn.until), default=math.inf)
    mine = [(max(start, min(began, turn.end)), min(end, turn.until)) for start, end in speech
            if end > turn.end and start < turn.until]
    if not mine:
        return math.inf, None
    from torchaudio.functional import resample

    first, last = (round(at * rate) for at in (max(mine[0][0] - AROUND, 0.0), min(mine[-1][1] + AROUND, turn.until)))
    return began, resample(wave[first:last], rate, RATE)


def written(tokens: Sequence[int], text: TextStream, tokenizer: Tokenizer | None) -> str:
    words = Words(tokenizer)
    for token in tokens:
        if token not in (text.padding, text.word_end):
            words.push(token)
    words.flush()
    return words.text.strip()


def hear(whisper: Whisper, answers: Sequence[Answer], step: Callable[[], None] = lambda: None) -> None:
    """Fills in what a recogniser makes of answers, eight at a time; `step` is called for each."""
    loud = [answer for answer in answers if answer.clip is not None]
    for i in range(0, len(loud), 8):
        group = loud[i : i + 8]
        for answer, one in zip(group, transcribe(whisper, [answer.clip for answer in group], SHORT), strict=True):
            answer.heard = one.text.strip()
            step()


def figures(dialogues: Sequence[Dialogue]) -> dict[str, float]:
    """Shares in percent, by what they are of; delays in seconds, over all questions. Answers that were broken off count
    for delays only."""
    answers = [answer for one in dialogues for answer in one.answers]
    judged = [answer for answer in answers if not answer.turn.interrupted]
    kinds = {kind: [answer for answer in judged if answer.turn.kind == kind]
             for kind in dict.fromkeys(answer.turn.kind for answer in judged)}
    delays = [answer.delay for answer in answers]
    asked, both, due, broken = (sum(getattr(one, name) for one in dialogues)
                                for name in ("asked", "both", "due", "broken"))
    return {"right": share(answer.right for answer in judged),
            **{f"{kind} right": share(answer.right for answer in of_kind) for kind, of_kind in kinds.items()},
            "written right": share(answer.written_right for answer in judged),
            "median delay": quantile(delays, 0.5), "90th percentile of the delay": quantile(delays, 0.9),
            f"within {SOON:g} s": share(delay <= SOON for delay in delays),
            "overlap": percent(both, asked), "silence kept": 100 - percent(broken, due),
            "false starts a minute": 60 * sum(one.starts for one in dialogues) / max(due, 1e-9)}


# ----------------------------------------------------------------------------------------- spans of time
def spoken(wave: Tensor, rate: int) -> Spans:
    """wave (L,) -> where it holds speech."""
    size = round(WINDOW * rate)
    power = F.pad(wave, (0, -len(wave) % size)).view(-1, size).square().mean(1)
    loud = F.pad((10 * power.clamp(min=1e-12).log10() > LOUD).int(), (1, 1)).diff()
    found: list[list[int]] = []
    for start, end in zip(*(torch.nonzero(loud == step).flatten().tolist() for step in (1, -1)), strict=True):
        if found and (start - found[-1][1]) * WINDOW < BRIDGED:
            found[-1][1] = end
        else:
            found.append([start, end])
    return [(start * WINDOW, end * WINDOW) for start, end in found if (end - start) * WINDOW >= SHORTEST]


def joined(spans: Iterable[tuple[float, float]]) -> Spans:
    """Spans that may overlap as such that do not."""
    out: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def between(spans: Spans, length: float) -> Spans:
    """What lies outside of spans, from 0 to `length`."""
    edges = [0.0, *(at for span in spans for at in span), length]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [(start, min(end, length)) for start, end in pairs if start < min(end, length)]


def shared(a: Spans, b: Spans) -> Spans:
    pairs = ((max(x, u), min(y, v)) for x, y in a for u, v in b)
    return [(start, end) for start, end in pairs if start < end]


def total(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def share(of: Iterable[bool]) -> float:
    held = list(of)
    return percent(sum(held), len(held))


def percent(part: float, whole: float) -> float:
    """0 of nothing."""
    return 100 * part / whole if whole else 0.0


def quantile(values: Sequence[float], q: float) -> float:
    """The nearest rank: infinite values stay apart from the others. Infinite of nothing."""
    return float(np.quantile(values, q, method="inverted_cdf")) if values else math.inf


SPOKEN = 16  # dialogues that are held in every evaluation
TOLD = ("written right", "median delay", f"within {SOON:g} s", "overlap", "silence kept")


def exam(job: DuplexJob, data: DuplexModule) -> Measure:
    """Measures a model on what is held out, and in dialogues where some of that says what was asked in it and the codec
    is at hand."""
    batches, talks = data.evaluation(), data.codec is not None and data.spec.own and data.spec.heard
    recordings = with_questions(job, data) if talks else []

    def measure(model: DuplexLM) -> dict[str, float]:
        training = model.training
        model.eval()
        try:
            told = foreseen(batches, job.loss, model)
            return told | held(recordings, data.codec, model) if recordings else told
        finally:
            model.train(training)
    return measure


def with_questions(job: DuplexJob, data: DuplexModule) -> list[Recording]:
    """The first `SPOKEN` that are held out of those that have a sound and say what was asked in it."""
    known, found = {entry.where: entry for entry in read_manifest(job.data.val or job.data.path)}, []
    for one in data.validation.dialogues:
        entry = known[one.where]
        if len(found) < SPOKEN and entry.sound is not None and "turns" in read_json(entry.words):
            found.append(recording(entry))
    return found


def held(recordings: Sequence[Recording], codec: Mimi, model: DuplexLM) -> dict[str, float]:
    """What the model makes of the dialogues when it hears the person and goes on by itself, greedily. Answers are
    judged by what it writes: `mm bench dialogue` hears what it says."""
    partner = Partner(model, codec.to(model.text.weight.device), "the model in training")
    users = (one.voice(partner.rate, RIGHT) for one in recordings)
    told = figures(list(observed(partner, recordings, replies(partner, users, Manner(rows=SPOKEN)))))
    return {name: told[name] for name in TOLD}


@torch.inference_mode()
def foreseen(batches: Fixed, settings: DuplexLoss, model: DuplexLM) -> dict[str, float]:
    """The text's perplexity, and the share of codes foreseen, by codebook, over all evaluation batches."""
    device = model.text.weight.device
    made = [losses_of(model, batch._replace(codes=batch.codes.to(device), documents=batch.documents.to(device)),
                      settings) for batch in (batches[i] for i in range(len(batches)))]
    summed = {name: sum(getattr(one, name) for one in made) for name in made[0]._fields}
    text, audio = ((summed[name] / weight.clamp(min=1e-9)).item()
                   for name, weight in zip(("text", "audio"), summed["weight"], strict=True))
    entropy = (summed["entropy"] / summed["words"].clamp(min=1)).item()
    right = (summed["right"] / summed["said"].clamp(min=1)).tolist()
    return {"loss": text + audio, "text": text, "audio": audio, "perplexity": math.exp(min(entropy, 700.0)),
            **{f"codebook {k + 1} right": share for k, share in enumerate(right)}}
