"""CLIP's byte pairs against open_clip and transformers, files in every form, and what goes wrong with them."""

import json
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.errors import InputError
from mm.tokenizer.bpe import BOS, EOS
from mm.tokenizer.tokenizer import CLEANERS, Tokenizer, clip_tokenizer, load_tokenizer, train_bpe

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

HARD = ["", " ", "a photo of a dog", "Don't SHOUT!! it's 3.14 o'clock", "naïve café — “quotes” ‘ﬁne’",
        "日本語のテキスト 漢字", "👩‍👩‍👧‍👦 family 🏳️‍🌈 1️⃣ ✨", "&amp;lt;b&amp;gt; &eacute;&#39;s",
        "<start_of_text> a <end_of_text>", "tab\tnew\nline\r\n", "İstanbul ǅ ß ſ 'ſ", "\u0345a", "a\u088fb ①²",
        "â€œmojibakeâ€\x9d", "\x00\x1b[31mred", "x" * 500, "ｆｕｌｌ　ｗｉｄｔｈ"]
TEXTS = st.one_of(st.text(max_size=60), st.text(alphabet=st.characters(max_codepoint=0x2FF), max_size=60),
                  st.lists(st.sampled_from(HARD), max_size=4).map(" ".join))
EMOJI = ["grinning face", "smiling cat with heart-eyes", "flag: France", "red apple", "green apple", "cat face",
         "dog face"]


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_clip_ids_equal_open_clip(text):
    reference = open_clip.tokenizer._tokenizer
    assert clip_tokenizer().encode(text) == reference.encode(text)
    assert torch.equal(clip_tokenizer()(text, 77), reference(text, 77))
    assert torch.equal(clip_tokenizer()(text, 9), reference(text, 9))


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_equal_open_clip(text):
    reference = open_clip.tokenizer._tokenizer
    ids = clip_tokenizer().encode(text)
    assert ids == reference.encode(text)
    if "_of_text>" not in text:
        assert clip_tokenizer().decode(ids) == reference.decode(ids).strip()


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_cleaning_equals_open_clip(clean, text):
    assert CLEANERS[clean](text) == open_clip.tokenizer.get_clean_fn(clean)(text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def hf_saved(saved, tmp_path_factory):
    """What transformers itself writes, from the vocabulary alone."""
    folder = tmp_path_factory.mktemp("hf")
    merges = [tuple(line.split()) for line in (saved / "merges.txt").read_text().split("\n")[1:] if line]
    vocabulary = json.loads((saved / "vocab.json").read_text())
    transformers.CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    return folder


def test_saved_files_open_in_transformers_with_equal_ids(saved):
    reference = transformers.CLIPTokenizer.from_pretrained(saved)
    auto = transformers.AutoTokenizer.from_pretrained(saved)
    for text in ["a photo of a dog", "Don't SHOUT!! it's 3.14", "日本語 🐶", ""]:
        assert reference(text)["input_ids"] == auto(text)["input_ids"] == clip_tokenizer()(text, 30)[0].tolist()[
            : len(clip_tokenizer().encode(text)) + 2]


def test_saved_files_come_back_whole(saved):
    again = load_tokenizer(saved)
    texts = ["“curly” &amp; more", "naïve", "plain"]
    assert torch.equal(again(texts, 20), clip_tokenizer()(texts, 20))
    assert again.to_open_clip() == clip_tokenizer().to_open_clip() == {}


@settings(max_examples=100, deadline=None)
@given(text=TEXTS.filter(lambda text: "_of_text>" not in text))
def test_transformers_files_equal_clip_tokenizer(hf_saved, text):
    reference, ours = _hf(hf_saved)
    expected = reference(text, padding="max_length", truncation=True, max_length=16)["input_ids"]
    assert ours(text, 16)[0].tolist() == expected
    assert ours.pad_id == reference.pad_token_id and ours.vocab_size == len(reference) == 49408


_CACHE = {}


def _hf(folder):
    if folder not in _CACHE:
        _CACHE[folder] = transformers.CLIPTokenizer.from_pretrained(folder), load_tokenizer(folder)
    return _CACHE[folder]


def test_vocabulary_and_merges_alone(hf_saved, tmp_path):
    clip_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}))
    assert torch.equal(load_tokenizer(tmp_path)(HARD, 40), load_tokenizer(hf_saved)(HARD, 40))


