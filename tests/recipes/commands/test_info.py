"""What `mm info` says, against published counts and the reference libraries."""

import json

import pytest
import torch

from mm import TextDecoder
from mm.encoders import CLIP
from mm.encoders.vision.families import FAMILIES
from mm.recipes.cli import main
from mm.recipes.commands.info import count_flops, count_parameters, describe, flops
from mm.recipes.weights import stories260k
from mm.tokenizer.tokenizer import clip_tokenizer


def made(**vision):
    """A CLIP from an open_clip config, without memory."""
    config = {"embed_dim": 512,
              "vision_cfg": {"layers": 12, "width": 768, "patch_size": 32, "image_size": 224, **vision},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}}
    with torch.device("meta"):
        return CLIP(FAMILIES.by_layout("clip", "open_clip")[0].to_spec({"model_cfg": config}, "test"))


@pytest.mark.parametrize(("patch", "image_gflop"), [(32, 8.82), (16, 35.13)])
def test_flops_equal_the_published_ones(patch, image_gflop):
    """open_clip's model profile: ViT-B-32 8.82 and 5.96, ViT-B-16 35.13 and 5.96 GFLOP per picture and text."""
    found = count_flops(made(patch_size=patch))
    assert found["image"] / 1e9 == pytest.approx(image_gflop, abs=0.01)
    assert found["text"] / 1e9 == pytest.approx(5.96, abs=0.01)


def test_parameters_equal_the_published_ones():
    counts = count_parameters(made())
    image = 512 * 768 + counts["image layers"] + counts["image embeddings"]
    text = 512 * 512 + counts["text layers"] + counts["text embeddings"]
    assert (image, text, sum(counts.values())) == (87_849_216, 63_428_096, 151_277_313)
    assert counts["projections"] == 512 * 768 + 512 * 512 and counts["scale and bias"] == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = {"embed_dim": 16,
              "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
              "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
    folder = tmp_path_factory.mktemp("info")
    family = FAMILIES.by_layout("clip", "open_clip")[0]
    model = CLIP(family.to_spec({"model_cfg": config}, "test"), tokenizer=clip_tokenizer())
    model.save_pretrained(folder / "model", layout="open_clip")
    model.tokenizer = None
    model.to(torch.bfloat16).save_pretrained(folder / "bare")
    return folder


def test_a_report_for_a_machine(saved, capsys):
    assert main(["info", str(saved / "model"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["layout"], report["dtype"]) == ("CLIP", "open_clip", "float32")
    total = sum(value.numel() for value in CLIP.from_pretrained(saved / "model").parameters())
    assert report["parameters"]["total"] == total and report["bytes"] == {"float32": 4 * total, "bfloat16": 2 * total}
    assert report["image"] == {"size": [32, 32], "patch": [8, 8], "tokens": 17, "layers": 1, "width": 32, "heads": 2,
                               "act": "gelu"}
    assert report["text"]["context"] == 12 and report["text"]["tokenizer"]["entries"] == 49408
    assert report["preprocessing"]["size"] == [32, 32] and report["features"] == 16


def test_a_report_for_a_person(saved, capsys):
    assert main(["info", str(saved / "model")]) == 0
    told = capsys.readouterr().out
    for part in ("open_clip layout", "image layers", " FLOP per picture", "32 x 32 pixels", "49,408 entries"):
        assert part in told
    assert main(["info", str(saved / "bare")]) == 0
    told = capsys.readouterr().out
    assert "mm layout, bfloat16" in told and "none in its files" in told


def test_what_is_no_checkpoint(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_units():
    assert [flops(n) for n in (999, 1_500_000, 8_820_000_000, 2 * 10**12)] == [
        "999 FLOP", "1.50 MFLOP", "8.82 GFLOP", "2.00 TFLOP"]


@pytest.mark.parametrize("kind", ["classifier", "audio"])
def test_vision_and_audio_transformers(kind, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "classifier":
        config = transformers.ViTConfig(**size, image_size=32, patch_size=8, num_labels=3)
        model = transformers.ViTForImageClassification(config)
    else:
        model = transformers.ASTModel(transformers.ASTConfig(**size, max_length=64, num_mel_bins=32))
    model.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "ViT in the hf layout" in told and "2 layers of width 32" in told
    assert ("3 named classes" if kind == "classifier" else "32 mel bins, 64 frames") in told
    report = describe(str(tmp_path))
    assert report["parameters"]["total"] == sum(p.numel() for p in model.parameters())


def test_a_decoder_and_its_cache(capsys):
    assert main(["info", "stories260k"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("text decoder in the hf layout", "260,032", "1,280 bytes per token", "512 entries"):
        assert part in told
    report = describe("stories260k")
    state = TextDecoder.from_pretrained(stories260k()).init_state(1)
    assert report["cache"]["at_context"] == sum(cache.k.nbytes + cache.v.nbytes for cache in state.caches)
    assert report["cache"]["per_token"] == 5 * 2 * 4 * 8 * 4  # layers, key and value, heads, width, bytes


@pytest.mark.parametrize("kind, settings", [
    ("gemma2", {"head_dim": 16, "sliding_window": 6}), ("bert", {}), ("t5", {}),
    ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1})])
def test_language_models_of_every_kind(kind, settings, tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0,
            "num_attention_heads": 4, "max_position_embeddings": 64}
    if kind == "t5":
        size = {"vocab_size": 97, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
    auto = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}
    model = auto.get(kind, transformers.AutoModelForCausalLM).from_config(
        transformers.AutoConfig.for_model(kind, **size, **settings))
    model.save_pretrained(tmp_path)
    report = describe(str(tmp_path))
    assert report["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert (report["vocabulary"], report["layers"], report["tokenizer"]) == (97, 2, None)
    assert ("cache" in report) == (kind != "bert") and report["windows"] == (kind == "gemma2")
    idle = 2 * 3 * 3 * 32 * 48 if kind == "mixtral" else 0  # layers, experts, matrices
    assert report.get("active", report["parameters"]["total"]) == report["parameters"]["total"] - idle
    assert main(["info", str(tmp_path)]) == 0
