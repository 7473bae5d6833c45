"""The command `mm generate`, and chat templates."""

import pytest
import torch
from support import redraw

from mm.errors import InputError
from mm.recipes.cli import main
from mm.tokenizer.chat import render
from mm.tokenizer.tokenizer import train_bpe

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.mark.parametrize("more", [
    ["--stream"], ["--quantize", "int8"], ["--quantize", "int4"], ["--cache", "int8"], ["--speculate", "lookup"],
    ["--speculate", "stories260k"]])
def test_a_story_from_the_command_line(capsys, more):
    assert main(["generate", "stories260k", "Once upon a time", "--max-tokens", "20", *more]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("Once upon a time, there was a little girl") and "20 tokens" in told.err


@pytest.mark.full
def test_a_story_by_a_compiled_step(capsys):
    assert main(["generate", "stories260k", "Once upon a time", "--max-tokens", "20", "--compile"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time, there was a little girl")


def test_alone_it_tells_a_story_from_its_beginning(capsys):
    assert main(["generate", "--max-tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time, there was a little girl")


@pytest.mark.parametrize("argv, told", [
    (["stories260k", ""], "empty"), (["stories260k", "x", "--speculate", "heads"], "no heads"),
    (["stories260k", "x", "--chat"], "chat template"),
    (["stories260k", "x", "--top-p", "0.5"], "temperature"), (["nowhere/at/all", "x"], "nowhere"),
    (["stories260k", "word " * 600], "context")])
def test_mistakes_are_one_sentence(capsys, argv, told):
    assert main(["generate", *argv]) == 2
    assert told in capsys.readouterr().err


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A T5 of random weights that reads the words of a sentence: transformers' model, the tokenizer, the directory."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = train_bpe(["the cat sat on the mat and the dog ran after the cat"] * 3, 540)
    config = transformers.T5Config(
        vocab_size=tokenizer.vocab_size, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    theirs = redraw(transformers.T5ForConditionalGeneration(config))
    theirs.save_pretrained(folder := tmp_path_factory.mktemp("t5"))
    tokenizer.save(folder)
    return theirs, tokenizer, folder


@pytest.mark.parametrize("more", [[], ["--stream"], ["--beams", "3"]])
def test_an_encoder_decoder_answers(capsys, reader, more):
    theirs, tokenizer, folder = reader
    ids = torch.tensor([[*tokenizer.prefix, *tokenizer.encode("The cat ran"), *tokenizer.suffix]])
    said = theirs.generate(ids, do_sample=False, max_new_tokens=9, num_beams=3 if "--beams" in more else 1)[0, 1:]
    assert main(["generate", str(folder), "The cat ran", "--max-tokens", "9", *more]) == 0
    told = capsys.readouterr()
    assert told.out == tokenizer.decode(said) + "\n" and "ended by" in told.err
    assert main(["generate", str(folder), "x", "--chat"]) == 2 and "is an encoder-decoder" in capsys.readouterr().err


def test_a_chat_template_is_rendered_as_written():
    messages = [{"role": "user", "content": "Hi"}]
    assert render(CHATML, messages, {}) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InputError, match="no system"):
        render("{{ raise_exception('no system') }}", messages, {})
    with pytest.raises(InputError):
        render("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", messages, {})
