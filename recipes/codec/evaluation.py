"""Evaluation of a codec: how close decoded sounds are to the originals, and what they sound and look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import soundfile
import torch
from torch import Tensor, nn

from mm.checkpoint.files import replacing

from ...codecs.learning import folded
from ..train.watch import Watch
from .data import Store
from .loss import MelDistance, stft


def si_sdr(x: Tensor, y: Tensor) -> Tensor:
    """x, y (..., L), y the original -> (...) dB: the scale-invariant ratio of signal to distortion (Le Roux et al.,
    2019), of sounds without their means."""
    x, y = (part.double() - part.double().mean(-1, keepdim=True) for part in (x, y))
    tiny = torch.finfo(torch.float64).tiny
    target = (x * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True).clamp(min=tiny) * y
    rest = (x - target).square().sum(-1).clamp(min=tiny)
    return 10 * (target.square().sum(-1).clamp(min=tiny) / rest).log10()


def used(codes: Tensor, size: int) -> float:
    """codes (Q, T) -> the share of the entries of all codebooks that occur (%)."""
    return 100 * sum(len(row.unique()) for row in codes) / (len(codes) * size)


COLUMNS = ("loss", "mel", "commit", "semantic", "adversarial", "features", "critics", "perplexity", "use", "lr",
           "gradient")
SAMPLES = "samples"
SHOWN = 4  # sounds that are kept to listen to
LONGEST = 10  # seconds of a sound that are evaluated


class Exam:
    """Measures a codec on stored sounds; `heard` holds what came out of the first ones, (name, original, output)."""

    def __init__(self, held: Store) -> None:
        self.held, self.heard = held, []
        self.distance = MelDistance(held.rate)

    @torch.inference_mode()
    def __call__(self, codec: nn.Module) -> dict[str, float]:
        """Means over sounds: mel distance, SI-SDR (dB); of all codes, the share of the entries that occur (%)."""
        model, device = folded(codec), next(codec.parameters()).device
        self.heard, rows, codes = [], [], []
        for i in range(len(self.held)):
            wave = self.held.sound(i)[: LONGEST * self.held.rate][None, None]
            found = model.encode(wave.to(device))
            out = model.decode(found)[..., : wave.shape[-1]].cpu()
            rows.append((float(self.distance(out, wave)), float(si_sdr(out[0, 0], wave[0, 0]))))
            codes.append(found[0].cpu())
            if i < SHOWN:
                self.heard.append((Path(self.held.names[i]).stem, wave[0, 0], out[0, 0]))
        mel, ratio = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        return {"mel": mel, "SI-SDR": ratio, "use": used(torch.cat(codes, 1), model.spec.quantizer.size)}


class CodecWatch(Watch):
    """Puts sounds and pictures of their spectrograms beside the figures, in TensorBoard and in the folder `samples`."""

    def evaluate(self, trainer: lightning.Trainer, measured: dict[str, float]) -> None:
        super().evaluate(trainer, measured)
        self.say(f"step {trainer.global_step}: " + ", ".join(f"{name} {x:.3f}" for name, x in measured.items()))
        folder = self.out / SAMPLES
        folder.mkdir(exist_ok=True)
        exam: Any = self.measure
        for name, wave, out in exam.heard:
            self.keep(folder, name, wave, out, exam.held.rate, trainer.global_step)

    def keep(self, folder: Path, name: str, wave: Tensor, out: Tensor, rate: int, step: int) -> None:
        """name.wav is the original, name_STEP.wav and .png what came out after so many steps."""
        write = [(folder / f"{name}_{step}.wav", out)]
        if not (folder / f"{name}.wav").exists():
            write.append((folder / f"{name}.wav", wave))
        for path, sound in write:
            with replacing(path) as part:
                soundfile.write(part, sound.clamp(-1, 1).numpy(), rate, format="WAV")
        self.board.add_audio(name, out.clamp(-1, 1), step, rate)
        draw(wave, out, rate, lambda figure: (figure.savefig(folder / f"{name}_{step}.png", dpi=80),
                                              self.board.add_figure(name, figure, step)))


def draw(wave: Tensor, out: Tensor, rate: int, take: Callable[[Any], Any]) -> None:
    """Both spectrograms, one above the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    for axis, sound, title in zip(axes, (wave, out), ("original", "decoded"), strict=True):
        level = 20 * stft(sound[None, None], 1024, torch.hann_window(1024))[0].abs().clamp(min=1e-4).log10()
        axis.imshow(level, origin="lower", aspect="auto", vmin=-60, vmax=40, cmap="magma",
                    extent=(0, len(sound) / rate, 0, rate / 2000))
        axis.set_ylabel(f"{title}, kHz")
    axes[-1].set_xlabel("s")
    take(figure)
    pyplot.close(figure)
