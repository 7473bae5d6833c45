"""What a codec's output is measured by: log-mel spectrograms at several resolutions, and discriminators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

SCALES = ((32, 4), (64, 8), (128, 16), (256, 32), (512, 64), (1024, 96), (2048, 128))  # window in samples, mel bands
FLOOR, QUIET = 1e-3, 1e-5  # of samples up to 1
SLOPE = 0.2


class MelDistance(nn.Module):
    """x, y (B, 1, L) -> (), the mean over scales of the mean distance of log10 of mel bands (Kumar et al., 2023), which
    are scaled so that white noise has its own deviation in every band, and are deaf to what is far below `FLOOR`."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.scales = SCALES
        for window, bands in self.scales:
            bank, hann = melscale_fbanks(window // 2 + 1, 0.0, rate / 2, bands, rate), torch.hann_window(window)
            bank = bank / bank.sum(0).clamp(min=QUIET) / hann.square().sum().sqrt()
            self.register_buffer(f"bank{window}", bank, persistent=False)
            self.register_buffer(f"hann{window}", hann, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y: the original, which gets no gradient."""
        distances = []
        for window, _ in self.scales:
            with torch.no_grad():
                wanted = self.bands(y, window)
            distances.append((self.bands(x, window) - wanted).abs().mean())
        return torch.stack(distances).mean()

    def bands(self, x: Tensor, window: int) -> Tensor:
        """(B, 1, L) -> (B, T, bands)"""
        spectrum = stft(x, window, getattr(self, f"hann{window}"))
        size = (spectrum.real.square() + spectrum.imag.square() + QUIET**2).sqrt()
        return (size.transpose(1, 2) @ getattr(self, f"bank{window}") + FLOOR).log10()


def stft(x: Tensor, window: int, hann: Tensor) -> Tensor:
    """(B, 1, L) -> (B, F, T), a quarter of a window apart."""
    return torch.stft(x[:, 0].float(), window, window // 4, window=hann, center=True, pad_mode="reflect",
                      return_complex=True)


class Critic(nn.Module):
    """x (B, 1, L) -> (judgements (B, 1, T, F), what it saw on the way there): convolutions over real and imaginary part
    of a short-time Fourier transform (Défossez et al., 2022, section 3.4)."""

    def __init__(self, window: int, filters: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        wide, steps = (3, 9), (1, 2, 4)
        layers = [nn.Conv2d(2, filters, wide, padding=(1, 4))]
        layers += [nn.Conv2d(filters, filters, wide, stride=(1, 2), dilation=(d, 1), padding=(d, 4)) for d in steps]
        layers += [nn.Conv2d(filters, filters, 3, padding=1), nn.Conv2d(filters, 1, 3, padding=1)]
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        spectrum = stft(x, self.window, self.hann) / self.window**0.5
        x, seen = torch.stack([spectrum.real, spectrum.imag], 1).transpose(2, 3), []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), SLOPE)
            seen.append(x)
        return self.layers[-1](x), seen


class Jury(nn.Module):
    """One critic for each window."""

    def __init__(self, windows: Sequence[int], filters: int) -> None:
        super().__init__()
        self.critics = nn.ModuleList(Critic(window, filters) for window in windows)

    def forward(self, x: Tensor, y: Tensor, mean: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, 1, L) that a codec made of y -> three losses: what the codec is told by the judgements, and by what the
        critics see in x and y, neither of which has a gradient for the critics; what the critics are told (hinge),
        which has none for the codec. `mean` of () is over processes, without gradient."""
        sums = [x.new_zeros(()) for _ in range(3)]
        for critic in self.critics:
            critic.requires_grad_(False)
            judged, seen = critic(x)
            critic.requires_grad_(True)
            real, known = critic(y)
            fake, _ = critic(x.detach())
            apart = [(a - b.detach()).abs().mean() / mean(b.abs().mean()).clamp(min=QUIET)
                     for a, b in zip(seen, known, strict=True)]
            found = (-judged.mean(), torch.stack(apart).mean(), F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            sums = [total + value / len(self.critics) for total, value in zip(sums, found, strict=True)]
        return sums[0], sums[1], sums[2]
