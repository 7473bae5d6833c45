"""`mm bench codec-quality`: what a codec does to speech that it was not trained on, beside Opus at its lowest rate.

DIR holds sounds and, if words are to be counted, what was said: LJ Speech's metadata.csv and wavs/, or transcripts.tsv
with the columns file and text and, if there are several, speaker, which are told apart. Of the same clips: SI-SDR in
dB, STOI and PESQ (wide band) at 16 kHz, the distance of log-mel spectrograms, the words that Whisper gets wrong in the
original and in the decoded sound, and how many of the codebooks' entries occur."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from mm.errors import InputError

from ...encoders.audio.spectrogram import RATE, read_sound
from ...encoders.audio.transcribe import transcribe
from ..codec.data import below
from ..codec.evaluation import si_sdr, used
from ..codec.loss import MelDistance
from ..commands.transcribe import load
from ..common.command import argument
from ..common.metrics import word_error_rate
from ..common.progress import Bar
from .report import Bench, Case, report

if TYPE_CHECKING:
    from ...codecs.mimi import Mimi

PACKAGES = ("torch", "soundfile", "pystoi", "pesq")
TABLE = "transcripts.tsv"
UNITS = {"SI-SDR": "dB", "STOI": "", "PESQ": "", "mel distance": "", "word errors": "%"}


@dataclass(frozen=True, kw_only=True)
class CodecQuality(Bench):
    """What a codec does to speech that it was not trained on, beside Opus at its lowest rate.

    Args:
        folders: folders of sounds.
        model: a Mimi directory, hub name or file, or codec_small, which ships with this package (default).
        codebooks: the first so many.
        speakers: only these.
        clips: of each speaker, spread evenly.
        whisper: what hears words.
        threads: CPU threads.
    """

    folders: list[Path] = argument(many=True)
    model: str = "codec_small"
    codebooks: PositiveInt | None = None
    speakers: tuple[str, ...] = ()
    clips: PositiveInt = 40
    whisper: str | None = None
    threads: PositiveInt = 1

    def run(self) -> int:
        return codec_quality(self)


def codec_quality(args: CodecQuality) -> int:
    torch.set_num_threads(args.threads)
    return report("codec-quality", measure(args), packages=PACKAGES, json_file=args.json)


@dataclass(frozen=True)
class Clip:
    path: Path
    text: str | None
    speaker: str


def measure(args: CodecQuality) -> list[Case]:
    from ...codecs.mimi import Mimi

    needed()
    model = Mimi.from_pretrained(args.model, dtype=torch.float32)
    count = args.codebooks or model.spec.quantizer.codebooks
    clips = [clip for folder in args.folders for clip in chosen(folder, args.speakers, args.clips)]
    judge = Judge(model.spec.rate, args.whisper if any(clip.text for clip in clips) else None)
    codes: list[Tensor] = []
    cases = [case for speaker in dict.fromkeys(clip.speaker for clip in clips)
             for case in of_speaker(model, count, [clip for clip in clips if clip.speaker == speaker], judge, codes)]
    every = torch.cat(codes, 1)
    return [*cases, Case(case="entries of the codebooks that occur", ours=used(every, model.spec.quantizer.size),
                         unit="%"),
            Case(case="perplexity of a codebook, mean", ours=perplexity(every, model.spec.quantizer.size), unit="")]


def needed() -> None:
    """Raises InputError without the packages that measure."""
    try:
        import pesq  # noqa: F401
        import pystoi  # noqa: F401
    except ImportError as error:
        raise InputError(f"this needs the package {error.name}: pip install 'mm-torch[quality]'") from None


def chosen(folder: Path, speakers: Sequence[str] | None, most: int) -> list[Clip]:
    """Clips of a folder. Raises InputError where there are none."""
    groups: dict[str, list[Clip]] = {}
    for clip in listed(folder):
        if not speakers or clip.speaker in speakers:
            groups.setdefault(clip.speaker, []).append(clip)
    if not groups:
        raise InputError(f"{folder} holds no sounds" + (f" of {', '.join(speakers)}" if speakers else ""))
    return [clips[i * len(clips) // min(most, len(clips))]
            for clips in groups.values() for i in range(min(most, len(clips)))]


def listed(folder: Path) -> Iterator[Clip]:
    sounds = {path.name: path for path in below(folder)}
    table, ljspeech = folder / TABLE, folder / "metadata.csv"
    if table.is_file():
        with open(table, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                if row.get("file") in sounds and row.get("text"):
                    yield Clip(sounds[row["file"]], row["text"], row.get("speaker") or folder.name)
    elif ljspeech.is_file():
        with open(ljspeech, encoding="utf-8", newline="") as file:
            texts = {row[0]: row[-1] for row in csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE)}
        yield from (Clip(path, texts[path.stem], folder.name) for path in sounds.values() if path.stem in texts)
    else:
        yield from (Clip(path, None, folder.name) for path in sounds.values())


def of_speaker(model: Mimi, count: int, clips: list[Clip], judge: Judge, codes: list[Tensor]) -> list[Case]:
    """The figures of one speaker's clips, ours beside Opus; the codes are added to `codes`."""
    rate, speaker = model.spec.rate, clips[0].speaker
    original, ours, theirs, sizes = [], [], [], []
    with Bar(f"{speaker}: coding", len(clips)) as bar:
        for clip in clips:
            wave = read_sound(clip.path, rate)
            found = model.encode(wave[None, None], codebooks=count)
            codes.append(found[0])
            original.append(wave)
            ours.append(model.decode(found)[0, 0, : len(wave)])
            packed = opus(wave, rate)
            theirs.append(packed and packed[0])
            sizes.append(packed and packed[1])
            bar.step()
    texts = [clip.text for clip in clips] if all(clip.text for clip in clips) else None
    mine = judge(ours, original, texts)
    other = judge(theirs, original, texts) if all(sizes) else {}
    seconds = sum(len(wave) for wave in original) / rate
    name = f"{speaker}, {len(clips)} clips"
    bits = count * (model.spec.quantizer.size - 1).bit_length() * model.spec.frame_rate / 1000
    cases = [Case(case=f"{name}: rate", ours=bits, unit="kbit/s",
                  peer=sum(sizes) * 8 / seconds / 1000 if all(sizes) else None)]
    cases += [Case(case=f"{name}: {what}", ours=value, peer=other.get(what), unit=UNITS[what])
              for what, value in mine.items()]
    if texts:
        cases.append(Case(case=f"{name}: word errors in the original", unit="%",
                          ours=judge.errors([at16k(wave, rate) for wave in original], texts)))
    return cases


