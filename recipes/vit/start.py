"""The model that the training of a classifier starts from: a new one, or a checkpoint with a head for the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mm.errors import InputError
from mm.spec import LayerNorm, drop_path_ramp
from mm.spec.schema import require

from ...encoders import spec
from ...encoders.vision.families.common import encoder
from ...encoders.vision.flex import FlexPreprocess
from ...encoders.vision.image import Preprocess
from ...encoders.vision.preprocess_files import IMAGENET_MEAN, IMAGENET_STD
from ...encoders.vision.vit import ViT
from .settings import VitJob, VitShape

NEW_SIZE = 224


def opened(job: VitJob) -> ViT | None:
    """The checkpoint to go on from, in float32. Raises InputError."""
    return ViT.from_pretrained(job.model, dtype=torch.float32) if job.model else None


def kept_classes(job: VitJob, vit: ViT | None) -> tuple[str, ...] | None:
    """The classes of a model whose head may stay, in its order; None where there will be a new one."""
    is_classifier = vit is not None and vit.spec.head.proj is not None and vit.spec.head.proj.bias
    if not is_classifier or job.head == "new":
        return None
    if not vit.labels:
        raise InputError(f"{job.model} is a classifier of {vit.spec.head.proj.dim} classes without names, which cannot "
                         "be matched with those of the data: --head new replaces its head")
    return vit.labels


def check_classes(job: VitJob, kept: Sequence[str] | None, found: Sequence[str]) -> None:
    """Raises InputError unless a head that stays has the classes of the data."""
    if kept is None or set(kept) == set(found):
        return
    missing = sorted(set(found) - set(kept)) or sorted(set(kept) - set(found))
    side = "the data has" if set(found) - set(kept) else "the model has"
    raise InputError(f"{job.model} knows {len(kept)} classes and the data has {len(set(found))}, of which "
                     f"{missing[0]!r} is one that only {side}: --head new replaces its head")


def starting_model(job: VitJob, vit: ViT | None, classes: Sequence[str], keep: bool) -> ViT:
    """`vit` or a new model of the shape with the same weights for the same seed, with a classifier of these classes:
    its own, where it may `keep` it, or a new one that starts at 0. Raises InputError."""
    torch.manual_seed(job.trainer.seed)
    size = job.data.size or (NEW_SIZE if vit is None else None)
    if vit is None:
        vit = ViT(new_spec(job.shape, size, len(classes)))
        vit.preprocessing = Preprocess(size=(size, size), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    settings = with_drop_path(vit.spec, job.drop_path)
    if not keep:
        head = replace(settings.head, proj=spec.Projection(dim=len(classes), bias=True))
        settings = replace(settings, head=head)
    require(size is None or not any(size % side for side in settings.patches.size),
            f"data.size {size} is not a multiple of the patch, {settings.patches.size[0]}: edges would not be seen")
    made = ViT(settings)
    state = {name: value for name, value in vit.state_dict().items() if keep or not name.startswith("head.proj.")}
    made.load_state_dict(state, strict=keep)
    if not keep:
        torch.nn.init.zeros_(made.head.proj.weight)
    made.preprocessing = sized(vit, size)
    made.labels = tuple(classes)
    return made.train()


def sized(vit: ViT, size: int | None) -> Preprocess:
    """A model's preprocessing, for pictures of another side if one is given. One of pictures at their own aspect is
    trained, and read from then on, at one size."""
    wanted = vit.preprocessing or Preprocess(size=vit.spec.image)
    if isinstance(wanted, FlexPreprocess):
        wanted = Preprocess(size=vit.spec.image, resize="squash", interpolation=wanted.interpolation, mean=wanted.mean,
                            std=wanted.std)
    require(isinstance(wanted, Preprocess), "the model reads no pictures of one size, which a classifier trains on")
    if size is None or wanted.size == (size, size):
        return wanted
    require(not isinstance(vit.spec.head.pool, spec.FlattenPool),
            f"the model serves pictures of {vit.spec.image[0]} x {vit.spec.image[1]} pixels only: leave out data.size")
    return replace(wanted, size=(size, size), edge=None)


def new_spec(shape: VitShape, size: int, classes: int) -> spec.ViTSpec:
    """The layout of timm's vit_*, which timm and transformers can read."""
    require(shape.width % shape.heads == 0, f"a width of {shape.width} cannot be split over {shape.heads} heads")
    norm, mean = LayerNorm(eps=1e-6), shape.pool == "mean"
    stack = encoder(dim=shape.width, depth=shape.depth, heads=shape.heads, hidden=int(shape.width * shape.mlp),
                    act="gelu", norm=norm, final_norm=not mean, layer_scale=shape.layer_scale)
    head = spec.Head(pool=spec.MeanPool() if mean else spec.TokenPool(), norm=norm if mean else None,
                     proj=spec.Projection(dim=classes, bias=True))
    patches = spec.Patches(size=(shape.patch, shape.patch), bias=True)
    return spec.ViTSpec(image=(size, size), patches=patches, stack=stack, head=head)


def with_drop_path(settings: spec.ViTSpec, rate: float) -> spec.ViTSpec:
    ramp = drop_path_ramp(rate, len(settings.stack.layers))
    layers = tuple(replace(layer, drop_path=r) for layer, r in zip(settings.stack.layers, ramp, strict=True))
    return replace(settings, stack=replace(settings.stack, layers=layers))
