"""`mm codec encode|decode|play`: sound files to codes and back, in constant memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from mm.errors import InputError

from ..common.command import argument
from ..common.options import choose_device
from ..common.progress import Bar

if TYPE_CHECKING:
    from torch import Tensor

    from ...codecs.file import Header, Reader
    from ...codecs.mimi import Mimi

CHUNK = 25  # frames at a time where nobody waits for each
SUFFIX = ".mimi"


@dataclass(frozen=True, kw_only=True)
class Coding:
    """Options that all three share.

    Args:
        model: a Mimi directory, hub name or Kyutai's safetensors file, or the codec that ships here.
        int8: 8-bit weights in the transformers, on a CPU.
        device: where the model runs, such as cpu or cuda:0; none is a GPU if there is one.
        codebooks: the first of them; none is 8, or all if there are fewer.
    """

    model: str = "codec_small"
    int8: bool = False
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class Encode(Coding):
    """Encode a sound file (any format of libsndfile, rate and channels) to .mimi, in constant memory.

    Args:
        sound: the sound file.
        codes: the .mimi file to write.
    """

    sound: Path = argument()
    codes: Path = argument()
    codebooks: PositiveInt | None = None

    def run(self) -> None:
        encode(self)


@dataclass(frozen=True, kw_only=True)
class Decode(Coding):
    """Decode a .mimi file to a sound file, in constant memory.

    Args:
        codes: the .mimi file.
        sound: the sound file to write; its suffix is the format.
    """

    codes: Path = argument()
    sound: Path = argument()

    def run(self) -> None:
        decode(self)


@dataclass(frozen=True, kw_only=True)
class Play(Coding):
    """Play a .mimi file, or a sound file as it comes out of the codec.

    Args:
        file: the file.
        stdout: 16-bit samples to standard output, not to the speakers.
    """

    file: Path = argument()
    codebooks: PositiveInt | None = None
    stdout: bool = False

    def run(self) -> None:
        play(self)


COMMANDS = {
    "encode": ("mm.recipes.commands.codec:Encode", "a sound file to codes"),
    "decode": ("mm.recipes.commands.codec:Decode", "codes to a sound file"),
    "play": ("mm.recipes.commands.codec:Play", "codes, or a sound file through the codec, to the speakers"),
}


def load(args: Coding) -> tuple[Mimi, str]:
    """The codec, and the fingerprint of its weights before they are changed to 8 bits."""
    import torch

    from mm.lowbit import quantize

    from ...codecs.mimi import Mimi

    model = Mimi.from_pretrained(args.model, dtype=torch.float32, device=choose_device(args.device))
    weights = model.fingerprint()
    if args.int8:
        for stack in (model.encoder_stack, model.decoder_stack):
            quantize(stack)
    return model, weights


def encode(args: Encode) -> None:
    from mm.checkpoint.files import replacing

    from ...codecs.file import Writer
    from ...codecs.sound import open_sound

    sound, (model, weights) = open_sound(args.sound), load(args)
    header = header_of(args, model, weights)
    start = time.perf_counter()
    with replacing(args.codes) as part, open(part, "r+b") as file, bar("encoding", sound.seconds, model) as progress:
        writer = Writer(file, header)
        for codes in encoded(model, sound, header.codebooks, CHUNK):
            writer.write(codes[0])
            progress.step(codes.shape[2])
        done = writer.finish(-(-sound.samples * model.spec.rate // sound.rate))
    spent = time.perf_counter() - start
    size = args.codes.stat().st_size
    print(f"{args.codes}: {done.seconds:.1f} s of sound in {size:,} bytes "
          f"({done.frame_bytes * 8 * model.spec.frame_rate / 1000:.2f} kbit/s), {pace(spent, done.seconds)}")


def header_of(args: Encode | Play, model: Mimi, weights: str) -> Header:
    from ...codecs.file import Header

    s, held = model.spec, model.spec.quantizer.codebooks
    if args.codebooks is not None and args.codebooks > held:
        raise InputError(f"--codebooks {args.codebooks}: the model has {held}")
    return Header(model=str(args.model), weights=weights, rate=s.rate, frame=s.frame, channels=s.seanet.channels,
                  codebooks=args.codebooks or min(8, held), size=s.quantizer.size)


def encoded(model: Mimi, sound, codebooks: int, chunk: int) -> Iterator[Tensor]:
    """Codes (1, Q, T) of a sound file, T up to `chunk` frames."""
    state = model.init_state(1, chunk=chunk)
    for wave in framed(model, sound, chunk):
        yield model.encode(wave, state=state, codebooks=codebooks)


def framed(model: Mimi, sound, chunk: int) -> Iterator[Tensor]:
    """Waves (1, C, L) of a sound file on the model's device, up to `chunk` whole frames at a time."""
    from ...codecs.state import Framer

    s = model.spec
    device, framer = next(model.parameters()).device, Framer.empty(1, s.seanet.channels, s.frame)
    for block in sound.blocks(s.rate, s.seanet.channels):
        for piece in framer.push(block[None]).split(chunk * s.frame, 2):
            if piece.shape[2]:
                yield piece.to(device)
    last = framer.flush()
    if last.shape[2]:
        yield last.to(device)


