"""What the families share: reading a config key by key, plain encoder stacks, and comparing specs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from mm.errors import InputError
from mm.spec import EVERYWHERE, Attention, Layer, LayerNorm, Mlp, Sight, Stack
from mm.tables import Table
from mm.tokenizer import Tokenizer

from ..image import Preprocess
from ..spec import ArgmaxPool, CLIPSpec, EosPool, TextSpec, TokenPool, ViTSpec

TRAINING_ONLY = {"dropout", "drop_path", "patch_dropout", "logit_scale", "shift", "stretch", "rescale"}
OTHER_SIZES_ONLY = {"mode", "antialias"}


@dataclass(frozen=True)
class Extras:
    """What a model's directory holds beside weights and config; None or empty where there is none."""

    preprocess: Any = None
    tokenizer: Tokenizer | None = None
    labels: tuple[str, ...] = ()


def pictures(folder: Path, spec: CLIPSpec | ViTSpec) -> Preprocess:
    """The preprocessing of pictures that a directory describes."""
    return Preprocess.from_files(folder, (spec.image if isinstance(spec, ViTSpec) else spec.image.image))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One layout on disk. `config` is its file and `recognise` says whether its content is of this family; `weights`
    are file names, best first; `to_spec(config, where)` and `from_spec(spec)` translate; `table(spec, names)` maps
    weights, where names are those in the file; `files(config, extras)` are the JSON files that go beside the weights,
    the config last; `preprocess(folder, spec)` and `labels(config)` read what `files` wrote."""

    layout: str
    config: str
    weights: tuple[str, ...]
    recognise: Callable[[Mapping[str, Any]], bool]
    to_spec: Callable[[Mapping[str, Any], str], Any]
    from_spec: Callable[[Any], dict[str, Any]]
    table: Callable[[Any, Iterable[str]], Table]
    files: Callable[[dict[str, Any], Extras], dict[str, dict[str, Any]]]
    preprocess: Callable[[Path, Any], Any] = pictures
    labels: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda config: ()
    has_text: bool = False


class Keys:
    """A config whose keys are taken one by one, so that none is passed over in silence."""

    def __init__(self, data: Any, where: str):
        if not isinstance(data, Mapping):
            raise InputError(f"{where} should be a JSON object, not {data!r}")
        self.left, self.where = dict(data), where

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of one key. Raises InputError when it is absent without a default, or of another type."""
        value = self.left.pop(name, None)
        if value is None:
            if default is ...:
                raise InputError(f"{self.where} has no {name}")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InputError(f"{self.where}: {name} should be {' or '.join(k.__name__ for k in kinds)}, not {value!r}")
        return value

    def positive(self, name: str, default: Any = ...) -> int:
        value = self.take(name, int, default)
        if value < 1:
            raise InputError(f"{self.where}: {name} should be positive, not {value}")
        return value

    def pair(self, name: str, default: Any = ...) -> tuple[int, int]:
        """(height, width) from two numbers or one."""
        value = self.take(name, (int, list, tuple), default)
        pair = (value, value) if isinstance(value, int) else tuple(value)
        if len(pair) != 2 or not all(isinstance(size, int) and size > 0 for size in pair):
            raise InputError(f"{self.where}: {name} should be one or two positive numbers, not {value!r}")
        return pair

    def done(self, harmless: Iterable[str] = ()) -> None:
        """Raises InputError for keys nobody took, unless they are known to be harmless or switched off."""
        left = {name: value for name, value in self.left.items() if value and name not in set(harmless)}
        if left:
            told = ", ".join(f"{name}={value!r}" for name, value in left.items())
            raise InputError(f"{self.where} asks for something that is not supported: {told}")


def encoder(*, dim: int, depth: int, heads: int, hidden: int, act: str, norm: LayerNorm, sight: Sight = EVERYWHERE,
            final_norm: bool = True, layer_scale: float | None = None, dropout: float = 0.0) -> Stack:
    """A pre-norm stack of equal layers with biases everywhere."""
    mixer = Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, sight=sight, dropout=dropout)
    layer = Layer(mixer=mixer, mlp=Mlp(hidden=hidden, act=act), norm=norm, layer_scale=layer_scale)
    return Stack(dim=dim, layers=(layer,) * depth, final_norm=norm if final_norm else None)


def a_vit(spec: CLIPSpec, layout: str) -> ViTSpec:
    """The image tower of CLIP's own kind. Raises InputError for another."""
    if not isinstance(spec.image, ViTSpec):
        raise InputError(f"the {layout} layout of CLIP's own ViT cannot hold timm's {spec.image.name}")
    if spec.image.head.proj is None:
        raise InputError(f"the {layout} layout of CLIP's own ViT projects the image features, and this model does not")
    return spec.image


def ensure_kept(settings: Any, read_back: Any, layout: str) -> None:
    """Raises InputError that names the first thing a layout would lose: what it wrote must read back as the same model.
    How it trains and how its positions are interpolated are not part of a model's identity."""
    lost = difference(essence(settings), essence(read_back))
    if lost:
        raise InputError(f"the {layout} layout cannot hold this model: {lost}")


def essence(value: Any) -> Any:
    """A spec as plain data without what `ensure_kept` overlooks; a final norm before a pool of one token counts as
    after it."""
    if isinstance(value, tuple):
        return [essence(item) for item in value]
    if not is_dataclass(value):
        return value
    names = [field.name for field in fields(value) if field.name not in TRAINING_ONLY | OTHER_SIZES_ONLY]
    data = {"is": type(value).__name__, **{name: essence(getattr(value, name)) for name in names}}
    if isinstance(value, ViTSpec) and value.positions and not value.cls + value.registers:
        data["positions"].pop("prefix")  # there is none to have a position
    if isinstance(value, ViTSpec | TextSpec) and isinstance(value.head.pool, TokenPool | ArgmaxPool | EosPool):
        data["head"]["norm"] = data["head"]["norm"] or data["stack"].pop("final_norm")
    return data


def difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """Where two pieces of spec data first differ, in words."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.get("is") == theirs.get("is"):
        names = [*ours, *(name for name in theirs if name not in ours)]
        found = (difference(ours.get(n), theirs.get(n), f"{path}.{n}" if path else n) for n in names)
        return next(filter(None, found), None)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next(filter(None, (difference(a, b, f"{path}[{i}]") for i, (a, b) in pairs)), None)
    return None if ours == theirs else f"{path} is {short(ours)}, where it has {short(theirs)}"


def short(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{key}={short(item)}" for key, item in value.items() if key != "is")
        return f"{value.get('is', '')}({inner})"
    return str(value)
