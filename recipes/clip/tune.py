"""What of a CLIP trains: locked towers (LiT, Zhai et al., 2022), their last blocks alone, or low-rank changes."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mm.errors import InputError
from mm.nn.lora import add_lora

from ...encoders.clip import CLIP
from ...encoders.spec import Backbone
from .settings import Lock, TowerLora

TOWERS = ("image", "text", "audio")


def tune(clip: CLIP, lock: Lock, lora: TowerLora | None) -> None:
    """Lock what should not train; a tower without anything to train no longer drops anything either.

    Raises InputError for a tower that the model lacks, for more blocks than a tower has, and when nothing is left.
    """
    for name in TOWERS:
        locked, adapted = getattr(lock, name), lora is not None and name in lora.towers
        tower = getattr(clip, name, None)
        if tower is None:
            if locked or adapted:
                raise InputError(f"{'lora.towers' if adapted else 'lock'} names the {name} tower: the model has none")
            continue
        if adapted and locked is not True and locked is not False:
            raise InputError(f"lora.towers locks the whole tower {name} itself: leave out lock.{name}")
        if adapted:
            add_lora(tower, lora.rank, lora.alpha, lora.layers)
        elif locked is not False:
            lock_tower(tower, name, None if locked is True else locked)
    if not any(p.requires_grad for name in TOWERS for p in parameters(clip, name)):
        raise InputError("lock leaves no tower that trains")


def parameters(clip: CLIP, name: str) -> list[nn.Parameter]:
    tower = getattr(clip, name, None)
    return [] if tower is None else list(tower.parameters())


def lock_tower(tower: nn.Module, name: str, last: int | None) -> None:
    """Lock all but the `last` blocks, final norm and head; None: the whole tower."""
    tower.requires_grad_(False)
    if last is None:
        tower.eval()
        return
    stack = getattr(tower, "stack", None)  # timm's models have none, as far as can be told
    blocks = stack.blocks if stack else ()
    if not 0 <= last <= len(blocks):
        raise InputError(f"lock.{name} should leave 0 to {len(blocks)} blocks, not {last}")
    for part in (*blocks[len(blocks) - last :], *([stack.final_norm] if stack else []), tower.head):
        part.requires_grad_(True)
    for part in tower.modules():
        if (own := list(part.parameters())) and not any(p.requires_grad for p in own):
            part.eval()


def with_patch_dropout(clip: CLIP, rate: float) -> None:
    """From now on training leaves out this share of the patches of every picture. Raises InputError for a tower of
    timm's, which is made with its rate."""
    if isinstance(clip.spec.image, Backbone):
        raise InputError(f"patch_dropout cannot be set: the image tower is timm's {clip.spec.image.name}")
    clip.spec = replace(clip.spec, image=replace(clip.spec.image, patch_dropout=rate))
    clip.image.spec = clip.spec.image
