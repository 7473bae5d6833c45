"""Checkpoints of transformers: a `Kind` is one class of it, as the list of its config's fields and the table of its
weights; activations, keys without an effect, heads and rotary settings are shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from typing import Any

from mm.checkpoint.family import Family, Keys, ensure_kept
from mm.checkpoint.fields import Entry, Pieces, Values, gather, named, pair, spell
from mm.checkpoint.tables import Table, WeightTransform, rules_of
from mm.errors import InputError
from mm.spec import DynamicNTK, LinearScaling, Llama3Scaling, LongRope, Rope, Yarn

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu2"}
TO_HF = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
         "relu2": "relu2"}
# Keys that no forward pass of these models reads: bookkeeping, initialisation, generation, training.
HARMLESS = frozenset("""
    _name_or_path _commit_hash _attn_implementation_autoset architectures model_type transformers_version torch_dtype
    dtype auto_map initializer_range initializer_factor bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id use_cache return_dict output_hidden_states output_attentions torchscript pruned_heads
    is_encoder_decoder is_decoder add_cross_attention tie_encoder_decoder gradient_checkpointing pretraining_tp
    max_length min_length do_sample early_stopping num_beams temperature top_k top_p typical_p repetition_penalty
    length_penalty id2label label2id num_labels tokenizer_class problem_type task_specific_params
    chunk_size_feed_forward cross_attention_hidden_size use_bfloat16 tf_legacy_loss finetuning_task prefix