def decode(args: Decode) -> None:
    from ...codecs.sound import new_sound

    reader, model = opened(args.codes, args)
    h = reader.header
    start, left = time.perf_counter(), h.samples
    with new_sound(args.sound, h.rate, h.channels) as file, bar("decoding", h.seconds, model) as progress:
        for wave in decoded(model, reader.blocks(CHUNK), CHUNK):
            file.write(wave[0, :, :left].T.clamp(-1, 1).numpy())
            left -= min(left, wave.shape[2])
            progress.step(wave.shape[2] // h.frame)
    print(f"{args.sound}: {h.seconds:.1f} s of sound, {pace(time.perf_counter() - start, h.seconds)}")


def opened(path: Path, args: Decode | Play) -> tuple[Reader, Mimi]:
    """A .mimi file and the model that wrote it. Raises InputError when `--model` is another one."""
    from ...codecs.file import Reader

    reader, (model, weights) = Reader(path), load(args)
    if reader.header.weights != weights:
        raise InputError(f"{path} was written by another model ({reader.header.model}, weights "
                         f"{reader.header.weights}) than {args.model} (weights {weights})")
    s = model.spec
    held = {"rate": s.rate, "frame": s.frame, "channels": s.seanet.channels, "size": s.quantizer.size}
    for name, value in held.items():
        if getattr(reader.header, name) != value:
            raise InputError(f"{path} has a broken header: its {name} is {getattr(reader.header, name)}, the model's "
                             f"{value}")
    if reader.header.codebooks > s.quantizer.codebooks:
        raise InputError(f"{path} holds {reader.header.codebooks} codebooks, the model {s.quantizer.codebooks}")
    return reader, model


def decoded(model: Mimi, blocks: Iterator[Tensor], chunk: int) -> Iterator[Tensor]:
    """Waves (1, C, L) on the CPU of codes (Q, T)."""
    device, state = next(model.parameters()).device, model.init_state(1, chunk=chunk)
    for codes in blocks:
        yield model.decode(codes[None].to(device), state=state).cpu()


def play(args: Play) -> None:
    model, waves = played(args)
    say = to_stdout if args.stdout else speakers(model)
    spent, seconds = 0.0, 0.0
    while True:
        start = time.perf_counter()
        wave = next(waves, None)
        spent += time.perf_counter() - start
        if wave is None:
            break
        say(wave[0])
        seconds += wave.shape[2] / model.spec.rate
    print(f"{args.file}: {seconds:.1f} s of sound, {pace(spent, seconds)}", file=sys.stderr)


def played(args: Play) -> tuple[Mimi, Iterator[Tensor]]:
    """The model, and waves (1, C, frame) on the CPU as a stream makes them of either kind of file."""
    from ...codecs.mimi import Stream
    from ...codecs.sound import open_sound

    if args.file.suffix == SUFFIX:
        reader, model = opened(args.file, args)
        stream = Stream(model, 1, codebooks=reader.header.codebooks)
        device = stream.codes.device
        return model, (stream.decode(codes[None].to(device)).cpu() for codes in reader.blocks(1))
    sound, (model, weights) = open_sound(args.file), load(args)
    stream = Stream(model, 1, codebooks=header_of(args, model, weights).codebooks)
    return model, (stream.decode(stream.encode(wave)).cpu() for wave in framed(model, sound, 1))


def to_stdout(wave: Tensor) -> None:
    sys.stdout.buffer.write((wave.T.clamp(-1, 1) * 32767).short().numpy().tobytes())
    sys.stdout.buffer.flush()


def speakers(model: Mimi) -> Callable[[Tensor], None]:
    """Raises InputError without sounddevice or an output."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        raise InputError(f"playing needs the package sounddevice and PortAudio ({error}); "
                         "--stdout needs neither") from None
    try:
        stream = sounddevice.OutputStream(model.spec.rate, channels=model.spec.seanet.channels, dtype="float32")
        stream.start()
    except sounddevice.PortAudioError as error:
        raise InputError(f"there is no output to play on ({error}); --stdout writes the samples") from None
    return lambda wave: stream.write(wave.T.contiguous().numpy())


def bar(title: str, seconds: float, model: Mimi) -> Bar:
    """Counts frames."""
    return Bar(title, max(1, round(seconds * model.spec.frame_rate)))


def pace(spent: float, seconds: float) -> str:
    factor = spent / max(seconds, 1e-9)
    return f"{spent:.1f} s of work, real-time factor {factor:.3f} ({1 / max(factor, 1e-9):.1f} times real time)"
