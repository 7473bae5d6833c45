"""HuBERT on disk: this package's layout and transformers' HubertModel, by itself or below a head for letters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Families, Family, Keys, ensure_kept, own_family
from mm.checkpoint.hf import ACTS, CONFIG, FILES, HARMLESS, TO_HF
from mm.checkpoint.tables import Table, WeightTransform, rule
from mm.errors import InputError
from mm.spec import Attention, Layer, LayerNorm, Mlp, Stack
from mm.text.families.layers import NAMES as BART_NAMES
from mm.text.families.layers import layer_rules

from ..spec import HubertSpec, Samples

PREPROCESS = "preprocessor_config.json"
# Masks and dropout of training, and heads for letters and classes.
UNREAD = HARMLESS | set("""activation_dropout apply_spec_augment attention_dropout classifier_proj_size
    ctc_loss_reduction ctc_zero_infinity feat_extract_dropout feat_proj_dropout final_dropout hidden_dropout
    hidden_dropout_prob attention_probs_dropout_prob layerdrop mask_channel_length mask_channel_min_space
    mask_channel_other mask_channel_prob mask_channel_selection mask_feature_length mask_feature_min_masks
    mask_feature_prob mask_time_length mask_time_min_masks mask_time_min_space mask_time_other mask_time_prob
    mask_time_selection num_feat_extract_layers tokenizer_class use_weighted_layer_sum vocab_size
    gradient_checkpointing output_hidden_size adapter_attn_dim""".split())  # noqa: SIM905
NAMES = {**BART_NAMES, "self": "attention", "mixer_norm": "layer_norm", "mlp.up": "feed_forward.intermediate_dense",
         "mlp.down": "feed_forward.output_dense"}
IGNORED = {"masked_spec_embed": "what masked steps become in training", "lm_head.{x}": "the head for letters"}


# ------------------------------------------------------------------------------------- transformers' config
def to_spec(config: Mapping[str, Any], where: str) -> HubertSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    dim, heads = keys.positive("hidden_size", 768), keys.positive("num_attention_heads", 12)
    acts = {keys.take(name, str, "gelu") for name in ("hidden_act", "feat_extract_activation")}
    if acts != {"gelu"} or keys.take("conv_pos_batch_norm", bool, False) or dim % heads:
        raise InputError(f"{where}: the activations {sorted(acts)}, conv_pos_batch_norm or {heads} heads at a width of "
                         f"{dim} are not HuBERT's")
    late = keys.take("do_stable_layer_norm", bool, False)
    norm = LayerNorm(eps=float(keys.take("layer_norm_eps", (int, float), 1e-5)))
    layer = Layer(mixer=Attention(heads=heads, kv_heads=heads, head_dim=dim // heads), norm=norm,
                  mlp=Mlp(hidden=keys.positive("intermediate_size", 3072), act=ACTS["gelu"]),
                  placement="pre" if late else "residual_post")
    stack = Stack(dim=dim, layers=(layer,) * keys.positive("num_hidden_layers", 12), final_norm=norm if late else None)
    default = HubertSpec(stack=stack)
    sizes = {ours: tuple(keys.take(theirs, (list, tuple), getattr(default, ours)))
             for ours, theirs in (("channels", "conv_dim"), ("kernels", "conv_kernel"), ("strides", "conv_stride"))}
    made = HubertSpec(**sizes, conv_bias=keys.take("conv_bias", bool, False),
                      conv_norm=keys.take("feat_extract_norm", str, "group"),
                      project_norm=keys.take("feat_proj_layer_norm", bool, True),
                      near=keys.positive("num_conv_pos_embeddings", 128),
                      groups=keys.positive("num_conv_pos_embedding_groups", 16), entry_norm=not late, stack=stack)
    keys.done(UNREAD)
    return made


def from_spec(spec: HubertSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    layers = spec.stack.layers
    if not layers or not isinstance(layers[0].mixer, Attention) or not isinstance(layers[0].mlp, Mlp):
        raise InputError("the hf layout of HuBERT has layers of attention with one MLP")
    layer = layers[0]
    config = {
        "architectures": ["HubertModel"], "model_type": "hubert", "hidden_size": spec.stack.dim,
        "num_hidden_layers": len(layers), "num_attention_heads": layer.mixer.heads,
        "intermediate_size": layer.mlp.hidden, "hidden_act": TO_HF[layer.mlp.act], "layer_norm_eps": layer.norm.eps,
        "do_stable_layer_norm": not spec.entry_norm, "conv_dim": list(spec.channels),
        "conv_kernel": list(spec.kernels), "conv_stride": list(spec.strides), "conv_bias": spec.conv_bias,
        "num_feat_extract_layers": len(spec.channels), "feat_extract_norm": spec.conv_norm,
        "feat_extract_activation": "gelu", "feat_proj_layer_norm": spec.project_norm,
        "num_conv_pos_embeddings": spec.near, "num_conv_pos_embedding_groups": spec.groups}
    ensure_kept(spec, to_spec(config, "config"), "hf (hubert)")
    return config


# ------------------------------------------------------------------------------------- weights
def length(weight: Any) -> Any:
    """The norm of the weights at each place of a kernel: (1, 1, kernel)."""
    return weight.norm(dim=(0, 1), keepdim=True)


SPLIT = WeightTransform(lambda xs: [xs[1] * (xs[0] / length(xs[1]))], lambda xs: [length(xs[0]), xs[0]])


def table(spec: HubertSpec, names: Iterable[str]) -> Table:
    """Older files say weight_g and weight_v where the convolution's weight is split into length and direction."""
    names = list(names)
    top = "hubert." if any(name.startswith("hubert.") for name in names) else ""
    older = any(name.endswith(".weight_g") for name in names)
    split = ("weight_g", "weight_v") if older else tuple(f"parametrizations.weight.original{i}" for i in range(2))
    convs, positions = f"{top}feature_extractor.conv_layers.{{n}}.", f"{top}encoder.pos_conv_embed.conv."
    rules = [rule(convs + "conv.{x}", "convs.{n}.conv.{x}"), rule(convs + "layer_norm.{x}", "convs.{n}.norm.{x}"),
             rule(f"{top}feature_projection.layer_norm.{{x}}", "project_norm.{x}"),
             rule(f"{top}feature_projection.projection.{{x}}", "project.{x}"),
             rule(tuple(positions + name for name in split), "positions.weight", SPLIT),
             rule(positions + "bias", "positions.bias"),
             rule(f"{top}encoder.layer_norm.{{x}}", ("entry_norm" if spec.entry_norm else "stack.final_norm") + ".{x}"),
             *layer_rules(f"{top}encoder.layers.{{n}}.", "stack.blocks.{n}.", NAMES, spec.stack.layers[0])]
    return Table(tuple(rules), {top + "masked_spec_embed": IGNORED["masked_spec_embed"], **IGNORED})


# ------------------------------------------------------------------------------------- families
def preprocess(folder: Path, spec: HubertSpec) -> Samples:
    path = folder / PREPROCESS
    given = checkpoint.read_json(path) if path.is_file() else {}
    try:
        return Samples(rate=given.get("sampling_rate", 16000), normalise=given.get("do_normalize", True))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    given = extras.preprocess or Samples()
    beside = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": given.rate, "feature_size": 1,
              "do_normalize": given.normalise, "padding_side": "right", "padding_value": 0.0,
              "return_attention_mask": False}
    return {PREPROCESS: beside, CONFIG: config}


OWN = own_family("hubert", HubertSpec, preprocess=preprocess, files=files)
HF = Family(layout="hf", config=CONFIG, weights=FILES, preprocess=preprocess, files=files, table=table,
            model_types=("hubert",), to_spec=to_spec, from_spec=from_spec)
FAMILIES = Families({"hubert": "HuBERT"}, {"hubert": (OWN, HF)}, ("model*.safetensors", "pytorch_model*.bin"))