""".split())  # noqa: SIM905
ROTARY_BUFFER = "a buffer that old files carry; rotations are computed from positions"
TIED = "a copy of the token embeddings, to which the head is tied"


def act(key: str = "hidden_act", place: str = "mlp.act", default: Any = ...) -> Entry:
    """The field of an activation."""
    return named(key, place, ACTS, TO_HF, default)


def rope_of(keys: Keys, context: int, theta: float = 10000.0, *, head_dim: int | None = None,
            original: int | None = None, parameters: Mapping[str, Any] | None = None) -> Rope:
    """Rotary settings from `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` before; `parameters`
    are those of one kind of layer. head_dim: for a kind that may rotate a part of it; original: the context before
    scaling, where that stands outside. Raises InputError."""
    number = (int, float)
    base, old = keys.take("rope_theta", number, theta), keys.take("rope_scaling", dict, None)
    share = keys.take("partial_rotary_factor", number, 1.0)
    given = parameters or keys.take("rope_parameters", dict, None) or old or {}
    usual = {"rope_theta": base, "partial_rotary_factor": share, "original_max_position_embeddings": original}
    keyed = Keys(usual | {name: value for name, value in given.items() if value is not None},
                 f"{keys.where}: rope_parameters")
    theta, share = float(keyed.take("rope_theta", number)), keyed.take("partial_rotary_factor", number)
    kind = keyed.take("rope_type", str, None) or keyed.take("type", str, "default")
    keyed.left.pop("type", None)
    if share != 1 and head_dim is None:
        raise InputError(f"{keyed.where}: a partial_rotary_factor of {share} is not supported for this kind of model")
    scaling = scaling_of(kind, keyed, context)
    keyed.done(("attention_factor",))
    return Rope(theta=theta, scaling=scaling, dim=None if share == 1 else int(head_dim * share))


def scaling_of(kind: str, keyed: Keys, context: int) -> Any:
    number = (int, float)
    original = keyed.take("original_max_position_embeddings", int, context)
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=float(keyed.take("factor", number)))
        case "dynamic":
            return DynamicNTK(factor=float(keyed.take("factor", number)), original=original)
        case "llama3":
            return Llama3Scaling(factor=float(keyed.take("factor", number)), original=original,
                                 low=float(keyed.take("low_freq_factor", number)),
                                 high=float(keyed.take("high_freq_factor", number)))
        case "yarn":
            gain = keyed.take("attention_factor", number, None)
            return Yarn(factor=float(keyed.take("factor", number)), original=original,
                        beta_fast=float(keyed.take("beta_fast", number, 32.0)),
                        beta_slow=float(keyed.take("beta_slow", number, 1.0)),
                        mscale=float(keyed.take("mscale", number, 0.0)),
                        mscale_all=float(keyed.take("mscale_all_dim", number, 0.0)),
                        truncate=keyed.take("truncate", bool, True), gain=None if gain is None else float(gain))
        case "longrope" | "su":
            factor = keyed.take("factor", number, None) or context / original
            gain = keyed.take("attention_factor", number, None)
            return LongRope(original=original, factor=float(factor), gain=None if gain is None else float(gain),
                            short=tuple(map(float, keyed.take("short_factor", list))),
                            long=tuple(map(float, keyed.take("long_factor", list))))
    raise InputError(f"{keyed.where}: the rope_type {kind!r} is not known")


def rope_config(rope: Rope, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of transformers 5."""
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
    if rope.dim not in (None, head_dim):
        out["partial_rotary_factor"] = rope.dim / head_dim
    match rope.scaling:
        case LinearScaling(factor=factor):
            out |= {"rope_type": "linear", "factor": factor}
        case DynamicNTK(factor=factor, original=original):
            out |= {"rope_type": "dynamic", "factor": factor, "original_max_position_embeddings": original}
        case Llama3Scaling() as s:
            out |= {"rope_type": "llama3", "factor": s.factor, "original_max_position_embeddings": s.original,
                    "low_freq_factor": s.low, "high_freq_factor": s.high}
        case Yarn() as s:
            out |= {"rope_type": "yarn", "factor": s.factor, "original_max_position_embeddings": s.original,
                    "beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
            out |= {"mscale": s.mscale} if s.mscale else {}
            out |= {"mscale_all_dim": s.mscale_all} if s.mscale_all else {}
            out |= {} if s.gain is None else {"attention_factor": s.gain}
        case LongRope() as s:
            out |= {"rope_type": "longrope", "factor": s.factor, "original_max_position_embeddings": s.original,
                    "short_factor": list(s.short), "long_factor": list(s.long)}
            out |= {} if s.gain is None else {"attention_factor": s.gain}
    return out


def rope(theta: float = 10000.0, **changes: Any) -> Entry:
    """The field of a mixer's rotary positions; `changes` are arguments of `rope_of`, each a function of (keys, values).
    """
    def read(keys: Keys, values: Values) -> dict[str, Any]:
        return {"mixer.rope": rope_of(keys, values["spec.context"], theta,
                                      **{name: make(keys, values) for name, make in changes.items()})}

    def write(pieces: Pieces) -> dict[str, Any]:
        if pieces.at("mixer.rope") is None:
            raise InputError("the hf layout of this kind has layers of attention with rope")
        return {"rope_parameters": rope_config(pieces.mixer.rope, pieces.mixer.head_dim)}
    return pair("rope_parameters", read, write)


def equal_heads(key: str = "num_attention_heads", width: str = "hidden_size") -> Entry:
    """The field of heads that share the width, with keys of their own. Raises InputError where they cannot."""
    def read(keys: Keys, v: Values) -> dict[str, Any]:
        heads, dim = keys.positive(key), v["stack.dim"]
        if dim % heads:
            raise InputError(f"{keys.where}: {width} {dim} cannot be split over {heads} heads")
        return {"mixer.heads": heads, "mixer.kv_heads": heads, "mixer.head_dim": dim // heads}
    return pair(key, read, lambda pieces: {key: pieces.at("mixer.heads")})


# ------------------------------------------------------------------------------------- a class of transformers
@dataclass(frozen=True, kw_only=True)
class Kind:
    """One class of transformers, by the `model_type` of its configs and its `name`: the fields of a config, `defaults`
    of keys that files leave out; rows of the table of weights (or what gives them for a model) with the `transforms`
    that they name; `ignored` weights as in a `Table`. What is built from a config's values is up to each sort of
    model."""

    model_type: str
    name: str
    fields: Sequence[Entry]
    weights: Mapping[str, str] | Callable[[Any], Mapping[str, str]]
    transforms: Callable[[Any], Mapping[str, WeightTransform]] = lambda spec: {}
    defaults: Mapping[str, Any] = default(default_factory=dict)
    ignored: Mapping[str, str] = default(default_factory=dict)

    def build(self, v: Values) -> Any:
        """Returns the spec that the values of a config describe."""
        raise NotImplementedError

    def pieces(self, spec: Any) -> Pieces:
        """Returns the pieces of a spec that the fields are written from. Raises InputError for a model that the class
        does not know."""
        raise NotImplementedError

    def to_spec(self, config: Mapping[str, Any], where: str) -> Any:
        """Raises InputError that names keys which are absent, wrong, or not understood."""
        keys = Keys({**self.defaults, **config}, where)
        spec = self.build(gather(self.fields, keys))
        keys.done(HARMLESS)
        return spec

    def from_spec(self, spec: Any) -> dict[str, Any]:
        """Raises InputError for a model that the class cannot hold."""
        config = {"architectures": [self.name], "model_type": self.model_type} | spell(self.fields, self.pieces(spec))
        self.check(spec, self.to_spec(config, "config"))
        return config

    def check(self, spec: Any, read_back: Any) -> None:
        """Raises InputError where the config that was written does not mean the same model."""
        ensure_kept(spec, read_back, f"hf ({self.model_type})")

    def experts(self, spec: Any) -> int:
        """Returns how many experts the rows of a table stand for."""
        return 0

    def table(self, spec: Any, names: Iterable[str] = ()) -> Table:
        rows = self.weights(spec) if callable(self.weights) else self.weights
        return Table(rules_of(rows, self.transforms(spec), self.experts(spec)), self.ignored)

    def family(self, **more: Any) -> Family:
        """As a layout on disk; `more` are fields of the family."""
        return Family(**{"layout": "hf", "weights": FILES, "has_text": True, "model_types": (self.model_type,),
                         "to_spec": self.to_spec, "from_spec": self.from_spec, "table": self.table} | more)


def below(names: Sequence[str], prefix: str) -> Callable[[str], str]:
    """Returns how names under a prefix are called in a file with these names, whose class may be the model alone.
    Tables that are written have the prefix."""
    under = not names or any(name.startswith(prefix) for name in names)
    return lambda name: name if under else name.removeprefix(prefix)
