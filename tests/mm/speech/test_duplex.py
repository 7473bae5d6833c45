"""The duplex model: every published shape against the official package, packing, gradients, files, bad input."""

import json
from dataclasses import replace

import duplex
import pytest
import torch
from duplex import random_codes, small
from safetensors.torch import load_file, save_file
from support import close

from mm import DuplexLM, spec
from mm.errors import InputError
from mm.spec import schema

SHAPES = sorted(duplex.SHAPES)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")


@pytest.fixture
def moshi():
    return pytest.importorskip("moshi", reason="the official package")


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_of_the_official_package(moshi, tmp_path, shape):
    """Longer than the context, with tokens that are not there and conditions that are absent."""
    theirs, ours, config = duplex.pair(shape, tmp_path)
    codes, values = duplex.codes(config, 3, 30, holes=0.05), duplex.told(config, 3)
    made = ours(codes, ours.condition(values, 3))
    if not config["dep_q"]:  # whose own forward asks for a depth transformer
        hidden, text = theirs.forward_text(ours.frames(codes).inputs)
        close(made.text, text[:, 0])
        assert made.audio.shape == (3, 0, 30, config["card"])
        return
    wanted = theirs(codes, duplex.official_conditions(theirs, values))
    torch.testing.assert_close(made.text, wanted.text_logits[:, 0], atol=1e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(made.audio, wanted.logits, atol=1e-5, rtol=0, equal_nan=True)
    known = ours.frames(codes).known[:, 1:1 + config["dep_q"]]
    assert known.sum() == wanted.mask.sum()  # by step instead of by frame


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_saved_is_read_by_the_official_package_and_by_us(moshi, tmp_path, shape):
    from moshi.models import loaders

    theirs, ours, _ = duplex.pair(shape, tmp_path / "theirs")
    for layout in ("kyutai", "mm"):
        ours.save_pretrained(tmp_path / layout, layout=layout)
        again = DuplexLM.from_pretrained(tmp_path / layout)
        assert again.spec == ours.spec and again.fingerprint() == ours.fingerprint()
        assert schema.from_json(schema.to_json(ours.spec)) == ours.spec
    config = json.loads((tmp_path / "kyutai/config.json").read_text())
    told = {name: value for name, value in config.items() if name not in ("moshi_name", "model_type")}
    model = loaders.get_moshi_lm(tmp_path / "kyutai/model.safetensors", told, dtype=torch.float32)
    read, wanted = model.state_dict(), theirs.state_dict()
    assert read.keys() == wanted.keys() and all(torch.equal(read[name], wanted[name]) for name in wanted)


@torch.no_grad()
def test_names_of_the_packages_memory_and_int8_files(moshi, tmp_path):
    config = duplex.settings("tts")
    theirs = duplex.official(config)
    folder = duplex.write(theirs, config, tmp_path / "memory", joined=False)
    codes, values = duplex.codes(config, 2, 12), duplex.told(config, 2)
    ours = DuplexLM.from_pretrained(folder)
    plain = ours(codes, ours.condition(values, 2))
    state = load_file(duplex.write(theirs, config, tmp_path / "int8") / "model.safetensors")
    linear = {name + ".weight" for name, part in theirs.named_modules() if isinstance(part, torch.nn.Linear)}
    linear |= {name for name in state if name.endswith(("in_proj_weight", "out_proj.weight"))}
    for name in linear & state.keys():
        scale = state[name].abs().amax(1)
        state[name + "_scb"] = scale
        state[name] = (state[name] * 127 / scale[:, None]).round().to(torch.int8)
    save_file(state, tmp_path / "int8/model.safetensors")
    (tmp_path / "int8/config.json").write_text(json.dumps(config | {"quantize": True}))
    ours = DuplexLM.from_pretrained(tmp_path / "int8")
    held = dict(theirs.named_parameters())
    for name in linear & held.keys():
        held[name].copy_(held[name].mul(127 / held[name].abs().amax(1, keepdim=True)).round()
                         * held[name].abs().amax(1, keepdim=True) / 127)
    made = ours(codes, ours.condition(values, 2))
    wanted = theirs(codes, duplex.official_conditions(theirs, values))
    torch.testing.assert_close(made.audio, wanted.logits, atol=2e-5, rtol=0, equal_nan=True)
    assert (made.text - plain.text).abs().nan_to_num().max() > 1e-4


# ------------------------------------------------------------------------------------- by itself
@torch.no_grad()
def test_packed_conversations_are_as_if_alone():
    model = small()
    parts = [random_codes(model, 1, frames) for frames in (9, 4, 11)]
    documents = torch.cat([torch.full((1, part.shape[2]), i) for i, part in enumerate(parts)], 1)
    documents = torch.cat([documents, torch.full((1, 3), -1)], 1)
    codes = torch.cat([*parts, torch.zeros(1, 7, 3, dtype=torch.long)], 2)
    packed, at = model(codes, documents=documents), 0
    for part in parts:
        alone, stop = model(part), at + part.shape[2]
        torch.testing.assert_close(packed.text[:, at:stop], alone.text, atol=1e-5, rtol=0)
        torch.testing.assert_close(packed.audio[:, :, at:stop], alone.audio, atol=1e-5, rtol=0, equal_nan=True)
        at = stop
    known = model.frames(codes, documents).known
    assert not known[..., at:].any() and known.sum() == sum(model.frames(part).known.sum() for part in parts)


@torch.no_grad()
def test_a_logit_depends_on_the_past_alone():
    """Of the text: frames before it; of a code: those, the frame's text, and the codes before it in its step."""
    model = small()
    codes = random_codes(model, 1, 10)
    before = model(codes)
    changed = codes.clone()
    changed[:, :, 6] = (changed[:, :, 6] + 1) % 12
    after = model(changed)
    assert torch.equal(before.text[:, :7], after.text[:, :7]) and not torch.equal(before.text[:, 7], after.text[:, 7])
    assert torch.equal(before.audio[:, :, :4].nan_to_num(), after.audio[:, :, :4].nan_to_num())
    text = codes.clone()
    text[:, 0, 6] = (text[:, 0, 6] + 1) % 12
    moved = (model(text).audio - before.audio).abs().amax(-1)[0] > 0
    assert moved[0, 6] and not moved[0, :6].any() and moved[1, 4] and not moved[1, :4].any()


def test_gradients_in_float64():
    """All steps at once against one step after the other."""
    model = small().double()
    x = torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True)
    tokens = random_codes(model, 1, 3)[:, :5]
    whole = model.depth.logits(model.depth.hidden(x, tokens))
    weights = torch.randn_like(whole)
    parameters = [p for p in model.depth.parameters() if p.requires_grad]
    wanted = torch.autograd.grad((whole * weights).sum(), [x, *parameters])
    total = 0
    for t in range(3):
        rows, (cache, read) = [], model.depth.begin(x[:, t])
        for k in range(4):
            cache = replace(cache, layers=[tuple(held.clone() for held in pair) for pair in cache.layers])
            rows.append(model.depth.step(read[k], tokens[:, k, t], k, cache))
        total = total + (torch.stack(rows) * weights[:, :, t]).sum()
    for ours, theirs in zip(torch.autograd.grad(total, [x, *parameters]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


@torch.no_grad()
def test_conditions_before_the_frames_move_every_frame():
    voice = spec.Condition(name="voice", of=spec.Vectors(dim=4), into="prepend")
    model = small(conditioning=spec.Conditioning(conditions=(voice,)))
    codes = random_codes(model, 2, 8)
    one = model.condition({"voice": [torch.randn(3, 4), None]}, 2)
    made, other = model(codes, one), model(codes, model.condition({}, 2))
    assert made.text.shape == (2, 8, 20) and not torch.allclose(made.text[0], other.text[0])


def test_what_a_config_says_of_generation_goes_along(tmp_path):
    model, told = small(), {"lm_gen_config": {"temp_text": 0.4}, "stt_config": {"audio_delay_seconds": 0.5}}
    model.generation = told | {"mimi_name": "codec.safetensors"}
    for layout in ("mm", "kyutai"):
        model.save_pretrained(tmp_path / layout, layout=layout)
        model = DuplexLM.from_pretrained(tmp_path / layout)
        assert {name: model.generation.get(name) for name in told} == told


BAD = [(lambda m: m(torch.zeros(1, 6, 4, dtype=torch.long)), "codes should be integers"),
       (lambda m: m(torch.zeros(1, 7, 0, dtype=torch.long)), "codes should be integers"),
       (lambda m: m(torch.zeros(1, 7, 4)), "codes should be integers"),
       (lambda m: m(torch.zeros(1, 7, 4, dtype=torch.long), documents=torch.zeros(1, 3)), "documents"),
       (lambda m: m.condition({"voice": ["x"]}), "knows no conditions")]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input(call, words):
    with pytest.raises(InputError, match=words):
        call(small())


@pytest.mark.parametrize(("change", "words"), [
    ({"delays": [0, 1]}, "delays should hold 17"), ({"norm": "batch"}, "norm should be one of"),
    ({"positional_embedding": "sin"}, "positions should be"), ({"dep_q": 17}, "more than 16 streams"),
    ({"flash": True}, "asks for something that is not supported"), ({"num_heads": 5}, "5 heads do not share"),
    ({"conditioners": {"a": {"type": "t5"}}, "fuser": {"sum": ["a"]}}, "should be|has no|not supported")])
def test_configs_that_are_not_understood(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(duplex.settings("moshi") | change))
    with pytest.raises(InputError, match=words):
        DuplexLM.from_pretrained(tmp_path)
