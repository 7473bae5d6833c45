"""`mm bench talk`: how many people `mm talk` holds on this machine. A server of its own is spoken to by simulated
speakers in real time, over Kyutai's protocol with Ogg/Opus, more and more of them until frames come late."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
from jsonargparse.typing import PositiveInt

from mm.errors import InputError

from ..commands.talk import MODEL
from ..talk import protocol
from ..talk.sound import OggOpus
from .report import Bench, Case, report

PACKAGES = ("torch", "aiohttp", "sphn")
RANDOM = "random"
RATE, FRAME, SECONDS = 24000, 1920, 0.08
CUSHION = 0.16  # seconds that a client plays later than its first frame: as much as Kyutai's page does at most
BEGINNING = 12  # frames of each speaker that do not count
ENOUGH = 0.99  # of the frames have to be on time


@dataclass(frozen=True, kw_only=True)
class Talk(Bench):
    """How many people `mm talk` holds on this machine. A server of its own is spoken to by simulated speakers in
    real time, over Kyutai's protocol with Ogg/Opus, more and more of them until frames come late.

    Args:
        model: a duplex model with its codec, or `random`: weights in the shapes of the recipes duplex_small and
            codec_small.
        codec: another Mimi than its own.
        sounds: what the speakers say, each something else and over and over: a sound file, a folder of them, or a
            .jsonl file of dialogues, whose right channels are taken.
        seconds: that each speaks.
        most: speakers at once that are tried.
        threads: of the server's model.
    """

    model: str = MODEL
    codec: str | None = None
    sounds: Path | None = None
    seconds: PositiveInt = 20
    most: PositiveInt = 8
    threads: PositiveInt = 1

    def run(self) -> int:
        return talk(self)


def talk(args: Talk) -> int:
    waves = spoken(args)
    with tempfile.TemporaryDirectory() as folder:
        model = [random_model(Path(folder)) if args.model == RANDOM else args.model]
        cases, held = [], 0
        for count in range(1, args.most + 1):
            found, good = measure([*model, *(["--codec", args.codec] if args.codec else [])], count, waves, args)
            cases += found
            if not good:
                break
            held = count
    cases.append(Case(case="conversations that hold, at least 1", ours=held, unit="", ratio=held, at_least=1))
    return report("talk", cases, packages=PACKAGES, json_file=args.json)


def spoken(args: Talk) -> list[np.ndarray]:
    """(n * FRAME,) float32 of each speaker, as many seconds as it speaks. Raises InputError."""
    total = round(args.seconds / SECONDS) * FRAME
    if args.sounds is None:
        noise = np.random.default_rng(0).normal(0, 0.1, total)
        return [(noise * (np.arange(total) % (3 * RATE) < 2 * RATE)).astype(np.float32)] * args.most
    found, dialogues = listed(args.sounds)
    return [np.resize(voice(found[i % len(found)], dialogues), total) for i in range(args.most)]


def listed(path: Path) -> tuple[list[Path], bool]:
    """Sound files, and whether they are dialogues. Raises InputError where there are none."""
    from ..codec.data import below
    from ..data.dialogues import read_manifest

    if path.suffix == ".jsonl":
        return [entry.sound for entry in read_manifest(path) if entry.sound is not None], True
    files = below(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no sounds")
    return files, False


def voice(path: Path, dialogue: bool) -> np.ndarray:
    """(L,) float32 of what a person says."""
    from ...codecs.sound import open_sound

    channels = 2 if dialogue else 1
    return np.concatenate([block[-1].numpy() for block in open_sound(path).blocks(RATE, channels)])


def random_model(folder: Path) -> str:
    import torch

    from mm import DuplexLM
    from mm.tokenizer.tokenizer import load_tokenizer

    from ...codecs.mimi import Mimi
    from ...codecs.spec import MimiSpec, Quantizer, Seanet, mimi_stack
    from ..duplex.fit import new_spec
    from ..duplex.settings import DuplexShape
    from ..talk.codec_of import CODEC
    from ..weights import stories260k

    torch.manual_seed(0)
    words, stack = load_tokenizer(stories260k()), mimi_stack(dim=160, depth=3, heads=5, hidden=384, window=32)
    codec = Mimi(MimiSpec(seanet=Seanet(filters=16), encoder=stack, decoder=stack,
                          quantizer=Quantizer(codebooks=8, size=1024, dim=64)))
    model = DuplexLM(new_spec(DuplexShape(), words, 8, 8, 1024))
    for name, value in codec.named_buffers():
        if name.endswith(".sum"):
            value.normal_()
    model.tokenizer = words
    model.save_pretrained(folder)
    codec.save_pretrained(folder / CODEC)
    return str(folder)


# ----------------------------------------------------------------------------------------- one number of speakers
@dataclass
class Speaker:
    """When each frame was said, and when each answer to one was here; seconds of time.monotonic."""

    said: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    lag: int = 0
    dropped: int = 0
    error: str = ""

    def latencies(self) -> list[float]:
        """From the end of a frame to the answer that heard it, the first frames left out."""
        return [answer - said for said, answer in zip(self.said[self.lag :], self.answered, strict=False)][BEGINNING:]

    def on_time(self) -> list[bool]:
        """Whether each frame was here when a client wants to play it, and those that never came."""
        begin = self.answered[0] + CUSHION if self.answered else 0.0
        found = [at <= begin + SECONDS * i for i, at in enumerate(self.answered)]
        return (found + [False] * (len(self.said) - self.lag - len(found)))[BEGINNING:]


def measure(model: list[str], count: int, waves: list[np.ndarray], args: Talk
            ) -> tuple[list[Case], bool]:
    """The cases of so many speakers, and whether the server held them. Raises InputError when it does not start."""
    with server(model, count, args.threads) as (url, process):
        speakers = asyncio.run(speak(url, waves[:count]))
        memory = peak(process.pid)
    wrong = next((one.error for one in speakers if one.error), "")
    if wrong:
        raise InputError(f"with {count} speakers, the server said: {wrong}")
    latencies = 1000 * np.array([x for one in speakers for x in one.latencies()])
    punctual = np.mean([x for one in speakers for x in one.on_time()])
    p50, p99 = np.percentile(latencies, [50, 99]) if len(latencies) else (np.inf, np.inf)
    name = f"{count} at once"
    cases = [Case(case=f"{name}: frames on time", ours=100 * punctual, unit="%"),
             Case(case=f"{name}: speech in to speech out, median", ours=p50, unit="ms"),
             Case(case=f"{name}: the same, 99th percentile", ours=p99, unit="ms"),
             Case(case=f"{name}: frames dropped", ours=sum(one.dropped for one in speakers), unit=""),
             Case(case=f"{name}: memory of the server at most", ours=memory, unit="MB")]
    return cases, bool(punctual >= ENOUGH)


@contextmanager
def server(model: list[str], count: int, threads: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "mm.recipes.cli", "talk", "--model", *model, "--port", "0", "--no-browser",
               "--sessions", str(count), "--threads", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)}) as process:
        try:
            line = process.stdout.readline()
            if "http://" not in line:
                raise InputError(f"the server did not start: {process.stderr.read().strip()}")
            yield line[line.index("http://") :].split()[0], process
        finally:
            process.terminate()
            process.communicate()


def peak(pid: int) -> float:
    """MB of memory that a process held at most; NaN where the system does not say."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), float("nan"))


