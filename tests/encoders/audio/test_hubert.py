"""HuBERT against transformers' with re-drawn weights, in both directions and both shapes that are published."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import close

from mm.encoders.audio.hubert import Hubert
from mm.errors import InputError

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "conv_dim": [8, 12, 16], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_feat_extract_layers": 3,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
KINDS = {"base": {}, "large": {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}}


def theirs(kind: str, name: str = "HubertModel"):
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.HubertConfig(**SIZES, **KINDS[kind], vocab_size=20)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim < 2 else (parameter.numel() / len(parameter)) ** -0.5)
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_transformers_both_ways(kind, tmp_path):
    import transformers

    model, wave = theirs(kind), torch.randn(2, 1600) * 0.3
    model.save_pretrained(tmp_path / "theirs")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=kind == "large").save_pretrained(tmp_path / "theirs")
    ours = Hubert.from_pretrained(tmp_path / "theirs")
    heard = wave
    if kind == "large":
        heard = (wave - wave.mean(1, keepdim=True)) / (wave.var(1, keepdim=True, correction=0) + 1e-7).sqrt()
    wanted = model(heard).last_hidden_state
    assert wanted.shape == (2, 79, 32)
    close(ours(wave), wanted, 1e-5)
    ours.save_pretrained(tmp_path / "back", "hf")
    close(transformers.HubertModel.from_pretrained(tmp_path / "back").eval()(heard).last_hidden_state, wanted, 1e-5)
    ours.save_pretrained(tmp_path / "own")
    close(Hubert.from_pretrained(tmp_path / "own")(wave), wanted, 1e-5)
    assert Hubert.from_pretrained(tmp_path / "own").preprocessing.normalise == (kind == "large")


@torch.no_grad()
def test_a_model_below_a_head_and_older_names_are_read(tmp_path):
    model, wave = theirs("base", "HubertForCTC"), torch.randn(1, 900)
    model.save_pretrained(tmp_path)
    wanted = model.hubert(wave).last_hidden_state
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    close(Hubert.from_pretrained(tmp_path)(wave), wanted, 1e-5)
    state = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"): value for name, value in state.items()}
    assert any(name.endswith("weight_g") for name in renamed)
    save_file(renamed, tmp_path / "model.safetensors")
    close(Hubert.from_pretrained(tmp_path)(wave), wanted, 1e-5)


def test_what_is_no_hubert_is_refused(tmp_path):
    theirs("base").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model = Hubert.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"waves should be \(B, L\), L at least 30"):
        model(torch.zeros(1, 29))
    for change, says in (({"hidden_act": "relu"}, "are not HuBERT's"), ({"surprise": 1}, "surprise"),
                         ({"conv_kernel": [1]}, "equally many")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=says):
            Hubert.from_pretrained(tmp_path)
