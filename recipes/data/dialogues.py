"""Conversations as codes: read, or encoded once and kept as .mimi files, and cut into rows of packed conversations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from mm.checkpoint.files import read_json, replacing
from mm.errors import InputError
from mm.spec import Choice, Conditioning, DuplexSpec

from ...codecs.file import Header, Reader, Writer
from ...codecs.sound import open_sound
from ..common.progress import Bar
from .pool import spread
from .sampler import generator
from .words import MAIN, read_words, speakers, text_stream

if TYPE_CHECKING:
    from ...codecs.mimi import Mimi

CHUNK = 25  # frames that a codec takes at a time
ORDER, HELD_OUT = 30, 31  # the last number of the keys of random generators
NOWHERE = -1  # the document of padding


@dataclass(frozen=True)
class Entry:
    """A line of a manifest: a sound file, or two files of codes, the words, and what the model is told beside them."""

    where: str
    sound: Path | None
    own: Path | None
    heard: Path | None
    words: Path
    told: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Dialogue:
    """codes (1 + own + heard, T) int32, the text first; told: the model's conditions by name."""

    where: str
    codes: np.ndarray
    told: Mapping[str, str] = field(default_factory=dict)


def read_manifest(path: str | Path) -> list[Entry]:
    """Raises InputError that names the line."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is no text: a manifest has a JSON object a line") from None
    found = [to_entry(file, i + 1, line) for i, line in enumerate(lines) if line.strip()]
    if not found:
        raise InputError(f"{file} lists no conversation")
    return found


def to_entry(file: Path, number: int, line: str) -> Entry:
    where = f"{file}:{number}"
    try:
        given = json.loads(line)
        paths = {name: file.parent / given[name] if given.get(name) else None
                 for name in ("path", "own", "heard", "alignments")}
        told = given.get("conditions") or {}
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{where} should hold a JSON object of paths, not {line!r:.60}") from None
    if (paths["path"] is None) == (paths["own"] is None or paths["heard"] is None):
        raise InputError(f"{where} should name a path, or own and heard")
    words = paths["alignments"] or (paths["path"] and paths["path"].with_suffix(".json"))
    if words is None:
        raise InputError(f"{where} names no alignments")
    return Entry(where, paths["path"], paths["own"], paths["heard"], words, told)


def conditions(entry: Entry, known: Conditioning | None) -> dict[str, str]:
    """What the model is told in a conversation: by the manifest, or by `text_conditions` beside the alignments, as
    moshi-finetune has them. Raises InputError for what the model does not know."""
    held = (read_json(entry.words).get("text_conditions") or {}) if known else {}
    told, values = {}, {one.name: one.of.values for one in known.conditions} if known else {}
    for name, word in [*words_by_name(entry.words, held), *words_by_name(entry.where, entry.told)]:
        if name not in values:
            raise InputError(f"{entry.where}: the model has no condition {name!r}, "
                             + (f"only {', '.join(values)}" if values else "it is told nothing"))
        if values[name] and word not in values[name]:
            raise InputError(f"{entry.where}: {name} should be one of {', '.join(values[name])}, not {word!r}")
        told[name] = word
    return told


def words_by_name(where: str | Path, told: Any) -> list[tuple[str, str]]:
    if not isinstance(told, dict) or not all(isinstance(word, str) for word in told.values()):
        raise InputError(f"{where}: conditions should be words by name, not {told!r:.60}")
    return list(told.items())


def check_conditions(known: Conditioning | None) -> None:
    """Raises InputError for conditions that a conversation cannot have beside others in a row."""
    odd = [one for one in (known.conditions if known else ()) if one.into != "sum" or not isinstance(one.of, Choice)]
    if odd:
        raise InputError(f"a model with the condition {odd[0].name!r} cannot be trained on conversations: only words "
                         "that are added to every frame can be told")


# ----------------------------------------------------------------------------------------- codes
class Codes:
    """Both voices of an entry as codes, from .mimi files or, by a codec that is opened when it is needed, from a sound
    file, kept as such files in `cache`."""

    def __init__(self, cache: Path, codec: str | None, own: int, heard: int):
        self.cache, self.codec, self.sizes, self.model = cache, codec, (own, heard), None
        self.silence = torch.empty(max(own, heard), 0, dtype=torch.long)  # the codes of one, as long as was needed
        self.first: tuple[Path, Header] | None = None  # of all files that are read

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None}

    def read(self, entry: Entry) -> tuple[np.ndarray, Header]:
        """((own + heard, T), what one of the files says). Raises InputError for files that do not fit, each other or
        those that were read before."""
        paths = (entry.own, entry.heard) if entry.sound is None else self.kept(entry)
        parts = []
        for path, size in zip(paths, self.sizes, strict=True):
            reader = Reader(path)
            self.first = self.first or (path, reader.header)
            if reader.header.codebooks < size:
                raise InputError(f"{path} holds {reader.header.codebooks} codebooks, {size} are needed")
            if reader.header.weights != self.first[1].weights or reader.header.frame != self.first[1].frame:
                raise InputError(f"{self.first[0]} and {path} were encoded by different codecs")
            blocks = [block[:size] for block in reader.blocks(4096)]
            parts.append(torch.cat(blocks, 1).numpy())
        frames = min(part.shape[1] for part in parts)
        return np.concatenate([part[:, :frames] for part in parts]), self.first[1]

    def kept(self, entry: Entry) -> tuple[Path, Path]:
        paths = self.places(entry)
        if not all(path.exists() for path in paths):
            self.encode(entry, paths)
        return paths

    def places(self, entry: Entry) -> tuple[Path, Path]:
        """Where the codes of a sound file are kept."""
        stat = entry.sound.stat() if entry.sound.is_file() else None
        self.opened()
        name = hashlib.sha256(f"{entry.sound.resolve()} {stat and (stat.st_size, stat.st_mtime_ns)} {self.fingerprint} "
                              f"{self.sizes}".encode()).hexdigest()[:24]
        return self.cache / f"{name}.own.mimi", self.cache / f"{name}.heard.mimi"

    def encode(self, entry: Entry, paths: tuple[Path, Path]) -> None:
        sound, model = open_sound(entry.sound), self.model
        if sound.channels != 2:
            raise InputError(f"{entry.sound} has {sound.channels} channel, a conversation has two: left speaks, right "
                             "is heard")
        wave = torch.cat(list(sound.blocks(model.spec.rate, 2)), 1)
        codes = (encoded(model, wave, len(self.silence)) if wave.any(1).all()  # side by side they cost less
                 else [self.of(voice) for voice in wave])
        self.cache.mkdir(parents=True, exist_ok=True)
        for path, one, size in zip(paths, codes, self.sizes, strict=True):
            header = Header(model=str(self.codec), weights=self.fingerprint, rate=model.spec.rate,
                            frame=model.spec.frame, channels=1, codebooks=max(size, 1), size=model.spec.quantizer.size)
            with replacing(path) as part, open(part, "r+b") as file:
                writer = Writer(file, header)
                writer.write(one[:header.codebooks])
                writer.finish(wave.shape[1])

    def of(self, voice: torch.Tensor) -> torch.Tensor:
        """voice (L,) -> (Q, T). Silence, such as that of a model which only writes, is encoded once."""
        frames = -(-len(voice) // self.model.spec.frame)
        if voice.any():
            return encoded(self.model, voice[None], len(self.silence))[0]
        if self.silence.shape[1] < frames:
            self.silence = encoded(self.model, voice[None], len(self.silence))[0]
        return self.silence[:, :frames]

    def opened(self) -> Mimi:
        from ...codecs.mimi import Mimi

        if self.codec is None:
            raise InputError("conversations of sound files need data.codec: codec_small, a Mimi directory or hub name")
        if self.model is None:
            self.model = Mimi.from_pretrained(self.codec, dtype=torch.float32)
            self.fingerprint = self.model.fingerprint()
        return self.model


def encode_all(codes: Codes, entries: Iterable[Entry], jobs: int) -> None:
    """The sound files whose codes are not kept yet, in so many processes."""
    wanted = [one for one in entries
              if one.sound is not None and not all(path.exists() for path in codes.places(one))]
    with Bar("encoding", len(wanted)) as bar:
        for _ in spread(partial(encoder, codes, jobs > 1), wanted, min(jobs, len(wanted) or 1)):
            bar.step()


def encoder(codes: Codes, several: bool) -> Callable[[Entry], Any]:
    if several:
        torch.set_num_threads(1)
    return codes.kept


def encoded(model: Mimi, wave: torch.Tensor, codebooks: int) -> torch.Tensor:
    """wave (B, L) -> (B, Q, T), voices side by side."""
    state, frame = model.init_state(len(wave), chunk=CHUNK), model.spec.frame
    wave = torch.nn.functional.pad(wave, (0, -wave.shape[1] % frame)).unsqueeze(1)
    return torch.cat([model.encode(piece, state=state, codebooks=codebooks)
                      for piece in wave.split(CHUNK * frame, 2)], 2)


def read_dialogues(path: str | Path, codes: Codes, encode: Callable[[str], list[int]], model: DuplexSpec,
                   late: Literal["drop", "shift"] = "drop", jobs: int = 1) -> list[Dialogue]:
    """All conversations of a manifest, for this model; sound is encoded in `jobs` processes. Raises InputError."""
    made, text, entries, spoken = [], model.text, read_manifest(path), 0
    encode_all(codes, entries, jobs)
    for entry in entries:
        audio, header = codes.read(entry)
        if header.size != model.card:
            raise InputError(f"{entry.where}: its codebooks have {header.size} entries, the model's {model.card}: its "
                             "codes were made by another codec")
        words = read_words(entry.words)
        spoken += len(words)
        said = text_stream(words, audio.shape[1], header.rate / header.frame, encode, padding=text.padding,
                           word_end=text.word_end, late=late)
        if audio.shape[1]:
            made.append(Dialogue(entry.where, np.concatenate([said[None], audio]).astype(np.int32),
                                 conditions(entry, model.conditioning)))
    others = set().union(*(speakers(entry.words) for entry in entries)) if not spoken else ()
    if others:
        raise InputError(f"{path}: the model says nothing, since no word is by {MAIN}, only by "
                         + ", ".join(sorted(others)))
    return made


def held_out(dialogues: list[Dialogue], share: float) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, evaluation): always the same random ones."""
    count = min(max(round(len(dialogues) * share), 1), len(dialogues) - 1) if share and len(dialogues) > 1 else 0
    order = generator(len(dialogues), HELD_OUT).permutation(len(dialogues))
    out = set(order[:count].tolist())
    return ([one for i, one in enumerate(dialogues) if i not in out], [dialogues[i] for i in sorted(out)])


