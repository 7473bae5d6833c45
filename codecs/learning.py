"""How the codebooks learn: by running averages of what falls to their entries, from k-means on, unused ones replaced.

From Mimi and what it builds on (Défossez et al., 2024, section 3; van den Oord et al., 2017; Dhariwal et al., 2020):
gradients pass the quantiser as if it were not there, a commitment loss holds the vectors near their entries, sequences
use fewer codebooks at random, and sequences skip quantisation at random. Ours: k-means finds at most a quarter as many
centres as there are vectors, and the other entries begin scattered around them, so that small batches leave something
to the codebooks that follow; sequences, not batches, drop codebooks; and processes learn from each other's vectors too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .conv import Conv, ConvTranspose
from .mimi import Mimi
from .quantizer import Codebook, ResidualQuantizer, SplitQuantizer
from .spec import Learning

FEWEST = 4  # vectors for each centre of k-means
AXIS = {Conv: 0, ConvTranspose: 2}  # that each length belongs to: an output's, an input's, as torch's own layers do


class Learned(NamedTuple):
    """latents (B, T, W) for the decoder; semantic (B, T, W), the part of them that the semantic codebooks hold; codes
    (B, Q, T); commitment (), the mean over codebooks of the squared distance to the entries."""

    latents: Tensor
    semantic: Tensor
    codes: Tensor
    commitment: Tensor


def learn(quantizer: SplitQuantizer, x: Tensor, settings: Learning, step: int, generator: torch.Generator) -> Learned:
    """Quantises x (B, T, W) with gradients and moves the codebooks. All processes of a run have to call it with
    generators in one state: they then hold the same codebooks, those of one process with the whole batch."""
    held = quantizer.settings
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    own = slice(rank * len(x), (rank + 1) * len(x))
    kept, skip = (drawn[own] for drawn in draw(world * len(x), held.codebooks - held.semantic, settings, generator, x))
    parts, codes, losses = [], [], []
    for part, levels in ((quantizer.semantic, torch.full_like(kept, held.semantic)), (quantizer.acoustic, kept)):
        y = part.down(x)
        found, left = [], y
        for code, entry in residual(part, gathered(y.detach()), settings, step, generator):
            found.append(entry[own])
            codes.append(code[own])
            losses.append((left - entry[own]).square().mean())
            left = left - entry[own]
        used = torch.arange(len(found), device=x.device)[:, None] < levels
        total = (torch.stack(found) * used[..., None, None]).sum(0)
        parts.append(part.up(torch.where(skip[:, None, None], y, y + (total - y).detach())))
    return Learned(sum(parts), parts[0], torch.stack(codes, 1), torch.stack(losses).mean())


def draw(batch: int, acoustic: int, settings: Learning, generator: torch.Generator, like: Tensor
         ) -> tuple[Tensor, Tensor]:
    """(acoustic codebooks that a sequence uses, whether it is not quantised), each (B,)."""
    drops, few, skip = torch.rand(3, batch, generator=generator, device=like.device)
    kept = torch.where(drops < settings.dropout, (few * (acoustic + 1)).long(), acoustic)
    return kept, skip < settings.skip


def gathered(x: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, in order."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def residual(part: ResidualQuantizer, y: Tensor, settings: Learning, step: int, generator: torch.Generator
             ) -> list[tuple[Tensor, Tensor]]:
    """(codes (B, T), their entries (B, T, D)) of each codebook, which moves afterwards."""
    left, out = y.flatten(0, 1).float(), []
    for codebook in part.codebooks:
        if not bool(codebook.initialized):
            begin(codebook, left, settings.rounds, generator)
        code = codebook.encode(left)
        entry = codebook.decode(code)
        move(codebook, left, code, settings.decay)
        if (step + 1) % settings.look == 0:
            replace(codebook, left, settings.expire, generator)
        codebook.refresh()
        left = left - entry
        out.append((code.view(y.shape[:2]), entry.view(y.shape)))
    return out


def begin(codebook: Codebook, x: Tensor, rounds: int, generator: torch.Generator) -> None:
    """Entries from vectors (N, D): centres of k-means, then others as far from these as the vectors are."""
    size = len(codebook.usage)
    centres = kmeans(x, max(1, min(size, len(x) // FEWEST)), rounds, generator)
    spread = (x - centres[nearest(x, centres)]).std(0, correction=0)
    beside = centres[chosen(len(centres), size - len(centres), generator, x)]
    noise = torch.randn(beside.shape, generator=generator, device=x.device) * spread
    codebook.usage.fill_(len(x) / size)
    codebook.sum.copy_(torch.cat([centres, beside + noise]) * codebook.usage[:, None])
    codebook.initialized.fill_(1)
    codebook.refresh()


def kmeans(x: Tensor, count: int, rounds: int, generator: torch.Generator) -> Tensor:
    """(count, D) centres of x (N, D); one that nothing falls to stays where it is."""
    centres = x[torch.randperm(len(x), generator=generator, device=x.device)[:count]]
    for _ in range(rounds):
        code = nearest(x, centres)
        hits = torch.bincount(code, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, code, x)
        centres = torch.where(hits > 0, sums / hits.clamp(min=1), centres)
    return centres


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    return torch.addmm(centres.square().sum(-1) / -2, x, centres.T).argmax(-1)


def move(codebook: Codebook, x: Tensor, code: Tensor, decay: float) -> None:
    """Running count and sum of the vectors (N, D) that fell to each entry."""
    hits = torch.bincount(code, minlength=len(codebook.usage)).to(x.dtype)
    sums = torch.zeros_like(codebook.sum).index_add_(0, code, x)
    codebook.usage.lerp_(hits, 1 - decay)
    codebook.sum.lerp_(sums, 1 - decay)


def replace(codebook: Codebook, x: Tensor, expire: float, generator: torch.Generator) -> None:
    """Vectors of the batch take the place of entries that are hardly used, and get the mean use."""
    mean = codebook.usage.mean()
    gone = codebook.usage < expire * mean
    picked = x[chosen(len(x), len(gone), generator, x)]
    codebook.usage.copy_(torch.where(gone, mean, codebook.usage))
    codebook.sum.copy_(torch.where(gone[:, None], picked * mean, codebook.sum))


def chosen(of: int, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(of, (count,), generator=generator, device=like.device)


def perplexity(codebook: Codebook) -> Tensor:
    """How many entries are in use, as the exponent of the entropy of their running counts."""
    share = codebook.usage / codebook.usage.sum()
    return torch.special.entr(share).sum().exp()


def use(codebook: Codebook, expire: float) -> Tensor:
    """The share of entries that are used at least `expire` times the mean."""
    return (codebook.usage >= expire * codebook.usage.mean()).float().mean()


# --------------------------------------------------------------------------- weights
def add_weight_norm(model: Mimi) -> None:
    """Splits the weights of the SEANet's convolutions, those that train, into a length and a direction each."""
    for part in normed(model):
        if part.weight.requires_grad:
            weight_norm(part, dim=AXIS[type(part)])


def folded(model: Mimi) -> Mimi:
    """A copy with plain weights, whether the model's are split or not, in evaluation mode."""
    state = {name: value for name, value in model.state_dict().items() if ".parametrizations." not in name}
    parts = {id(part) for part in normed(model)}
    state |= {f"{name}.weight": part.weight.detach() for name, part in model.named_modules() if id(part) in parts}
    made = Mimi(model.spec).to(model.downsample.weight)
    made.load_state_dict(state)
    return made.eval().requires_grad_(False)


def normed(model: Mimi) -> list[nn.Module]:
    chains = (model.encoder, model.decoder)
    return [part for chain in chains for part in chain.modules() if isinstance(part, tuple(AXIS))]
