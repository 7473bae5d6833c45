"""What transformers' encoders of pictures share: the fields of their configs, the heads of their architectures, labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mm.checkpoint.family import Extras, Family, Keys
from mm.checkpoint.fields import Entry, Pieces, Values, always, field, gather, named, pair, spell
from mm.checkpoint.files import CONFIG
from mm.checkpoint.hf import ACTS, HARMLESS, TO_HF, Kind, equal_heads
from mm.checkpoint.tables import Table, WeightTransform, fused, rules_of
from mm.errors import InputError
from mm.spec import Attention, Layer, LayerNorm, Mlp, Norm, Stack

from ...spec import Head, Patches, Pool, Projection, ViTSpec
from .common import PRETRAINING_ONLY, TRANSFORMS, ensure_kept, pictures

PREPROCESSOR = "preprocessor_config.json"
ACTIVATIONS = {"quick_gelu": "quick_gelu", **ACTS}
UNREAD = HARMLESS | {"encoder_stride", "out_features", "out_indices", "stage_names", "reshape_hidden_states",
                     "apply_layernorm", "use_mask_token", "pooler_output_size"}


# ------------------------------------------------------------------------------------- fields
def square(key: str, place: str, default: Any = ...) -> Entry:
    """The side of a picture or patch in pixels; a config may give (height, width). Written where both are equal."""
    def write(pieces: Pieces) -> dict[str, int]:
        height, width = pieces.at(place)
        if height != width and place == "patches.size":
            raise InputError(f"the hf layout holds square patches, not {height} x {width}")
        return {key: height}
    return pair(key, lambda keys, values: {place: keys.pair(key, default)}, write)


def tower(eps: float | Any = ..., dropout: str = "attention_probs_dropout_prob", **defaults: Any) -> tuple[Entry, ...]:
    """The fields of equal pre-norm layers. `eps` and `defaults` are values of keys that files leave out, `dropout` is
    the key of attention's."""
    def default(key: str) -> Any:
        return defaults.get(key, ...)
    return (field("hidden_size", "stack.dim", default=default("hidden_size")),
            field("num_hidden_layers", "stack.depth", default=default("num_hidden_layers")),
            equal_heads(), named("hidden_act", "mlp.act", ACTIVATIONS, TO_HF, default("hidden_act")),
            field("layer_norm_eps", "norm.eps", kind=float, default=eps),
            field(dropout, "mixer.dropout", kind=float, default=0.0), always(norm__is=LayerNorm))


HIDDEN = field("intermediate_size", "mlp.hidden", default=3072)
QKV_BIAS = field("qkv_bias", "mixer.q_bias", "mixer.k_bias", "mixer.v_bias", kind=bool, default=True)
DROPOUT = field("hidden_dropout_prob", "layer.dropout", kind=float, default=0.0)
PICTURE = (square("image_size", "vit.image", 224), field("num_channels", "patches.channels", default=3))


def pieces_of(stack: Stack, **more: Any) -> Pieces:
    """The pieces of a stack of equal layers. Raises InputError for layers of other kinds."""
    layer = next(iter(stack.layers), None)
    if layer is None or not (isinstance(layer.mlp, Mlp) and isinstance(layer.mixer, Attention)
                             and isinstance(layer.norm, LayerNorm)):
        raise InputError("the hf layout holds layers of attention and MLP with LayerNorm")
    return Pieces(stack=SimpleNamespace(dim=stack.dim, depth=len(stack.layers)), layer=layer, mixer=layer.mixer,
                  mlp=layer.mlp, norm=layer.norm, **more)


# ------------------------------------------------------------------------------------- heads
@dataclass(frozen=True)
class HeadKind:
    """How an architecture ends: `make(dim, classes, norm)` and the rows of its weights; `trained` where it has classes.
    """

    make: Callable[[int, int, Norm], Head]
    weights: Mapping[str, str]
    trained: bool = False


def classifier(pool: Pool) -> HeadKind:
    """A linear layer with a name for each class."""
    return HeadKind(lambda dim, classes, norm: Head(pool=pool, proj=Projection(dim=classes, bias=True)),
                    {"classifier.{x}": "head.proj.{x}"}, True)


def architecture(keys: Keys, kind: VisionKind) -> str:
    """The class that a config names, or the first of its kind. Raises InputError for one that is not known."""
    name = (keys.take("architectures", list, None) or [next(iter(kind.heads))])[0]
    if name not in kind.heads:
        raise InputError(f"{keys.where}: the architecture {name} is not known, only {', '.join(kind.heads)}")
    return name


