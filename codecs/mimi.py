"""Mimi: speech at 12.5 frames a second and back, frame by frame (Défossez et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.checkpoint import pretrained
from mm.errors import InputError
from mm.nn.graph import Replay
from mm.nn.state import check_state
from mm.nn.transformer import Transformer
from mm.spec import attention
from mm.spec.schema import fingerprint

from .conv import Conv, DepthwiseTranspose
from .families import FAMILIES
from .quantizer import SplitQuantizer
from .seanet import build_decoder, build_encoder
from .spec import MimiSpec
from .state import Half, MimiState

PIECE = 8  # frames that an offline input goes through convolutions at a time: measured, larger ones leave the cache
NONE = -1  # the code of a frame that does not exist


class Mimi(pretrained.Pretrained):
    """wave (B, C, L) -> codes (B, Q, T) -> wave (B, C, T * frame). Causal: no look-ahead anywhere."""

    kind, families = "mimi", FAMILIES

    def __init__(self, settings: MimiSpec):
        super().__init__()
        s = self.spec = settings
        self.spec_print, dim = fingerprint(s), s.encoder.dim
        self.encoder = build_encoder(s.seanet, dim, PIECE * s.frame)
        self.encoder_stack = Transformer(s.encoder)
        self.downsample = Conv(dim, dim, 2 * s.stride, stride=s.stride, bias=False, replicate=True)
        self.quantizer = SplitQuantizer(dim, s.quantizer)
        self.upsample = DepthwiseTranspose(dim, s.stride)
        self.decoder_stack = Transformer(s.decoder)
        self.decoder = build_decoder(s.seanet, dim, PIECE * s.stride)

    def forward(self, wave: Tensor, *, state: MimiState | None = None, rows: Tensor | None = None,
                codebooks: int | None = None) -> tuple[Tensor, Tensor]:
        """`encode`, then `decode`: (codes, wave). With a state and a frame, this is the step of a stream that compiles
        and exports as one program."""
        codes = self.encode(wave, state=state, rows=rows, codebooks=codebooks)
        return codes, self.decode(codes, state=state, rows=rows)

    # ------------------------------------------------------------------------------------- encoding
    @torch.no_grad()
    def encode(self, wave: Tensor, *, state: MimiState | None = None, rows: Tensor | None = None,
               lengths: Tensor | None = None, codebooks: int | None = None,
               padding: Literal["frame", "layer"] = "frame") -> Tensor:
        """wave (B, C, L) at the model's rate -> codes (B, Q, T).

        state: continue a stream by whole frames; rows (B,) bool says which rows advance. lengths: (B,) samples of rows
        that end before L; their codes are those of the row alone, and -1 after it. codebooks: the first so many
        (default: all). padding: how the last frame is filled, `frame` with zeros after the samples (the official
        rule), `layer` at the input of every strided convolution (transformers' rule).
        Raises InputError on wrong shapes, samples that are not finite, and a foreign state.
        """
        count = self.spec.quantizer.codebooks if codebooks is None else codebooks
        if not 1 <= count <= self.spec.quantizer.codebooks:
            raise InputError(f"codebooks should be 1 to {self.spec.quantizer.codebooks}, not {count}")
        latents = self.latents(wave, state=state, rows=rows, lengths=lengths, padding=padding)
        codes = self.quantizer.encode(latents, count)
        if lengths is None:
            return codes
        frames = torch.arange(codes.shape[2], device=codes.device) * self.spec.frame
        return torch.where((frames < lengths[:, None]).unsqueeze(1), codes, NONE)

    def latents(self, wave: Tensor, *, state: MimiState | None = None, rows: Tensor | None = None,
                lengths: Tensor | None = None, padding: Literal["frame", "layer"] = "frame") -> Tensor:
        """`encode` before quantisation: (B, T, D)."""
        self.check_wave(wave, state, rows, lengths)
        wave = quiet(wave, rows)
        x = wave.to(self.downsample.weight.dtype).transpose(1, 2)
        if state is None:
            valid = None
            if lengths is not None:
                x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None], 0)
            if padding == "layer":
                valid = x.new_full((len(x),), x.shape[1], dtype=torch.long) if lengths is None else lengths
            return self.analyse(F.pad(x, (0, 0, 0, -x.shape[1] % self.spec.frame)), None, rows, valid)
        pieces = x.split(state.chunk * self.spec.frame, 1)
        out = [self.analyse(piece, state.encoder, rows, None) for piece in pieces]
        return out[0] if len(out) == 1 else torch.cat(out, 1)

    def analyse(self, x: Tensor, half: Half | None, rows: Tensor | None, valid: Tensor | None) -> Tensor:
        """(B, T * frame, C) -> (B, T, D)"""
        convs, stack, resample = (None,) * 3 if half is None else (half.convs, half.stack, half.resample)
        x = self.encoder_stack(self.encoder(x, convs, rows, valid), state=stack, rows=rows)
        return self.downsample(x, resample, rows, None if valid is None else -(-valid // self.spec.seanet.hop))

    # ------------------------------------------------------------------------------------- decoding
    @torch.no_grad()
    def decode(self, codes: Tensor, *, state: MimiState | None = None, rows: Tensor | None = None,
               lengths: Tensor | None = None) -> Tensor:
        """codes (B, Q, T), of as many codebooks as there are -> wave (B, C, T * frame).

        state, rows: as in `encode`. lengths: (B,) frames of rows that end before T; they are silent after it.
        Raises InputError on wrong shapes, codes outside the codebooks, and a foreign state.
        """
        if lengths is not None:
            check_lengths(lengths, codes, "frames", state)
            beyond = torch.arange(codes.shape[-1], device=codes.device) >= lengths[:, None]
            codes = codes.masked_fill(beyond.unsqueeze(1), 0)
        self.check_codes(codes, state, rows)
        codes = quiet(codes, rows)
        pieces = [codes] if state is None else codes.split(state.chunk, 2)
        out = [self.synthesise(self.quantizer.decode(piece), state and state.decoder, rows) for piece in pieces]
        wave = (out[0] if len(out) == 1 else torch.cat(out, 1)).transpose(1, 2)
        return wave if lengths is None else wave.masked_fill(beyond.repeat_interleave(self.spec.frame, 1)[:, None], 0)

    def synthesise(self, x: Tensor, half: Half | None = None, rows: Tensor | None = None) -> Tensor:
        """Latents (B, T, D) -> (B, T * frame, C)"""
        convs, stack, resample = (None,) * 3 if half is None else (half.convs, half.stack, half.resample)
        return self.decoder(self.decoder_stack(self.upsample(x, resample, rows), state=stack, rows=rows), convs, rows)

    # ------------------------------------------------------------------------------------- streams
    def init_state(self, batch: int, *, chunk: int = 1, official_window: bool = False,
                   dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> MimiState:
        """An empty stream of `batch` rows for both directions. chunk: frames that go through at once; a larger one is
        faster where latency does not matter. official_window: after the transformers' window (10 s) keep only as many
        keys as it is long, as the official package does when it streams: the first steps of a call then miss the
        oldest, and the result depends on the chunks (of `chunk` frames each). By default streaming equals offline."""
        if batch < 1 or chunk < 1:
            raise InputError(f"a stream needs at least one row and one frame at a time, not {batch} and {chunk}")
        s, here = self.spec, self.downsample.weight
        dtype, device = dtype or here.dtype, torch.device(device or here.device)
        steps = chunk * s.stride

        def half(chain, stack, resample, inputs, frames):
            windows = [attention(layer).window.left for layer in stack.stack.layers]
            length = min(windows) + 1 if official_window else None
            held = stack.init_state(batch, length=length, chunk=steps, dtype=dtype, device=device)
            return Half(chain.init_state(batch, inputs, dtype, device), held,
                        resample.init_state(batch, frames, dtype, device))
        return MimiState(half(self.encoder, self.encoder_stack, self.downsample, chunk * s.frame, steps),
                         half(self.decoder, self.decoder_stack, self.upsample, steps, chunk), self.spec_print, chunk)

    # ------------------------------------------------------------------------------------- checks
    def check_wave(self, wave: Tensor, state: MimiState | None, rows: Tensor | None, lengths: Tensor | None) -> None:
        s = self.spec
        if wave.ndim != 3 or wave.shape[1] != s.seanet.channels or not wave.shape[0] or not wave.is_floating_point():
            raise InputError(f"a wave should be floating-point (B, {s.seanet.channels}, L), not {wave.dtype} "
                             f"{tuple(wave.shape)}")
        if not wave.shape[2]:
            raise InputError("the wave is empty")
        if lengths is not None:
            check_lengths(lengths, wave, "samples", state)
        self.check_stream(state, len(wave), rows)
        if state is not None and wave.shape[2] % s.frame:
            raise InputError(f"a stream takes whole frames of {s.frame} samples, not {wave.shape[2]} samples")
        if readable(wave) and not bool(awake(torch.isfinite(wave), rows).all()):
            raise InputError("the wave holds samples that are not finite")

    def check_codes(self, codes: Tensor, state: MimiState | None, rows: Tensor | None) -> None:
        q = self.spec.quantizer
        if codes.ndim != 3 or not all(codes.shape) or codes.is_floating_point() or codes.dtype == torch.bool:
            raise InputError(f"codes should be integers (B, Q, T), not {codes.dtype} {tuple(codes.shape)}")
        if codes.shape[1] > q.codebooks:
            raise InputError(f"{codes.shape[1]} codebooks of codes are more than the model's {q.codebooks}")
        self.check_stream(state, len(codes), rows)
        if readable(codes) and not bool(awake((codes >= 0) & (codes < q.size), rows).all()):
            raise InputError(f"codes should be 0 to {q.size - 1}, not {codes.min()} to {codes.max()}")

    def check_stream(self, state: MimiState | None, batch: int, rows: Tensor | None) -> None:
        if state is None and rows is not None:
            raise InputError("rows says which rows of a state advance: it needs one")
        if state is not None:
            check_state(state, self.spec_print, batch, rows)


class Stream:
    """`batch` rows of a codec. `state` is that of `Mimi.init_state`: reset it, write to it or save it between calls.

    On a GPU each direction is captured as a CUDA graph by its second call; what a call returns is overwritten by the
    next of its kind, and values are not checked."""

    def __init__(self, model: Mimi, batch: int, *, codebooks: int | None = None):
        s, device = model.spec, model.downsample.weight.device
        self.codebooks = s.quantizer.codebooks if codebooks is None else codebooks
        self.state = model.init_state(batch)
        self.rows = torch.ones(batch, dtype=torch.bool, device=device)
        self.wave = torch.zeros(batch, s.seanet.channels, s.frame, dtype=model.downsample.weight.dtype, device=device)
        self.codes = torch.zeros(batch, self.codebooks, 1, dtype=torch.long, device=device)
        steps = (lambda: model.encode(self.wave, state=self.state, rows=self.rows, codebooks=self.codebooks),
                 lambda: model.decode(self.codes, state=self.state, rows=self.rows))
        self.encoder, self.decoder = (Replay(step) if device.type == "cuda" else step for step in steps)

    def encode(self, wave: Tensor, rows: Tensor | None = None) -> Tensor:
        """wave (B, C, frame), rows (B,) bool that advance (default: all) -> codes (B, Q, 1)."""
        return self.go(self.encoder, self.wave, wave, rows)

    def decode(self, codes: Tensor, rows: Tensor | None = None) -> Tensor:
        """codes (B, Q, 1) of as many codebooks as the stream was made for -> wave (B, C, frame)."""
        return self.go(self.decoder, self.codes, codes, rows)

    @torch.no_grad()
    def go(self, step: Callable[[], Tensor], place: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        for name, x, wanted in (("input", given, place), ("rows", rows, self.rows)):
            if x is not None and (x.shape != wanted.shape or x.is_floating_point() != wanted.is_floating_point()):
                raise InputError(f"this stream takes {wanted.dtype} {tuple(wanted.shape)} as its {name}, not {x.dtype} "
                                 f"{tuple(x.shape)}")
        place.copy_(given)
        self.rows.fill_(True) if rows is None else self.rows.copy_(rows)
        return step()


# ------------------------------------------------------------------------------------- inputs
def check_lengths(lengths: Tensor, x: Tensor, unit: str, state: MimiState | None) -> None:
    if state is not None:
        raise InputError("lengths is for whole waves; in a stream, rows says which rows go on")
    if tuple(lengths.shape) != (len(x),) or lengths.is_floating_point():
        raise InputError(f"lengths should be integers ({len(x)},), not {lengths.dtype} {tuple(lengths.shape)}")
    if readable(lengths) and not bool(((lengths > 0) & (lengths <= x.shape[2])).all()):
        raise InputError(f"lengths should be 1 to {x.shape[2]} {unit}, not {lengths.min()} to {lengths.max()}")


def quiet(x: Tensor, rows: Tensor | None) -> Tensor:
    """x (B, C, T) with zeros in the rows that do not advance, whose NaN would stay in a cache."""
    return x if rows is None else x.masked_fill(~rows[:, None, None], 0)


def awake(good: Tensor, rows: Tensor | None) -> Tensor:
    """good (B, C, T), true in the rows that do not advance."""
    return good if rows is None else good | ~rows[:, None, None]


def readable(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device, or being part of a program."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
