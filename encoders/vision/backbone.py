"""Any of timm's models as a CLIP's image tower, laid out as open_clip lays it out."""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mm.errors import InputError

from .. import spec
from .flex import Flex


class Backbone(nn.Module):
    """pixels (B, C, h, w) -> features (B, E). Sizes other than the spec's are served where timm's model serves them."""

    def __init__(self, settings: spec.Backbone):
        super().__init__()
        self.spec = settings
        with torch.device("cpu") if torch.get_default_device().type == "meta" else torch.get_default_device():
            self.trunk = make_trunk(settings)  # in real memory: what no file holds, such as index tables, must be right
        self.head = nn.Sequential(head_layers(settings, width(self.trunk)))

    @property
    def title(self) -> str:
        return f"timm's {self.spec.name}"

    def encode(self, pixels: Tensor) -> Tensor:
        """Raises InputError for pixels that timm's model cannot serve."""
        if isinstance(pixels, Flex):
            raise InputError(f"{self.spec.name} takes pixels (B, C, h, w) of one size, not pictures of several")
        if pixels.ndim != 4 or pixels.shape[1] != self.spec.channels:
            raise InputError(f"pixels should be (B, {self.spec.channels}, h, w), not of shape {tuple(pixels.shape)}")
        if not pixels.is_floating_point():
            raise InputError(f"pixels should be floating-point and normalised, not {pixels.dtype}")
        try:
            y = self.trunk(pixels)
        except (AssertionError, RuntimeError) as error:
            if tuple(pixels.shape[-2:]) == tuple(self.spec.image):
                raise
            reason = " ".join(str(error).split())
            raise InputError(f"{self.spec.name} of {self.spec.image[0]} x {self.spec.image[1]} pixels cannot serve "
                             f"{pixels.shape[-2]} x {pixels.shape[-1]} ({reason})") from None
        if y.ndim != 2:
            raise InputError(f"{self.spec.name} with pool {self.spec.pool!r} gives features of shape {tuple(y.shape)}, "
                             "not one vector a picture")
        return self.head(y)

    forward = encode


def backbone_spec(name: str, dim: int, image: tuple[int, int] | None = None, pool: str = "", head: str = "linear",
                  bias: bool = False, **arguments: Any) -> spec.Backbone:
    """The spec of one of timm's models with features of width `dim`; `arguments` go to its constructor. `image` None
    is the size that timm made the model for. Raises InputError for what timm does not know."""
    given = tuple(spec.Argument(name=key, value=tuple(value) if isinstance(value, list) else value)
                  for key, value in arguments.items())
    draft = spec.Backbone(name=name, image=image or (1, 1), dim=dim, pool=pool, head=head, bias=bias, arguments=given)
    trunk = outline(draft)
    size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    own = tuple(size or trunk.pretrained_cfg.get("input_size", (3, 224, 224))[1:])
    return spec.Backbone(**{**vars(draft), "image": image or own})


@lru_cache(maxsize=8)
def outline(settings: spec.Backbone) -> nn.Module:
    """timm's model without memory for its weights. Raises InputError as `make_trunk` does."""
    with torch.device("meta"):
        return make_trunk(settings)


def make_trunk(settings: spec.Backbone) -> nn.Module:
    """timm's model, made as open_clip makes it. Raises InputError when timm cannot."""
    import timm

    given = {argument.name: argument.value for argument in settings.arguments}
    given |= {} if settings.drop_path is None else {"drop_path_rate": settings.drop_path}
    given |= {"patch_drop_rate": settings.patch_dropout} if settings.patch_dropout else {}
    try:
        if settings.head in ("own", "none"):
            classes = settings.dim if settings.head == "own" else 0
            trunk = timm.create_model(settings.name, num_classes=classes, global_pool=settings.pool, **given)
        else:
            trunk = timm.create_model(settings.name, **given)
            trunk.reset_classifier(0, **({"global_pool": settings.pool} if settings.pool else {}))
    except Exception as error:  # whatever a constructor raises at arguments of the wrong kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"timm cannot make {settings.name!r} as an image tower ({reason})") from None
    if settings.head == "none" and width(trunk) != settings.dim:
        raise InputError(f"{settings.name} has features of width {width(trunk)}, and no head makes {settings.dim} of "
                         "them")
    return trunk


def width(trunk: nn.Module) -> int:
    """Of pooled features: some models widen them once more behind their last map."""
    return getattr(trunk, "head_hidden_size", None) or trunk.num_features


def head_layers(settings: spec.Backbone, dim: int) -> OrderedDict[str, nn.Module]:
    """What stands behind timm's model, by open_clip's names."""
    if settings.head == "linear":
        return OrderedDict(drop=nn.Dropout(settings.dropout), proj=nn.Linear(dim, settings.dim, bias=settings.bias))
    if settings.head == "mlp":
        from timm.layers import Mlp

        return OrderedDict(mlp=Mlp(dim, 2 * settings.dim, settings.dim, drop=(settings.dropout, 0),
                                   bias=(True, settings.bias)))
    return OrderedDict()