def test_gpt2_files_equal_transformers(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(EMOJI * 3, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}))
    ours, reference = load_tokenizer(tmp_path), transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in [" Grinning  faces", "naïve 🐶", "a<|endoftext|>b"]:
        assert ours.encode(text) == reference(text)["input_ids"]
    assert ours.prefix == ours.suffix == () and ours.decode(ours.encode(" Grinning  faces")) == " Grinning  faces"


def test_rows_keep_start_and_end():
    tokenizer = clip_tokenizer()
    assert tokenizer("", 5).tolist() == [[49406, 49407, 0, 0, 0]]
    cut = tokenizer(["one two three four five six"], 4)
    assert cut.shape == (1, 4) and cut[0, 0] == 49406 and cut[0, -1] == 49407 and cut.dtype == torch.int64
    assert tokenizer([], 7).shape == (0, 7)
    assert tokenizer.too_long(["one two three", "a", ""], 4) == 1
    with pytest.raises(InputError, match="1 of 2 texts do not fit a context of 4 tokens.*one two"):
        tokenizer(["a", "one two three"], 4, strict=True)
    with pytest.raises(InputError, match="context of 1"):
        tokenizer("a", 1)


def test_decode_drops_padding_but_not_text():
    tokenizer = clip_tokenizer()
    assert tokenizer.decode(tokenizer("wow!!", 12)[0]) == "wow !!"
    assert tokenizer.decode(tokenizer.encode("a !")) == "a !"
    with pytest.raises(InputError, match="vocabulary has 49408"):
        tokenizer.decode([49408])


def test_wrong_texts_are_named():
    with pytest.raises(InputError, match="expected a string, got int"):
        clip_tokenizer()(["a", 3], 8)
    with pytest.raises(InputError, match="surrogate"):
        Tokenizer(pieces=clip_tokenizer().pieces).encode("a\ud800")
    with pytest.raises(InputError, match="clean is 'upper'"):
        Tokenizer(pieces=clip_tokenizer().pieces, clean="upper")


def test_a_tokenizer_travels_to_another_process():
    for tokenizer in (clip_tokenizer(), train_bpe(EMOJI, 600)):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert torch.equal(again(EMOJI, 12), tokenizer(EMOJI, 12))


def test_the_word_cache_is_bounded(monkeypatch):
    monkeypatch.setattr("mm.tokenizer.bpe.CACHED_WORDS", 8)
    tokenizer = train_bpe(EMOJI, 600)
    words = [f"w{chr(97 + i)}" for i in range(20)]
    assert [tokenizer.encode(word) for word in words] == [tokenizer.encode(word) for word in words]
    assert len(tokenizer.pieces._known) <= 9


# --- training

def test_training_is_deterministic_and_reads_back(tmp_path):
    first, shuffled = train_bpe(EMOJI, 560), train_bpe(random.Random(0).sample(EMOJI, len(EMOJI)), 560)
    assert first.pieces.merges == shuffled.pieces.merges and first.vocab_size <= 560
    assert first.bos_id == first.vocab_size - 2 and first.eos_id == first.pad_id == first.vocab_size - 1
    assert len(first.encode("Grinning FACE")) < len("grinningface")
    assert first.decode(first.encode("Unseen 🦖 words")) == "unseen 🦖 words"
    first.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert torch.equal(again(EMOJI + HARD, 20), first(EMOJI + HARD, 20)) and again.clean == "lower"


def test_a_trained_tokenizer_opens_in_the_reference_libraries(tmp_path):
    trained = train_bpe(EMOJI, 560)
    trained.save(tmp_path)
    texts = [text for text in EMOJI + HARD if "_of_text>" not in text]
    text_cfg = {"context_length": 20, "vocab_size": trained.vocab_size, **trained.to_open_clip()}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text_cfg}}))
    reference = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    assert torch.equal(trained(EMOJI, 20), reference(EMOJI))
    assert torch.equal(load_tokenizer(tmp_path)(texts, 20), trained(texts, 20))
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert hf("red apple")["input_ids"] == trained("red apple", 4)[0].tolist()[: len(trained.encode("red apple")) + 2]


