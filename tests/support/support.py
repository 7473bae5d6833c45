"""Shared by the tests: re-drawn weights, weights carried over from reference libraries, small stacks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mm.nn.transformer import Transformer
from mm.spec import Attention, Layer, Mlp, Stack

Parts = str | tuple[str, ...]


def redraw(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Every parameter random: matrices by their width, norms, biases, scales and sinks with `std`. Default values hide
    wrong activations."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
    return module.eval()


def carry(ours: nn.Module, theirs: Mapping[str, Tensor], table: Mapping[str, Parts], ignored: tuple = ()) -> None:
    """Load `ours` from the tensors of a reference, strict on both sides but for the prefixes in `ignored`.

    `table` maps our names to theirs; `{}` stands for a layer's number, a tuple for the parts of a fused projection. A
    name is a module (its weight and bias follow) or a tensor.
    """
    state, left = {}, {name for name in theirs if not name.startswith(ignored)}
    for layer in range(len(getattr(ours, "blocks", [None]))):
        for name, parts in table.items():
            for kind in ("", ".weight", ".bias"):
                names = [part.format(layer) + kind for part in ([parts] if isinstance(parts, str) else parts)]
                found = [other for other in names if other in theirs]
                if found:
                    state[name.format(layer) + kind] = torch.cat([theirs[other] for other in found])
                    left -= set(found)
    assert not left, f"not carried over: {sorted(left)}"
    ours.load_state_dict(state)
    ours.eval()


def attention(**changes) -> Attention:
    return Attention(**{"heads": 4, "kv_heads": 2, "head_dim": 8, **changes})


def stack(*mixers: Attention, dim: int = 32, relative=None, final_norm=None, **layer) -> Stack:
    """One layer with a small MLP per mixer."""
    layers = tuple(Layer(**{"mixer": mixer, "mlp": Mlp(hidden=48), **layer}) for mixer in mixers)
    return Stack(dim=dim, layers=layers, relative=relative, final_norm=final_norm)


def model(settings: Stack, dtype: torch.dtype = torch.float32) -> Transformer:
    return redraw(Transformer(settings)).to(dtype)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
