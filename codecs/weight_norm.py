"""Weight normalisation (Salimans & Kingma, 2016) of a codec's convolutions while they train."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from .conv import Conv, ConvTranspose
from .mimi import Mimi

AXIS = {Conv: 0, ConvTranspose: 2}  # that each length belongs to: an output's, an input's, as torch's own layers do


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
