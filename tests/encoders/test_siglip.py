"""SigLIP and SigLIP 2 in both directions with transformers: towers, native aspect, preprocessing and text cleaning."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import close, redraw

from mm.encoders import CLIP
from mm.encoders.vision.flex import FlexPreprocess, flex_batch
from mm.errors import InputError
from mm.tokenizer.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 16, "projection_size": 64}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}


def build(kind):
    if kind == "siglip":
        config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION | {"image_size": 32})
        return transformers.SiglipModel(config)
    config = transformers.Siglip2Config(text_config=TEXT, vision_config=VISION | {"num_patches": 16})
    return transformers.Siglip2Model(config)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            folder, model = tmp_path_factory.mktemp("theirs"), redraw(build(kind))
            model.save_pretrained(folder)
            made[kind] = model, folder, CLIP.from_pretrained(folder)
        return made[kind]
    return make


def pooled(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (40, 24)])
def test_siglip_towers(size, theirs):
    reference, _, ours = theirs("siglip")
    x, ids = torch.randn(2, 3, *size), torch.randint(2, 500, (3, 16))
    ids[1, 5:] = 1
    with torch.no_grad():
        close(ours.encode_image(x), pooled(reference.get_image_features(x, interpolate_pos_encoding=True)))
        close(ours.encode_text(ids), pooled(reference.get_text_features(ids)))
        out = reference(input_ids=ids, pixel_values=x, interpolate_pos_encoding=True)
        image, text = (torch.nn.functional.normalize(y, dim=-1) for y in ours(x, ids))
        close(text @ image.T * ours.logit_scale.exp() + ours.logit_bias, out.logits_per_text)


def test_siglip2_pictures_at_their_own_aspects(theirs):
    reference, _, ours = theirs("siglip2")
    pictures = [torch.randn(3, h, w) for h, w in ((32, 32), (24, 40), (8, 16))]
    flex = flex_batch(pictures, ours.spec.image.patches, 20)
    mask, shapes = flex.real.long(), torch.tensor(flex.sizes)
    with torch.no_grad():
        theirs_features = reference.get_image_features(flex.patches, mask, shapes)
        close(ours.encode_image(flex), pooled(theirs_features))
        for picture, features in zip(pictures, ours.encode_image(flex), strict=True):
            close(ours.encode_image(picture[None])[0], features)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_what_we_write_opens_there(kind, theirs, tmp_path):
    reference, _, ours = theirs(kind)
    ours.save_pretrained(tmp_path, layout="hf")
    again = type(reference).from_pretrained(tmp_path)
    for (name, mine), (other, value) in zip(again.state_dict().items(), reference.state_dict().items(), strict=True):
        assert name == other and torch.equal(mine, value)
    assert CLIP.from_pretrained(tmp_path).spec == ours.spec
    ours.save_pretrained(tmp_path / "mm")
    assert CLIP.from_pretrained(tmp_path / "mm").preprocessing == ours.preprocessing


def test_it_starts_as_the_paper_says_where_transformers_starts_at_zero():
    made = CLIP(spec_of("siglip"))
    assert made.logit_bias.item() == -10 and made.logit_scale.exp().item() == pytest.approx(10)
    assert build("siglip").logit_bias.item() == 0


def spec_of(kind):
    from mm.encoders.vision.families.hf_siglip import to_spec

    return to_spec(json.loads(json.dumps(build(kind).config.to_dict())), "test")


@pytest.mark.parametrize("height, width", [(50, 71), (300, 20), (8, 2000), (16, 16), (640, 480)])
def test_native_sizes_equal_the_references(height, width):
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    made = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=64)(picture, return_tensors="pt")
    ours = FlexPreprocess(patch=8, tokens=64).batch([picture])
    assert ours.sizes == tuple(map(tuple, made.spatial_shapes.tolist()))
    close(ours.patches, made.pixel_values)


def test_a_list_of_pictures_of_all_shapes(theirs, tmp_path):
    """From files to cosines through a directory that transformers wrote."""
    reference, folder, _ = theirs("siglip2")
    words(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    ours = CLIP.from_pretrained(tmp_path)
    pictures = [np.zeros((30, 50, 3), np.uint8), np.full((200, 12), 200, np.uint8)]
    scores = ours.similarity(pictures, ["a cat", "Two dogs!"])
    assert scores.shape == (2, 2) and torch.isfinite(scores).all()
    assert ours.tokenize("a cat").shape == (1, 16)


def words(folder):
    """A small sentencepiece model and transformers' tokenizer over it."""
    import sentencepiece

    text = ["a photo of a cat", "two dogs and a bird", "the quick brown fox jumps over the lazy dog", "it is 3 o clock"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text * 20), model_writer=model, vocab_size=60,
                                             model_type="unigram", pad_id=-1, eos_id=1, unk_id=2, bos_id=-1,
                                             hard_vocab_limit=False, minloglevel=2)
    (folder / "spiece.model").write_bytes(model.getvalue())
    reference = transformers.SiglipTokenizer(str(folder / "spiece.model"), pad_token="</s>", eos_token="</s>",
                                             unk_token="<unk>", model_max_length=16)
    reference.save_pretrained(folder)
    return reference


