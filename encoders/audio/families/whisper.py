"""Whisper on disk: this package's layout, transformers' WhisperForConditionalGeneration, OpenAI's `.pt`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mm.checkpoint.family import Extras, Families, Family, Keys, Opened, ensure_kept, own_family
from mm.checkpoint.hf import ACTS, CONFIG, FILES, HARMLESS, TO_HF
from mm.checkpoint.tables import Rule, Table, rule
from mm.errors import InputError
from mm.spec import CAUSAL, EVERYWHERE, Attention, DecoderSpec, Embed, Layer, LayerNorm, LearnedTable, Mlp, Stack
from mm.text.families.layers import NAMES as BART_NAMES
from mm.text.families.layers import layer_rules

from ..spec import WhisperSpec
from ..spectrogram import LogMel
from .openai_whisper import read_openai

PREPROCESS = "preprocessor_config.json"
# SpecAugment, timestamps of words and classification heads: nothing that a forward pass of this model reads.
UNREAD = HARMLESS | set("""apply_spec_augment mask_time_prob mask_time_length mask_time_min_masks mask_feature_prob
    mask_feature_length mask_feature_min_masks median_filter_width use_weighted_layer_sum classifier_proj_size
    num_hidden_layers init_std dropout attention_dropout activation_dropout encoder_layerdrop decoder_layerdrop
    suppress_tokens begin_suppress_tokens forced_decoder_ids max_length tie_word_embeddings
    alignment_heads lang_to_id task_to_id""".split())  # noqa: SIM905


def spec_of(*, mels: int, frames: int, dim: int, context: int, vocab: int, encoder: tuple[int, int, int],
            decoder: tuple[int, int, int], act: str = "gelu") -> WhisperSpec:
    """encoder, decoder: (layers, heads, width of the MLP)."""
    def layer(heads: int, hidden: int, *, text: bool) -> Layer:
        if dim % heads:
            raise InputError(f"{heads} heads do not divide a width of {dim}")
        one = {"heads": heads, "kv_heads": heads, "head_dim": dim // heads, "k_bias": False}
        return Layer(mixer=Attention(**one, window=CAUSAL if text else EVERYWHERE), mlp=Mlp(hidden=hidden, act=act),
                     cross=Attention(**one) if text else None)

    def stack(depth: int, heads: int, hidden: int, *, text: bool) -> Stack:
        return Stack(dim=dim, layers=(layer(heads, hidden, text=text),) * depth, final_norm=LayerNorm())
    text = DecoderSpec(embed=Embed(vocab=vocab, positions=LearnedTable(rows=context)),
                       stack=stack(*decoder, text=True), context=context)
    return WhisperSpec(mels=mels, frames=frames, encoder=stack(*encoder, text=False), decoder=text)


# ------------------------------------------------------------------------------------- transformers' config
def to_spec(config: Mapping[str, Any], where: str) -> WhisperSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    act = keys.take("activation_function", str, "gelu")
    if act not in ACTS or keys.take("scale_embedding", bool, False):
        raise InputError(f"{where}: activation_function {act!r} or scale_embedding is not Whisper's")
    sizes = [(keys.positive(f"{side}_layers"), keys.positive(f"{side}_attention_heads"),
              keys.positive(f"{side}_ffn_dim")) for side in ("encoder", "decoder")]
    spec = spec_of(mels=keys.positive("num_mel_bins"), frames=keys.positive("max_source_positions"),
                   dim=keys.positive("d_model"), context=keys.positive("max_target_positions"),
                   vocab=keys.positive("vocab_size"), encoder=sizes[0], decoder=sizes[1], act=ACTS[act])
    keys.done(UNREAD)
    return spec


def from_spec(spec: WhisperSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    sides = {"encoder": spec.encoder, "decoder": spec.decoder.stack}
    if not all(stack.layers and isinstance(stack.layers[0].mlp, Mlp) for stack in sides.values()):
        raise InputError("the hf layout of Whisper has layers of attention with one MLP on both sides")
    sizes = {}
    for side, stack in sides.items():
        sizes |= {f"{side}_layers": len(stack.layers), f"{side}_attention_heads": stack.layers[0].mixer.heads,
                  f"{side}_ffn_dim": stack.layers[0].mlp.hidden}
    vocab = spec.decoder.embed.vocab
    end = min(vocab - 1, 50256 if vocab < 51865 else 50257)
    config = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "vocab_size": vocab,
              "num_mel_bins": spec.mels, "d_model": spec.encoder.dim, "max_source_positions": spec.frames,
              "max_target_positions": spec.decoder.context, **sizes, "num_hidden_layers": len(spec.encoder.layers),
              "activation_function": TO_HF[spec.encoder.layers[0].mlp.act], "is_encoder_decoder": True,
              "pad_token_id": end, "bos_token_id": end, "eos_token_id": end,
              "decoder_start_token_id": min(vocab - 1, end + 1), "tie_word_embeddings": True}
    ensure_kept(spec, to_spec(config, "config"), "hf (whisper)")
    return config


# ------------------------------------------------------------------------------------- weights
def table(spec: WhisperSpec, names: Iterable[str]) -> Table:
    return names_of("hf", spec)


def names_of(layout: str, spec: WhisperSpec) -> Table:
    """Names of transformers (hf) or OpenAI beside ours."""
    n = NAMES[layout]
    rules: list[Rule] = [rule(f"{n['encoder']}{conv}.{{x}}", f"encoder.{conv}.{{x}}") for conv in ("conv1", "conv2")]
    rules += [rule(n["encoder"] + n["audio_positions"], "encoder.positions"),
              rule(n["encoder"] + n["audio_norm"] + ".{x}", "encoder.stack.final_norm.{x}"),
              rule(n["decoder"] + n["tokens"] + ".weight", "decoder.embed.tokens.weight"),
              rule(n["decoder"] + n["text_positions"], "decoder.embed.positions.weight"),
              rule(n["decoder"] + n["text_norm"] + ".{x}", "decoder.stack.final_norm.{x}")]
    for side, stack in (("encoder", spec.encoder), ("decoder", spec.decoder.stack)):
        rules += layer_rules(f"{n[side]}{n['blocks']}.{{n}}.", f"{side}.stack.blocks.{{n}}.", n, stack.layers[0])
    return Table(tuple(rules), {"proj_out.weight": "a copy of the token embeddings, to which the head is tied"})


NAMES = {
    "hf": {**BART_NAMES, "encoder": "model.encoder.", "decoder": "model.decoder.", "tokens": "embed_tokens",
           "audio_positions": "embed_positions.weight", "text_positions": "embed_positions.weight",
           "audio_norm": "layer_norm", "text_norm": "layer_norm"},
    "openai": {"encoder": "encoder.", "decoder": "decoder.", "blocks": "blocks", "tokens": "token_embedding",
               "audio_positions": "positional_embedding", "text_positions": "positional_embedding",
               "audio_norm": "ln_post", "text_norm": "ln", "self": "attn", "cross": "cross_attn",
               "q": "query", "k": "key", "v": "value", "out": "out", "mixer_norm": "attn_ln",
               "cross_norm": "cross_attn_ln", "mlp_norm": "mlp_ln", "mlp.up": "mlp.0", "mlp.down": "mlp.2"},
}


# ------------------------------------------------------------------------------------- families
def read_file(path: Path) -> Opened:
    """OpenAI's file of a model. Raises InputError."""
    return read_openai(path, spec_of, names_of)


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    beside = {PREPROCESS: extras.preprocess.to_hf()} if extras.preprocess else {}
    return {**beside, CONFIG: config}


def preprocess(folder: Path, spec: WhisperSpec) -> LogMel:
    return LogMel.from_files(folder, spec.mels)


OWN = own_family("whisper", WhisperSpec, has_text=True, preprocess=preprocess, files=files)
HF = Family(layout="hf", config=CONFIG, weights=FILES, has_text=True, preprocess=preprocess, files=files, table=table,
            model_types=("whisper",), to_spec=to_spec, from_spec=from_spec)
FAMILIES = Families({"whisper": "Whisper"}, {"whisper": (OWN, HF)}, ("model*.safetensors", "pytorch_model*.bin"),
                    {("whisper", ".pt"): "mm.encoders.audio.families.whisper:read_file"})
