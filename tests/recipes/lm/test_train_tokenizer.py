"""`mm train tokenizer`: the same corpus gives the same files, which transformers opens with equal ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import InputError
from mm.recipes.cli import main
from mm.recipes.data.corpus import open_corpus
from mm.recipes.lm.tokenizer import CHAT, train_tokenizer
from mm.tokenizer.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = ["The cat sat on the mat. " * 9, "naïve café — “quotes” 日本語 👩‍👩‍👧", "  two  spaces\n\n\ttabs 1234 3.14",
         "x</s>y<s>"]
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello, cat!  "},
        {"role": "assistant", "content": "Meow: 1 2 3."}, {"role": "user", "content": "\n\nMore?"},
        {"role": "assistant", "content": "  The mat.\n"}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text, "utf-8")
    (folder / "talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    return folder


def argv(corpus):
    return ["train", "tokenizer", "--data.path", str(corpus), "--vocab", "330", "--mask", "true", "--sentinels", "5"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "tokenizer"
    assert main([*argv(corpus), "--out", str(out)]) == 0
    return out, load_tokenizer(out), transformers.AutoTokenizer.from_pretrained(out)


@given(st.one_of(st.sampled_from(TEXTS), st.text(max_size=40)))
def test_ids_equal_transformers(trained, text):
    _, ours, theirs = trained
    ids = ours.encode(text)
    assert [*ours.prefix, *ids] == theirs(text)["input_ids"]
    if "<" not in text:
        assert ours.decode(ids) == theirs.decode(ids) == text


def test_special_tokens_stand_where_transformers_finds_them(trained):
    _, ours, theirs = trained
    assert ours.vocab_size == len(theirs) == 330 and ours.prefix == (ours.bos_id,) and ours.suffix == ()
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.pieces.token_id("<mask>") == theirs.mask_token_id
    ids = [theirs.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(5)]
    assert ids == ours.encode("".join(f"<extra_id_{i}>" for i in range(5))) and len(set(ids)) == 5


def test_answers_are_the_spans_that_transformers_marks(trained):
    _, ours, theirs = trained
    marked = CHAT.replace("{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}", (
        "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"))
    row = theirs.apply_chat_template(TALK, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)
    ids, spans = ours.conversation(TALK)
    assert ids == row["input_ids"] == theirs.apply_chat_template(TALK)["input_ids"]
    learned = [i for a, b in spans for i in range(a, b)]
    assert learned == [i for i, mark in enumerate(row["assistant_masks"]) if mark] and len(spans) == 2
    assert [ids[b - 1] for _, b in spans] == [ours.eos_id] * 2
    assert ours.chat(TALK[:2]) == theirs.apply_chat_template(TALK[:2], add_generation_prompt=True)["input_ids"]


def test_training_is_the_same_in_another_process(trained, corpus, tmp_path):
    again = [*argv(corpus), "--out", str(tmp_path / "again")]
    code = f"import sys; from mm.recipes.cli import main; sys.exit(main({again}))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True,
                          text=True, check=True)
    assert "330 entries" in done.stderr and "bytes of the corpus a token" in done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained[0] / name).read_bytes()


def test_texts_alone_need_no_chat(corpus):
    plain = train_tokenizer(open_corpus(str(corpus / "0.txt")), 270)
    assert plain.settings["eos_token"] == "</s>" and "chat_template" not in plain.settings
    asked = train_tokenizer(open_corpus(str(corpus / "0.txt")), 270, chat=True)
    assert asked.settings["eos_token"] == "<|im_end|>" and asked.chat([TALK[1]])


def test_what_cannot_be_trained(corpus, tmp_path, capsys):
    with pytest.raises(InputError, match="vocab is 250: .* alone take 259"):
        train_tokenizer(open_corpus(str(corpus / "0.txt")), 250)
    (tmp_path / "digits.txt").write_text("1 2 3")
    with pytest.raises(InputError, match="no word of two letters"):
        train_tokenizer(open_corpus(str(tmp_path / "digits.txt")), 300)
    assert main(["train", "tokenizer", "--data.path", str(corpus), "--out", str(tmp_path)]) == 2
    assert "holds other things than a tokenizer" in capsys.readouterr().err
