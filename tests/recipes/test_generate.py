"""The command `mm generate`, and chat templates."""

import pytest

from mm.chat import render
from mm.errors import InputError
from mm.recipes.cli import main

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.mark.parametrize("more", [
    ["--stream"], ["--quantize", "int8"], ["--quantize", "int4"], ["--cache", "int8"], ["--speculate", "lookup"],
    ["--speculate", "stories260k"]])
def test_a_story_from_the_command_line(capsys, more):
    assert main(["generate", "stories260k", "Once upon a time", "--max-tokens", "20", *more]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("Once upon a time, there was a little girl") and "20 tokens" in told.err


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


def test_a_chat_template_is_rendered_as_written():
    messages = [{"role": "user", "content": "Hi"}]
    assert render(CHATML, messages, {}) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InputError, match="no system"):
        render("{{ raise_exception('no system') }}", messages, {})
    with pytest.raises(InputError):
        render("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", messages, {})