async def speak(url: str, waves: list[np.ndarray]) -> list[Speaker]:
    """All speakers, who begin at different moments of a frame."""
    apart = SECONDS / len(waves) + 3 * SECONDS
    async with aiohttp.ClientSession() as http:
        begin = time.monotonic() + 0.5
        return await asyncio.gather(*(
            one(http, f"{url}api/chat?text_seed={i}&audio_seed={i}", wave, begin + i * apart)
            for i, wave in enumerate(waves)))


async def one(http: aiohttp.ClientSession, url: str, wave: np.ndarray, begin: float) -> Speaker:
    speaker, wire = Speaker(), OggOpus(RATE)
    async with http.ws_connect(url) as socket:
        listening = asyncio.create_task(listen(socket, speaker))
        for i, frame in enumerate(wave.reshape(-1, FRAME)):
            await asyncio.sleep(begin + i * SECONDS - time.monotonic())
            await socket.send_bytes(protocol.audio(wire.said(frame)))
            speaker.said.append(time.monotonic())
        await asyncio.wait([listening], timeout=1.0)
        listening.cancel()
    return speaker


async def listen(socket: aiohttp.ClientWebSocketResponse, speaker: Speaker) -> None:
    wire, samples = OggOpus(RATE), 0
    async for message in socket:
        known = protocol.parse(message.data)
        if known is None:
            continue
        if known.kind is protocol.Kind.AUDIO:
            samples += sum(len(wave) for wave in wire.heard(known.payload))
            speaker.answered += [time.monotonic()] * (samples // FRAME - len(speaker.answered))
        elif known.kind is protocol.Kind.METADATA:
            facts = protocol.facts(known.payload)
            speaker.lag, speaker.dropped = facts["lag"], facts.get("dropped_frames", 0) + facts.get("unsent_frames", 0)
        elif known.kind is protocol.Kind.ERROR:
            speaker.error = known.payload.decode()
