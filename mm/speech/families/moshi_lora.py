"""Low-rank changes as Kyutai's moshi-finetune saves them, merged into the weights that they change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Keys
from mm.checkpoint.files import Weights
from mm.errors import InputError

CHANGES, MERGED = "lora.safetensors", "consolidated.safetensors"  # what moshi-finetune writes: the one or the other
DOWN, UP, FROZEN = ".lora_A.weight", ".lora_B.weight", ".frozen_W.weight"


def with_changes(folder: Path, config: Mapping[str, Any], weights: Weights) -> Weights:
    """The weights of a directory whose config says `lora`, with the changes beside them. Raises InputError."""
    opened, keys = Path(weights.where), Keys(config, str(folder / checkpoint.CONFIG))
    file = folder / keys.take("lora_name", str, CHANGES)
    if opened.name == MERGED:
        return weights
    if opened == file:
        name = keys.take("moshi_name", str, checkpoint.WEIGHTS)
        raise InputError(f"{file} holds changes of another model's weights: put those beside it as {name}, or let "
                         f"moshi_name in {folder / checkpoint.CONFIG} say where they are")
    if not file.is_file():
        raise InputError(f"{folder / checkpoint.CONFIG} says lora, but there is no {file}")
    return merged(weights, checkpoint.open_files([file], False), keys.positive("lora_rank", 128),
                  float(keys.take("lora_scaling", (int, float), 2.0)))


def merged(weights: Weights, changes: Weights, rank: int, scale: float) -> Weights:
    """A weight plus `scale` times up @ down where a layer has that pair, in float32, and tensors that the changes hold
    whole, such as embeddings, in place of the model's. Raises InputError for what does not fit."""
    pairs: dict[str, list[str]] = defaultdict(list)
    for name in sorted(changes.shapes, key=lambda name: (len(name), name)):  # numbers at their end in order
        if name.endswith(DOWN):
            pairs[target(name.removesuffix(DOWN), weights, changes.where)].append(name.removesuffix(DOWN))
    whole = {target(name.removesuffix(FROZEN).removesuffix(".weight"), weights, changes.where): name
             for name in changes.shapes if not name.endswith((DOWN, UP))}
    for name, layers in pairs.items():
        check(name, layers, weights, changes, rank)
    for name, theirs in whole.items():
        if changes.shapes[theirs] != weights.shapes[name]:
            raise InputError(f"{changes.where}: {theirs} is {changes.shapes[theirs]}, in {weights.where} it is "
                             f"{weights.shapes[name]}")

    def read(name: str) -> Tensor:
        value = changes.read(whole[name]) if name in whole else weights.read(name)
        if name not in pairs:
            return value
        change = [changes.read(layer + UP).float() @ changes.read(layer + DOWN).float() for layer in pairs[name]]
        return value.float() + scale * torch.cat(change)
    return Weights(weights.where, weights.shapes, read, weights.read(next(iter(pairs))).dtype if pairs else None)


def target(layer: str, weights: Weights, where: str) -> str:
    """The weight that a layer is, under its own name or, with further ones, joined as `in_proj_weight`."""
    place, _, number = layer.rpartition("projs.")
    joined = [place + end for end in ("proj_weight", "proj.weight")] if number.isdigit() else []
    found = [name for name in (layer + ".weight", *joined) if name in weights.shapes]
    if not found:
        raise InputError(f"{where} changes {layer}, which is not in {weights.where}")
    return found[0]


def check(name: str, layers: Iterable[str], weights: Weights, changes: Weights, rank: int) -> None:
    rows = 0
    for layer in layers:
        down, up = changes.shapes[layer + DOWN], changes.shapes.get(layer + UP)
        if up is None:
            raise InputError(f"{changes.where} holds {layer + DOWN} without {layer + UP}")
        if len(down) != 2 or len(up) != 2 or (down[0], up[1]) != (rank, rank) or down[1] != weights.shapes[name][1]:
            raise InputError(f"{changes.where}: {layer} is changed by {up} times {down}, which by a lora_rank of "
                             f"{rank} is not for a weight {weights.shapes[name]}")
        rows += up[0]
    if rows != weights.shapes[name][0]:
        raise InputError(f"{changes.where}: {rows} rows of {name} are changed, it has {weights.shapes[name][0]}")
