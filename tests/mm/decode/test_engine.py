"""Continuous batching: whoever shares the rows, and whenever they came, a text is the one it would be alone."""

import subprocess
import sys

import pytest
import torch
from support import attention, redraw, stack

from mm import TextDecoder, spec
from mm.decode import Engine, PromptLookup, Sampling
from mm.errors import InputError
from mm.lowbit import quantize
from mm.spec import CAUSAL, DecoderSpec, Embed, Rope, Window

SPEC = DecoderSpec(embed=Embed(vocab=61), context=64, head=spec.LMHead(tied=False), stack=stack(
    attention(window=Window(left=5, right=0), rope=Rope()), attention(window=CAUSAL, rope=Rope()),
    final_norm=spec.RMSNorm()))


def make():
    torch.manual_seed(0)
    return redraw(TextDecoder(SPEC))


MODEL = make()
PROMPTS = [[3], [4, 8, 15, 16, 23, 42], list(range(30)), [7, 7, 7], list(range(20, 41)), [60, 0]]
WAYS = [Sampling(max_tokens=12, temperature=t, seed=s, top_k=k, repetition_penalty=p) for t, s, k, p in (
    (0, 0, 0, 1.0), (0.9, 1, 0, 1.0), (1.5, 2, 5, 1.0), (0, 0, 0, 1.7), (0.8, 3, 0, 1.2), (0.3, 4, 0, 1.0))]


def alone(prompt, way):
    return MODEL.generate([prompt], way)[0].ids


ALONE = [alone(prompt, way) for prompt, way in zip(PROMPTS, WAYS, strict=True)]


@torch.no_grad()
def test_one_row_equals_the_whole_sequence_read_again_for_every_token():
    for prompt, way, out in zip(PROMPTS, WAYS, ALONE, strict=True):
        if way.temperature == 0 and way.repetition_penalty == 1:
            ids = list(prompt)
            for _ in range(12):
                ids.append(int(MODEL(torch.tensor([ids]))[0, -1].argmax()))
            assert ids[len(prompt):] == out


@pytest.mark.parametrize("slots, chunk", [(1, 256), (2, 4), (3, 1), (4, 7), (6, 3)])
def test_rows_come_and_go_without_changing_each_other(slots, chunk):
    engine = Engine(MODEL, slots, 50, chunk)
    requests = [engine.submit(p, w) for p, w in zip(PROMPTS[:4], WAYS[:4], strict=True)]
    for _ in range(5):
        engine.step()
    requests += [engine.submit(p, w) for p, w in zip(PROMPTS[4:], WAYS[4:], strict=True)]
    engine.run()
    assert [request.out for request in requests] == ALONE
    assert all(request.reason == "length" for request in requests) and not engine.busy


def test_one_that_is_cancelled_leaves_its_row_to_others():
    engine = Engine(MODEL, 2, 50, 4)
    gone, stays, waits = (engine.submit(PROMPTS[i], WAYS[i]) for i in (2, 1, 4))
    engine.step()
    engine.cancel(gone)
    engine.run()
    assert (stays.out, waits.out, gone.out, gone.reason) == (ALONE[1], ALONE[4], [], "stop")


def test_it_ends_by_the_end_token_or_a_full_context():
    ends = ALONE[0][4]
    out = Engine(MODEL, 1, eos=[ends])
    request, past = out.submit(PROMPTS[0], WAYS[0]), out.submit(PROMPTS[0], Sampling(max_tokens=6, eos=False))
    out.run()
    assert request.out == ALONE[0][:ALONE[0].index(ends)] and request.reason == "eos"
    assert past.out == ALONE[0][:6] and past.reason == "length"
    long = MODEL.generate([list(range(60))], Sampling(max_tokens=50))[0]
    assert len(long.ids) == 5 and long.reason == "context"  # the 64th token is read and gives one more