def class_count(config: Mapping[str, Any]) -> int:
    """The number of classes of a classifier: transformers leaves the names out where there are two."""
    return len(config.get("id2label") or {}) or int(config.get("num_labels") or 2)


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes, by number."""
    names = config.get("id2label") or {}
    return tuple(str(names[i]) for i in sorted(names, key=int)) if all(str(i).isdigit() for i in names) else ()


def label_config(names: tuple[str, ...], classes: int) -> dict[str, Any]:
    """`id2label` and back, with numbered names where there are none."""
    names = names or tuple(f"LABEL_{i}" for i in range(classes))
    if len(names) != classes:
        raise InputError(f"the model has {classes} classes and {len(names)} labels")
    return {"id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)}}


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    """The config with the names of the classes, and the preprocessing beside it."""
    if "id2label" in config and extras.labels:
        config = config | label_config(extras.labels, len(config["id2label"]))
    beside = {PREPROCESSOR: extras.preprocess.to_hf()} if extras.preprocess else {}
    return {**beside, CONFIG: config}


# ------------------------------------------------------------------------------------- a kind of encoder
@dataclass(frozen=True, kw_only=True)
class VisionKind(Kind):
    """A `model_type` of transformers whose classes are a ViT. `heads` are by the name of the class; `under` begins the
    names of weights below a head."""

    name: str = ""
    under: str
    heads: Mapping[str, HeadKind]

    def to_spec(self, config: Mapping[str, Any], where: str) -> ViTSpec:
        keys = Keys({**self.defaults, **config}, where)
        head, v = self.heads[architecture(keys, self)], gather(self.fields, keys)
        v["head"] = head.make(v["stack.dim"], class_count(config), v.make("norm"))
        keys.done(UNREAD)
        return vit_of(v)

    def pieces(self, spec: ViTSpec) -> Pieces:
        return pieces_of(spec.stack, vit=spec, patches=spec.patches, spec=spec)

    def architecture(self, spec: ViTSpec) -> str:
        """The class whose head a model has. Raises InputError where none has it."""
        classes, norm = spec.head.proj.dim if spec.head.proj else 0, spec.stack.layers[0].norm
        for name, head in self.heads.items():
            made = head.make(spec.stack.dim, max(classes, 1), norm)
            if (made.pool, made.proj) == (spec.head.pool, spec.head.proj):
                return name
        raise InputError(f"the hf layout of {self.model_type} has no head like {spec.head}")

    def from_spec(self, spec: ViTSpec) -> dict[str, Any]:
        if not isinstance(spec, ViTSpec):
            raise InputError(f"the hf layout of {self.model_type} holds a ViT, not a {type(spec).__name__}")
        pieces, name = self.pieces(spec), self.architecture(spec)
        config = {"architectures": [name], "model_type": self.model_type} | spell(self.fields, pieces)
        config |= label_config((), spec.head.proj.dim) if self.heads[name].trained else {}
        ensure_kept(spec, self.to_spec(config, CONFIG), "hf")
        return config

    def table(self, spec: ViTSpec, names: Iterable[str] = ()) -> Table:
        name = self.architecture(spec)
        under = "" if name.endswith("Model") else self.under
        rows = self.weights(spec) if callable(self.weights) else self.weights
        rows = {under + theirs: ours for theirs, ours in rows.items()} | dict(self.heads[name].weights)
        transforms: dict[str, WeightTransform] = {"qkv": fused(*[spec.stack.dim] * 3), **TRANSFORMS}
        return Table(rules_of(rows, transforms | dict(self.transforms(spec))),
                     {under + "embeddings.mask_token": PRETRAINING_ONLY})

    def family(self, **more: Any) -> Family:
        return super().family(**{"has_text": False, "files": files, "labels": labels, "preprocess": pictures} | more)


def stack_of(v: Values, **more: Any) -> Stack:
    """The equal layers that the values of a config describe; `more` are fields of the stack."""
    layer = Layer(mixer=v.make("mixer"), mlp=v.make("mlp"), norm=v.make("norm"), **v.fields("layer"))
    return Stack(**{"dim": v["stack.dim"], "layers": (layer,) * v["stack.depth"], "final_norm": v.make("norm")} | more)


def vit_of(v: Values) -> ViTSpec:
    """The ViT that the values of a config describe."""
    return ViTSpec(stack=stack_of(v), patches=Patches(**v.fields("patches")), head=v["head"], **v.fields("vit"))