class Judge:
    """Figures of decoded sounds (L,) beside their originals at `rate` Hz."""

    def __init__(self, rate: int, whisper: str | None) -> None:
        self.rate, self.distance, self.whisper = rate, MelDistance(rate), whisper
        self.loaded = None

    def __call__(self, decoded: list[Tensor], original: list[Tensor], texts: list[str] | None) -> dict[str, float]:
        pairs = list(zip(decoded, original, strict=True))
        small = [(at16k(x, self.rate), at16k(y, self.rate)) for x, y in pairs]
        found = {"SI-SDR": mean(float(si_sdr(x, y)) for x, y in pairs),
                 "STOI": mean(stoi(x, y) for x, y in small),
                 "PESQ": mean(pesq(x, y) for x, y in small),
                 "mel distance": mean(float(self.distance(x[None, None], y[None, None])) for x, y in pairs)}
        return found | ({"word errors": self.errors([x for x, _ in small], texts)} if texts else {})

    def errors(self, waves: list[Tensor], texts: list[str]) -> float:
        """Percent of words that Whisper gets wrong; waves at 16 kHz."""
        self.loaded = self.loaded or load(self.whisper, "cpu")
        return word_error_rate([one.text for one in transcribe(self.loaded, waves)], texts)


def at16k(wave: Tensor, rate: int) -> Tensor:
    from torchaudio.functional import resample

    return resample(wave, rate, RATE)


def stoi(x: Tensor, y: Tensor) -> float:
    from pystoi import stoi

    return float(stoi(y.numpy(), x.numpy(), RATE))


def pesq(x: Tensor, y: Tensor) -> float:
    from pesq import pesq

    return float(pesq(RATE, y.numpy(), x.numpy(), "wb"))


def opus(wave: Tensor, rate: int) -> tuple[Tensor, int] | None:
    """(decoded samples, bytes) of Opus at 6 kbit/s, as low as it goes, the container included; None where libsndfile
    does not know it. The rate is one of Opus's own: 8, 12, 16, 24 or 48 kHz."""
    import soundfile

    if "OPUS" not in soundfile.available_subtypes("OGG"):
        return None
    file = io.BytesIO()
    soundfile.write(file, wave.numpy(), rate, format="OGG", subtype="OPUS", compression_level=1.0)
    size = file.tell()
    file.seek(0)
    out = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
    return torch.nn.functional.pad(out, (0, max(0, len(wave) - len(out))))[: len(wave)], size


def perplexity(codes: Tensor, size: int) -> float:
    """codes (Q, T) -> the exponent of the entropy of the codes, the mean over codebooks."""
    shares = [torch.bincount(row, minlength=size) / len(row) for row in codes]
    return mean(float(torch.special.entr(share).sum().exp()) for share in shares)