# ----------------------------------------------------------------------------------------- rows
@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of `length` frames. Every pass (epoch) lays all conversations end to end in another order, by the `seed`
    (None: as they stand); one that a row cuts goes on in the next as a conversation of its own."""

    dialogues: list[Dialogue]
    length: int
    seed: int | None

    @property
    def frames(self) -> int:
        return sum(one.codes.shape[1] for one in self.dialogues)

    def __len__(self) -> int:
        return -(-self.frames // self.length)

    def row(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """codes (1 + Q, length) and documents (length,), -1 for padding."""
        order, ends = laid(self, epoch)
        at, stop = index * self.length, min((index + 1) * self.length, int(ends[-1]))
        codes = np.zeros((len(self.dialogues[0].codes), self.length), np.int64)
        documents, start = np.full(self.length, NOWHERE, np.int64), at
        place = int(np.searchsorted(ends, at, "right"))
        while at < stop:
            one, upto = self.dialogues[order[place]].codes, min(int(ends[place]), stop)
            first = one.shape[1] - (int(ends[place]) - at)
            codes[:, at - start:upto - start] = one[:, first:first + upto - at]
            documents[at - start:upto - start] = order[place]
            at, place = upto, place + 1
        return codes, documents


@lru_cache(maxsize=4)
def laid(packed: Packed, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of the conversations in a pass, and where each ends in it."""
    count = len(packed.dialogues)
    order = np.arange(count) if packed.seed is None else generator(packed.seed, epoch, ORDER).permutation(count)
    return order, np.cumsum([packed.dialogues[i].codes.shape[1] for i in order])
