"""`mm codec encode|decode|play`: sound files to codes and back, in constant memory."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mm.errors import InputError

from ..common.options import choose_device, device_option, positive
from ..common.progress import Bar

if TYPE_CHECKING:
    from torch import Tensor

    from ...codecs.mimi import Mimi

CHUNK = 25  # frames at a time where nobody waits for each
SUFFIX = ".mimi"


def codec(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mm codec", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="encode|decode|play")
    encoding = commands.add_parser("encode", help="a sound file (any format of libsndfile, rate, channels) to .mimi")
    decoding = commands.add_parser("decode", help="a .mimi file to a sound file, whose suffix says the format")
    playing = commands.add_parser("play", help="play a .mimi file, or a sound file as it comes out of the codec")
    for command, names in ((encoding, ("SOUND", "CODES")), (decoding, ("CODES", "SOUND")), (playing, ("FILE",))):
        for name in names:
            command.add_argument(name.lower(), metavar=name, type=Path)
        command.add_argument("--model", default="codec_small", help="a Mimi directory, hub name or Kyutai's "
                             "safetensors file, or codec_small, which ships with this package (default)")
        command.add_argument("--int8", action="store_true", help="8-bit weights in the transformers (CPU)")
        device_option(command)
    for command in (encoding, playing):
        command.add_argument("--codebooks", type=positive, help="the first so many (default: 8, or all if fewer)")
    playing.add_argument("--stdout", action="store_true", help="16-bit samples to standard output, not the speakers")
    args = parser.parse_args(argv)
    return {"encode": encode, "decode": decode, "play": play}[args.command](args)


def load(args: argparse.Namespace) -> Mimi:
    import torch

    from mm.lowbit import quantize

    from ...codecs.mimi import Mimi

    model = Mimi.from_pretrained(args.model, dtype=torch.float32, device=choose_device(args.device))
    args.weights = model.fingerprint()
    if args.int8:
        for stack in (model.encoder_stack, model.decoder_stack):
            quantize(stack)
    return model


def encode(args: argparse.Namespace) -> int:
    from mm.checkpoint.files import replacing

    from ...codecs.file import Writer
    from ...codecs.sound import open_sound

    sound, model = open_sound(args.sound), load(args)
    header = header_of(args, model)
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
    return 0


def header_of(args: argparse.Namespace, model: Mimi):
    from ...codecs.file import Header

    s, held = model.spec, model.spec.quantizer.codebooks
    if args.codebooks is not None and args.codebooks > held:
        raise InputError(f"--codebooks {args.codebooks}: the model has {held}")
    return Header(model=str(args.model), weights=args.weights, rate=s.rate, frame=s.frame, channels=s.seanet.channels,
                  codebooks=args.codebooks or min(8, held), size=s.quantizer.size)


def encoded(model: Mimi, sound, codebooks: int, chunk: int) -> Iterator[Tensor]:
    """Codes (1, Q, T) of a sound file, T up to `chunk` frames."""
    state = model.init_state(1, chunk=chunk)
    for wave in framed(model, sound, chunk):
        yield model.encode(wave, state=state, codebooks=codebooks)


def framed(model: Mimi, sound, chunk: int) -> Iterator[Tensor]:
    """Waves (1, C, L) of a sound file on the model's device, up to `chunk` whole frames at a time."""
    from ...codecs.framing import Framer

    s = model.spec
    device, framer = next(model.parameters()).device, Framer.empty(1, s.seanet.channels, s.frame)
    for block in sound.blocks(s.rate, s.seanet.channels):
        for piece in framer.push(block[None]).split(chunk * s.frame, 2):
            if piece.shape[2]:
                yield piece.to(device)
    last = framer.flush()
    if last.shape[2]:
        yield last.to(device)


def decode(args: argparse.Namespace) -> int:
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
    return 0


def opened(path: Path, args: argparse.Namespace):
    """A .mimi file and the model that wrote it. Raises InputError when `--model` is another one."""
    from ...codecs.file import Reader

    reader, model = Reader(path), load(args)
    if reader.header.weights != args.weights:
        raise InputError(f"{path} was written by another model ({reader.header.model}, weights "
                         f"{reader.header.weights}) than {args.model} (weights {args.weights})")
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


def play(args: argparse.Namespace) -> int:
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
    return 0


def played(args: argparse.Namespace) -> tuple[Mimi, Iterator[Tensor]]:
    """The model, and waves (1, C, frame) on the CPU as a stream makes them of either kind of file."""
    from ...codecs.sound import open_sound
    from ...codecs.stream import Stream

    if args.file.suffix == SUFFIX:
        reader, model = opened(args.file, args)
        stream = Stream(model, 1, codebooks=reader.header.codebooks)
        device = stream.codes.device
        return model, (stream.decode(codes[None].to(device)).cpu() for codes in reader.blocks(1))
    sound, model = open_sound(args.file), load(args)
    stream = Stream(model, 1, codebooks=header_of(args, model).codebooks)
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