def test_training_says_what_it_lacks():
    with pytest.raises(InputError, match="need 514"):
        train_bpe(EMOJI, 100)
    with pytest.raises(InputError, match="no word"):
        train_bpe(["", "1 2"], 600)


# --- other files

@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    from sentencepiece import SentencePieceTrainer

    prefix = tmp_path_factory.mktemp("spm") / "spiece"
    SentencePieceTrainer.train(sentence_iterator=iter(EMOJI * 5), model_prefix=str(prefix), vocab_size=30, pad_id=0,
                               eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1)
    return prefix.with_suffix(".model")


def test_sentencepiece_models(spm, tmp_path):
    from sentencepiece import SentencePieceProcessor

    bare = load_tokenizer(spm.parent)
    reference = SentencePieceProcessor(model_file=str(spm))
    for text in EMOJI:
        assert bare.encode(text) == reference.encode(text) and bare.decode(bare.encode(text)) == text
    assert bare.prefix == bare.suffix == () and (bare.eos_id, bare.bos_id, bare.pad_id) == (1, None, 0)
    (spm.parent / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "extra_ids": 0}))
    t5, theirs = load_tokenizer(spm.parent), transformers.T5Tokenizer.from_pretrained(spm.parent)
    (spm.parent / "tokenizer_config.json").unlink()
    for text in [*EMOJI, "Red zebra!", "  two  spaces"]:
        expected = theirs(text, padding="max_length", truncation=True, max_length=12)["input_ids"]
        assert t5(text, 12)[0].tolist() == expected
    assert t5("red apple", 12)[0].tolist() == (reference.encode("red apple") + [1] + [0] * 12)[:12]
    t5.save(tmp_path)
    assert torch.equal(load_tokenizer(tmp_path)(EMOJI, 12), t5(EMOJI, 12))
    assert pickle.loads(pickle.dumps(t5)).encode("cat face") == t5.encode("cat face")


def test_an_unknown_sentencepiece_class_is_named(spm, tmp_path):
    (tmp_path / "spiece.model").write_bytes(spm.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "OddTokenizer"}')
    with pytest.raises(InputError, match="OddTokenizer"):
        load_tokenizer(tmp_path)


def test_the_configuration_overrules_what_surrounds_a_text(hf_saved, tmp_path):
    for file in hf_saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False, "add_eos_token": True}))
    assert load_tokenizer(tmp_path)("a", 3)[0].tolist() == [320, 49407, 49407]


def test_open_clip_directories(tmp_path):
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": {"text_cfg": {"context_length": 77, "vocab_size": 49408}}}))
    assert load_tokenizer(tmp_path) is clip_tokenizer()
    config.write_text(json.dumps({"model_cfg": {"text_cfg": {"vocab_size": 512}}}))
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(("name", "content"), [
    ("tokenizer.json", b"{"), ("tokenizer.json", b"{}"), ("tokenizer.json", b'{"model": {"type": "BPE"}}'),
    ("tokenizer.json", b"\xff\xfe"), ("spiece.model", b"\x0a\xff\xff"), ("tokenizer.model", b""),
    ("tokenizer_config.json", b"[]"), ("tokenizer_config.json", b"{"), ("special_tokens_map.json", b"nope"),
    ("open_clip_config.json", b"{"), ("open_clip_config.json", b"3")])
def test_broken_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("merges", ["x y", "a", "a b c", "a b"])
def test_merges_that_contradict_the_vocabulary(tmp_path, merges):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "b</w>": 2, BOS: 3, EOS: 4}))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    with pytest.raises(InputError, match=r"merges\.txt"):
        load_tokenizer(tmp_path)


def test_a_truncated_sentencepiece_model(spm, tmp_path):
    (tmp_path / "spiece.model").write_bytes(spm.read_bytes()[:200])
    with pytest.raises(InputError, match=r"spiece\.model"):
        load_tokenizer(tmp_path)


def test_an_empty_directory(tmp_path):
    assert load_tokenizer(tmp_path) is None