@pytest.mark.parametrize("text", ["a photo of a cat", "Two DOGS, and a bird!", "it's  3 o'clock", "", "a_cat"])
def test_words_are_cleaned_and_padded_as_the_files_say(text, tmp_path):
    reference, ours = words(tmp_path), load_tokenizer(tmp_path)
    expected = reference([text], padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours([text], 16), expected)


@pytest.mark.parametrize(("part", "changes", "sentence"), [
    ("vision_config", {"num_patches": 15}, "num_patches should be a square number"),
    ("vision_config", {"vision_use_head": False}, "without its head"),
    ("text_config", {"hidden_act": "mish"}, "hidden_act should be one of"),
    ("text_config", {"surprise": 1}, "surprise=1"), ("vision_config", {"num_attention_heads": 5}, "over 5 heads")])
def test_configs_that_do_not_fit(part, changes, sentence, theirs, tmp_path):
    folder = theirs("siglip2")[1]
    config = json.loads((folder / "config.json").read_text())
    config[part] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=sentence):
        CLIP.from_pretrained(tmp_path)


def test_preprocessing_of_either_kind_as_its_processor_says(theirs, tmp_path):
    """transformers 5 nests an image processor in processor_config.json; without any file SigLIP's own rule holds."""
    flex = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=20, image_mean=[0.4, 0.5, 0.6]).to_dict()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": flex}))
    found = FlexPreprocess.from_files(tmp_path, 8)
    assert found == FlexPreprocess(patch=8, tokens=20, mean=(0.4, 0.5, 0.6))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found.to_hf()))
    assert transformers.Siglip2ImageProcessor.from_pretrained(tmp_path).max_num_patches == 20
    assert FlexPreprocess.from_files(tmp_path, 8) == found
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(flex | {"do_normalize": False}))
    with pytest.raises(InputError, match="preprocessor_config.json: do_normalize = False is not known"):
        FlexPreprocess.from_files(tmp_path, 8)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 71, 3), dtype=np.uint8))
    plain = transformers.models.siglip.image_processing_pil_siglip.SiglipImageProcessorPil(
        size={"height": 32, "width": 32})(picture, return_tensors="pt").pixel_values[0]
    close(theirs("siglip")[2].preprocess(picture), plain)


@pytest.mark.parametrize(("model", "kind", "lowered"), [
    ("siglip2", "Siglip2Tokenizer", True), ("siglip2", "GemmaTokenizer", True), ("siglip", "GemmaTokenizerFast", True),
    ("gemma", "GemmaTokenizer", False)])
def test_words_of_siglip2_are_lower_cased_whatever_class_is_named(model, kind, lowered, tmp_path):
    """Published directories name Gemma's tokenizer, which keeps the case that SigLIP 2 never saw."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "A": 6, "!": 7, "\u2581": 8}
    transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": kind}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    ids = load_tokenizer(tmp_path)(["A a!"], 8)[0].tolist()
    assert ids[:4] == [5 if lowered else 6, 8, 5, 7] and ids[-2:] == [0, 0]