def test_a_prefix_is_read_once():
    engine = Engine(MODEL, 2, 50, 4)
    shared = engine.prefix(PROMPTS[2][:17])
    first, other = engine.submit(PROMPTS[2], WAYS[2], prefix=shared), engine.submit(PROMPTS[4], WAYS[4])
    engine.run()
    assert (first.out, other.out) == (ALONE[2], ALONE[4])
    with pytest.raises(InputError, match="begin with"):
        engine.submit([9, 9], prefix=shared)


def test_a_prefix_goes_on_in_another_process(tmp_path):
    Engine(MODEL, 1, 50, 4).prefix(PROMPTS[2][:17]).save(tmp_path / "prefix.safetensors")
    MODEL.save_pretrained(tmp_path / "model")
    code = f"""
from mm import TextDecoder
from mm.decode import Engine, Sampling
engine = Engine(TextDecoder.from_pretrained({str(tmp_path / "model")!r}), 3, 50, 4)
prefix = engine.load_prefix(range(17), {str(tmp_path / "prefix.safetensors")!r})
request = engine.submit(range(30), {WAYS[2]!r}, prefix=prefix)
engine.run()
print(request.out)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(ALONE[2])


def test_nothing_in_a_step_is_read_back(monkeypatch):
    engine = Engine(MODEL, 3, 50, 4)
    for prompt, way in zip(PROMPTS[:3], WAYS[:3], strict=True):
        engine.submit(prompt, way)
    while engine.filling or engine.waiting:
        engine.step()
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a tensor was read"))
    with torch.no_grad():
        engine.plain_step()


@pytest.mark.full
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_step_is_one_graph_and_writes_the_same_text(backend):
    engine = Engine(MODEL, 2, 50, 4)
    engine.decode = torch.compile(engine.plain_step, dynamic=False, fullgraph=True, backend=backend)
    requests = [engine.submit(prompt, way) for prompt, way in zip(PROMPTS[:4], WAYS[:4], strict=True)]
    engine.run()
    assert [request.out for request in requests] == ALONE[:4]


@pytest.mark.parametrize("slots, quantized", [(1, False), (2, True)])
def test_a_compiled_step_of_one_row_or_of_eight_bits_writes_the_same_text(slots, quantized):
    model = quantize(make()) if quantized else MODEL
    engine = Engine(model, slots, 50)
    engine.decode = torch.compile(engine.plain_step, dynamic=False, fullgraph=True, backend="aot_eager")
    requests = [engine.submit(prompt, WAYS[0]) for prompt in PROMPTS[:3]]
    engine.run()
    assert [request.out for request in requests] == [out.ids for out in model.generate(PROMPTS[:3], WAYS[0])]


@pytest.mark.full
def test_compiled_texts_of_all_settings_are_the_same():
    """Two engines at a time, each of which goes back to the program of its own settings."""
    for i in range(0, len(PROMPTS), 2):
        engines = [Engine(MODEL, 1, 50 + 4 * k, compiled=True) for k in range(2)]
        requests = [engine.submit(PROMPTS[i + k], WAYS[i + k]) for k, engine in enumerate(engines)]
        while any(engine.busy for engine in engines):
            for engine in engines:
                engine.step()
        assert [request.out for request in requests] == ALONE[i:i + 2]


@pytest.mark.parametrize("prompt, told", [([], "empty"), ([1, 61], "vocabulary"), ([1] * 51, "fit")])
def test_prompts_that_cannot_be_read(prompt, told):
    with pytest.raises(InputError, match=told):
        Engine(MODEL, 1, 50).submit(prompt)


def test_mistakes():
    with pytest.raises(InputError, match="context"):
        Engine(MODEL, 1, 65)
    with pytest.raises(InputError, match="slot"):
        Engine(MODEL, 0)
    with pytest.raises(InputError, match="tokenizer"):
        Engine(MODEL, 1).submit([1], Sampling(stop=("x",)))
    with pytest.raises(InputError, match="tokenizer"):
        MODEL.generate("text")
    with pytest.raises(InputError, match="choose one"):
        Engine(MODEL, 1, speculate=PromptLookup(), compiled=True)
