"""What timm's directories share: a `config.json` that names an architecture and its arguments. What those mean is read
off the module that timm makes of them, without memory for its weights. Follows timm 1.0.31."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm.checkpoint.family import Extras
from mm.checkpoint.tables import Table
from mm.errors import InputError

from ...spec import ViTSpec
from .common import Family, ensure_kept

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")


def blueprint(config: Mapping[str, Any], where: str) -> nn.Module:
    """timm's module for a config, on the meta device. Raises InputError when timm cannot make it."""
    try:
        return built(json.dumps(config, sort_keys=True))
    except Exception as error:  # whatever a constructor raises at arguments of the wrong kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: timm cannot make {config.get('architecture')!r} from these arguments ({reason})"
                         ) from None


@lru_cache(maxsize=8)
def built(config: str) -> nn.Module:
    import timm
    from timm.models._hub import _parse_model_cfg

    pretrained, architecture, args = _parse_model_cfg(json.loads(config), {})
    with torch.device("meta"):
        return timm.create_model(architecture, pretrained=False, pretrained_cfg=pretrained, **args).eval()


def timm_family(kind: Callable[[], type], to_spec: Callable[[nn.Module, str], Any],
                to_model: Callable[[Any], tuple[str, dict[str, Any]]],
                table: Callable[[Any, Iterable[str]], Table]) -> Family:
    """The family of one of timm's classes: `kind()` is the class, `to_spec(module, where)` reads a spec off a module,
    `to_model(spec)` gives an architecture and the arguments that replace everything about it."""
    def accepts(config: Mapping[str, Any]) -> bool:
        return "architecture" in config and "model_type" not in config and isinstance(
            blueprint(config, "config.json"), kind())

    def from_spec(spec: Any) -> dict[str, Any]:
        if not isinstance(spec, ViTSpec):
            raise InputError(f"the timm layout holds a ViT, not a {type(spec).__name__}")
        architecture, args = to_model(spec)
        model = blueprint(bare(architecture, args), f"the {architecture} of timm")
        ensure_kept(spec, to_spec(model, "the timm layout"), "timm")
        return config_of(model, architecture, args)

    def rules(spec: Any, names: Iterable[str]) -> Table:
        """Names in a file or, when one is to be written, those of timm's module."""
        names = tuple(names) or tuple(blueprint(bare(*to_model(spec)), "timm").state_dict())
        return table(spec, names)

    return Family(layout="timm", config=CONFIG, weights=FILES, accepts=accepts, from_spec=from_spec, table=rules,
                  to_spec=lambda config, where: to_spec(blueprint(config, where), where), files=files, labels=labels)


def bare(architecture: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The least that timm needs to make a module."""
    return {"architecture": architecture, "model_args": dict(args),
            "pretrained_cfg": {"num_classes": args.get("num_classes", 0)}}


def config_of(model: nn.Module, architecture: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """What timm writes about such a model, but for the preprocessing."""
    own = copy.deepcopy({name: model.pretrained_cfg.get(name) for name in ("first_conv", "classifier")})
    size = args.get("img_size") or (224, 224)
    cfg = {"num_classes": model.num_classes, "input_size": [args.get("in_chans", 3), *size], "custom_load": False,
           "fixed_input_size": False, **{k: v for k, v in own.items() if v is not None}}
    return {"architecture": architecture, "num_classes": model.num_classes, "num_features": model.num_features,
            "global_pool": args.get("global_pool", ""), "model_args": dict(args), "pretrained_cfg": cfg}


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    cfg = dict(config["pretrained_cfg"])
    if extras.preprocess is not None:
        cfg |= extras.preprocess.to_timm()
    if extras.labels:
        cfg["label_names"] = list(extras.labels)
    return {Path(CONFIG).name: config | {"pretrained_cfg": cfg}}


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A model without a classifier may still tell what the one that was taken off it knew."""
    if config.get("num_classes") == 0:
        return ()
    names = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names") or ()
    return tuple(str(name) for name in names)
