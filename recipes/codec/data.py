"""Sounds of any format as one file of 16-bit samples that is read in place, and batches of random parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm.checkpoint.files import read_json, replacing, write_json
from mm.errors import InputError

from ...codecs.sound import open_sound
from ..common.progress import Bar
from ..data.report import Account, Note
from ..data.sampler import Order, Steps, generator, readers
from .settings import SoundData

SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf"))
CUTTING = 10  # the last number of the keys of random generators
LOWEST = 3400.0  # Hz, that telephones carry
FULL = 32767


@dataclass(frozen=True)
class Store:
    """Sounds one after another at one rate, each filled up with zeros to whole frames. starts (n + 1,): where each
    begins, in frames. seconds: of sound, without the zeros."""

    path: Path
    rate: int
    frame: int
    names: tuple[str, ...]
    starts: np.ndarray
    lengths: np.ndarray  # samples
    account: Account

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def samples(self) -> np.ndarray:
        return np.memmap(self.path, np.int16, "r")

    @property
    def seconds(self) -> float:
        return float(self.lengths.sum()) / self.rate

    def read(self, start: int, count: int) -> Tensor:
        """(count,) samples from a place in the file on, zeros where it ends."""
        part = torch.from_numpy(self.samples[start : start + count].astype(np.float32)) / FULL
        return torch.nn.functional.pad(part, (0, count - len(part)))

    def sound(self, i: int) -> Tensor:
        """(L,)"""
        return self.read(int(self.starts[i]) * self.frame, int(self.lengths[i]))


def listing(folders: Sequence[str]) -> list[Path]:
    """The sound files below folders, in order. Raises InputError for a folder that is absent or holds none."""
    found: list[Path] = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"data.path: {folder} is not a folder")
        files = below(Path(folder))
        if not files:
            raise InputError(f"data.path: {folder} holds no sounds ({', '.join(sorted(SUFFIXES))})")
        found += files
    return found


def below(folder: Path) -> list[Path]:
    """The sound files in a folder and those in it, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def store(files: Sequence[Path], rate: int, frame: int, to: Path) -> Store:
    """The sounds as a file `to` with an index beside it, written unless it is there. Files that cannot be read are
    left out and told. Raises InputError when none can, and when the files are not those that were stored."""
    index = to.with_suffix(".json")
    known = [[str(path), path.stat().st_size] for path in files]
    if not index.exists():
        write(files, known, rate, frame, to)
    held = read_json(index)
    if held["files"] != known or (held["rate"], held["frame"]) != (rate, frame):
        raise InputError(f"{to} holds other sounds than those of this run: remove it, or choose another --out")
    if not held["names"]:
        raise InputError(f"none of {len(files)} sounds can be read; {held['account']['told']}")
    return Store(to, rate, frame, tuple(held["names"]), np.array(held["starts"]), np.array(held["lengths"]),
                 Account.from_data(held["account"]))


def write(files: Sequence[Path], known: list[Any], rate: int, frame: int, to: Path) -> None:
    names, lengths, starts, account = [], [], [0], Account()
    with replacing(to) as part, open(part, "wb") as file, Bar("reading sounds", len(files)) as bar:
        for path in files:
            try:
                wave = torch.cat([block[0] for block in open_sound(path).blocks(rate, 1)])
            except InputError as error:
                account.add("sounds that cannot be read", str(error))
            else:
                filled = torch.nn.functional.pad(wave, (0, -len(wave) % frame))
                file.write((filled.clamp(-1, 1) * FULL).round().short().numpy().tobytes())
                names.append(str(path))
                lengths.append(len(wave))
                starts.append(starts[-1] + len(filled) // frame)
            bar.step()
    write_json(to.with_suffix(".json"), {"files": known, "rate": rate, "frame": frame, "names": names,
                                         "starts": starts, "lengths": lengths, "account": account.to_data()})


class SoundBatch(NamedTuple):
    """wave (B, 1, L); features (B, T, F), what a teacher heard in each frame, or None; rows: where each was read."""

    wave: Tensor
    features: Tensor | None
    rows: tuple[tuple[int, int], ...]  # (number of the sound, first sample)
    notes: list[Note]


class Sounds(Dataset[SoundBatch]):
    """Batch by step. A pass has every sound as often as it is rows long, each time another part of it; `features`
    (frames, F) go with the frames of the store."""

    def __init__(self, held: Store, data: SoundData, order: Order, features: np.ndarray | None = None) -> None:
        self.held, self.data, self.order, self.features = held, data, order, features
        self.length = length_of(held, data)
        self.parts = parts(held, self.length)

    def __getitem__(self, step: int) -> SoundBatch:
        rows = [self.row(epoch, item) for epoch, item, _ in self.order.rows(step)]
        features = None if self.features is None else torch.stack([row[1] for row in rows])
        return SoundBatch(torch.stack([row[0] for row in rows])[:, None], features, tuple(row[2] for row in rows), [])

    def row(self, epoch: int, item: int) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        random = generator(self.order.seed, epoch, item, CUTTING)
        sound, part, of = self.parts[item]
        free = max(0, int(self.held.lengths[sound]) - self.length)
        start = int(free * (part + random.random()) / of)
        first, frame = int(self.held.starts[sound]), self.held.frame
        wave = self.held.read(first * frame + start, min(self.length, int(self.held.lengths[sound]) - start))
        wave = torch.nn.functional.pad(wave, (0, self.length - len(wave)))
        wave = changed(wave, self.held.rate, self.data, random)
        if self.features is None:
            return wave, None, (sound, start)
        at = first + round(start / frame)
        heard = np.zeros((self.length // frame, self.features.shape[1]), np.float32)
        stop = min(at + len(heard), int(self.held.starts[sound + 1]))
        heard[: stop - at] = self.features[at:stop]
        return wave, torch.from_numpy(heard), (sound, start)


def length_of(held: Store, data: SoundData) -> int:
    """Samples of a row: whole frames."""
    return max(1, round(data.seconds * held.rate / held.frame)) * held.frame


def parts(held: Store, length: int) -> list[tuple[int, int, int]]:
    """(sound, part, how many parts it has) for every row of a pass."""
    counts = [max(1, round(samples / length)) for samples in held.lengths]
    return [(i, part, count) for i, count in enumerate(counts) for part in range(count)]


def changed(wave: Tensor, rate: int, data: SoundData, random: np.random.Generator) -> Tensor:
    """A random gain that does not clip, and now and then a low-pass."""
    cut, loud, share = random.random(), random.uniform(-data.gain, data.gain), random.random()
    if cut < data.lowpass:
        spectrum = torch.fft.rfft(wave)
        at = LOWEST * (rate / 2 / LOWEST) ** share / (rate / 2)
        spectrum[int(at * len(spectrum)) :] = 0
        wave = torch.fft.irfft(spectrum, len(wave))
    gain = 10 ** (loud / 20)
    return wave * min(gain, 1 / max(float(wave.abs().max()), 1e-5))


class SoundModule(lightning.LightningDataModule):
    """Training batches from any step on, and the sounds to evaluate on, at a codec's rate in its frames."""

    def __init__(self, data: SoundData, rate: int, frame: int, seed: int, folder: Path) -> None:
        super().__init__()
        self.data, self.seed, self.folder = data, seed, folder
        self.rate, self.frame = rate, frame
        self.features: np.ndarray | None = None

    def prepare_data(self) -> None:
        """Writes the files of samples that are not there yet."""
        kept, held = split(self.data)
        self.training = store(kept, self.rate, self.frame, self.folder / "train.i16")
        self.validation = store(held, self.rate, self.frame, self.folder / "val.i16") if held else None

    def setup(self, stage: str = "fit") -> None:
        self.prepare_data()

    @property
    def notes(self) -> list[str]:
        return [line for part in (self.training, self.validation) if part for line in part.account.sentences()]

    def order(self, rank: int = 0, world: int = 1) -> Order:
        rows = len(parts(self.training, length_of(self.training, self.data)))
        return Order(count=rows, batch=self.data.batch_size, seed=self.seed, rank=rank, world=world)

    def train_dataloader(self) -> DataLoader[SoundBatch]:
        trainer = self.trainer
        batches = Sounds(self.training, self.data, self.order(*readers(trainer)), self.features)
        return DataLoader(batches, batch_size=None, num_workers=self.data.workers,
                          sampler=Steps(trainer.global_step, trainer.max_steps),
                          pin_memory=trainer.strategy.root_device.type == "cuda")

    def told(self, step: int) -> str:
        """What the batch before this step was made of, in words."""
        rows = Sounds(self.training, self.data, self.order())[step - 1].rows
        places = [f"{self.training.names[sound]} at {start / self.rate:.2f} s" for sound, start in rows]
        return "; ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")


def split(data: SoundData) -> tuple[list[Path], list[Path]]:
    """The files to train and to evaluate on: of every folder its share, spread evenly over its list."""
    if data.val:
        return listing(data.path), listing(data.val)
    kept, held = [], []
    for folder in data.path:
        files = listing((folder,))
        count = min(data.limit, round(len(files) * data.holdout))
        out = {files[int((i + 0.5) * len(files) / count)] for i in range(count)}
        kept += [path for path in files if path not in out]
        held += sorted(out)
    return kept, held
