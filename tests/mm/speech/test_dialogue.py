"""Sessions: streaming equals the training forward and the official package, rows on their own, guidance, prompts."""

import resource
from dataclasses import replace

import duplex
import pytest
import torch
from duplex import random_codes, small
from hypothesis import given, settings
from hypothesis import strategies as st

from mm import Sampling, spec
from mm.errors import InputError
from mm.speech.dialogue import AUDIO, TEXT, UNKNOWN, Guidance, Hooks
from mm.tree import tensors

SHAPES = sorted(duplex.SHAPES)
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients(monkeypatch):
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    with torch.no_grad():
        yield


@pytest.fixture
def moshi():
    return pytest.importorskip("moshi", reason="the official package")


def run(model, state, heard, rows=None, **more):
    """All frames of heard (B, heard, T) -> tokens (B, T, 1 + own)."""
    return torch.stack([model.step(heard[..., t], state, rows=rows, **more).tokens for t in range(heard.shape[2])], 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_sessions_of_the_official_package(moshi, tmp_path, shape):
    """Token for token, longer than the context."""
    from moshi.models.lm import LMGen

    theirs, ours, config = duplex.pair(shape, tmp_path)
    heard, values = torch.randint(config["card"], (2, ours.spec.heard, 30)), duplex.told(config, 2)
    if "speaker" in values:  # rows that are padded for each other differ in the official package
        values["speaker"] = [torch.randn(4, 10) for _ in range(2)]
    gen = LMGen(theirs, use_sampling=False, support_out_of_sync=True,
                condition_tensors=duplex.official_conditions(theirs, values))
    with gen.streaming(2):
        wanted = torch.cat([gen.step(heard[..., t:t + 1]) for t in range(30)], 2).transpose(1, 2)
    made = run(ours, ours.init_state(2, conditions=values), heard)
    assert torch.equal(made, wanted) and (made == UNKNOWN).sum() == 2 * ours.spec.lag * (1 + ours.spec.own)


@pytest.mark.parametrize("hides", ["conditions", "text", "start"])
def test_guidance_of_the_official_package(moshi, tmp_path, hides):
    from moshi.models.lm import LMGen

    theirs, ours, config = duplex.pair("tts" if hides == "conditions" else "moshi", tmp_path)
    heard, more = torch.randint(config["card"], (2, ours.spec.heard, 24)), {}
    values = {"description": ["good", "bad"], "speaker": [torch.randn(3, 10) for _ in range(2)]}
    if hides == "conditions":
        official = duplex.official_conditions(theirs, {name: [*held, None, None] for name, held in values.items()})
        for i in (2, 3):  # as long as what is there
            official["speaker"].condition[i] = theirs.condition_provider.conditioners["speaker"].learnt_padding[0]
        more["condition_tensors"] = official
    if hides == "text":
        more["cfg_is_no_text"] = True
    if hides == "start":
        more["cfg_is_masked_until"] = [5, 5]
    gen = LMGen(theirs, use_sampling=False, cfg_coef=1.7, support_out_of_sync=True, **more)
    with gen.streaming(2):
        wanted = torch.cat([gen.step(heard[..., t:t + 1]) for t in range(24)], 2).transpose(1, 2)
    guidance = Guidance(scale=1.7, hides=hides, hidden_frames=5 if hides == "start" else 0)
    state = ours.init_state(2, conditions=values if hides == "conditions" else None, guidance=guidance)
    made = run(ours, state, heard)
    assert torch.equal(made, wanted)
    plain = ours.init_state(2, conditions=values if hides == "conditions" else None)
    assert not torch.equal(run(ours, plain, heard), made)


def streamed(model, codes):
    """Logits of sessions that are given the tokens of codes (B, 1 + Q, T), by step."""
    text, audio, step = [], [], type(model.depth).step
    own, frames = 1 + model.spec.own, codes.shape[2]
    state, targets = model.init_state(len(codes)), model.frames(codes).targets

    def record(depth, *args):
        audio.append(step(depth, *args))
        return audio[-1]
    hooks = Hooks(text_logits=lambda logits: text.append(logits) or logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.depth), "step", record)
        for t in range(frames):
            heard = codes[:, own:, max(t - 1, 0)]  # step t hears frame t - 1
            model.step(heard, state, given=targets[:, :own, t], hooks=hooks)
    return torch.stack(text, 1), torch.stack(audio, 1).unflatten(1, (frames, -1))


def test_streaming_equals_the_training_forward():
    model = small()
    codes = random_codes(model, 2, 25)
    made, (text, audio) = model(codes), streamed(model, codes)
    torch.testing.assert_close(text, made.text, atol=1e-5, rtol=0)
    for k, delay in enumerate(model.spec.delays[1:5]):
        torch.testing.assert_close(audio[:, delay:, k], made.audio[:, k, :25 - delay], atol=1e-5, rtol=0)


@settings(max_examples=8)
@given(st.integers(0, 10**6))
def test_sessions_that_pause_and_begin_again_are_as_if_alone(seed):
    """Greedy and sampled, each with its own settings, past the window."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, frames = small(), 16
    ways = [(Sampling(), Sampling()), (TEXT, AUDIO), (Sampling(temperature=1.0, seed=seed, top_k=5),) * 2]
    heard = torch.randint(model.spec.card, (3, model.spec.heard, frames))
    alone = []
    for i, (text, audio) in enumerate(ways):
        alone.append(run(model, model.init_state(1, text=text, audio=audio), heard[i:i + 1])[0])
    state, at, got = model.init_state(3), [0, 0, 0], [[], [], []]
    run(model, state, torch.randint(model.spec.card, (3, model.spec.heard, 3)))  # sessions before these
    for i, (text, audio) in enumerate(ways):
        state.sample(i, text, audio)
    for i in torch.randperm(3, generator=draw).tolist():  # they begin one after the other
        model.begin(state, rows=torch.arange(3) == i)
        for _ in range(2):
            advance(model, state, heard, at, got, torch.tensor([bool(at[j]) or j == i for j in range(3)]))
    while min(at) < frames:
        advance(model, state, heard, at, got, (torch.rand(3, generator=draw) < 0.6))
    for i in range(3):
        assert torch.equal(torch.stack(got[i]), alone[i])


def advance(model, state, heard, at, got, rows):
    frames = heard.shape[2]
    rows = rows & torch.tensor([a < frames for a in at])
    now = torch.stack([heard[i, :, min(a, frames - 1)] for i, a in enumerate(at)])
    made = model.step(now, state, rows=rows).tokens
    assert (made[~rows] == UNKNOWN).all()
    for i in rows.nonzero().flatten().tolist():
        got[i].append(made[i])
        at[i] += 1


def test_a_session_is_saved_moved_and_goes_on(tmp_path):
    model = small()
    heard = torch.randint(model.spec.card, (2, model.spec.heard, 14))
    sampled = {"text": TEXT, "audio": Sampling(temperature=0.9, seed=4)}
    state = model.init_state(2, **sampled)
    whole = run(model, state.clone(), heard)
    run(model, state, heard[..., :7])
    state.save(tmp_path / "state.safetensors")
    again = model.init_state(2, **sampled).load(tmp_path / "state.safetensors")
    assert torch.equal(run(model, again, heard[..., 7:]), whole[:, 7:])
    other = model.init_state(3)
    other.insert(torch.tensor([2]), state.select(torch.tensor([1])))
    rest = torch.stack([heard[1, :, 7:]] * 3)
    assert torch.equal(run(model, other, rest)[2], whole[1, 7:])


def test_long_sessions_do_not_grow():
    model = small()
    state = model.init_state(1)
    before = {name: x.shape for name, x in tensors(state)}
    heard = torch.randint(model.spec.card, (1, model.spec.heard, 60))
    made = run(model, state, heard)
    assert {name: x.shape for name, x in tensors(state)} == before and state.offset == 60
    assert (made[:, model.spec.lag:] >= 0).all() and made[0, 30:].unique(dim=0).shape[0] > 3


def after(model, frames):
    """The step in which sessions hear their first frame as if so many were over."""
    state = model.init_state(2)
    state.stack.offset.fill_(frames)
    return state


def test_an_hour_later_it_is_the_same_model():
    """Positions count on and only distances matter; those of 32 bits are long past what an hour counts."""
    model, seen = small(), []
    hooks = Hooks(text_logits=lambda logits: seen.append(logits) or logits)
    heard = torch.randint(model.spec.card, (2, model.spec.heard, 30))
    made = [run(model, after(model, start), heard, hooks=hooks) for start in (0, 45_000)]
    assert torch.equal(*made)
    torch.testing.assert_close(*(torch.stack(part) for part in (seen[:30], seen[30:])), atol=2e-2, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("sinks", [0, 2])
def test_an_hour_takes_no_more_memory_than_a_minute(sinks):
    """45,000 steps of 80 ms, of two sessions that sample."""
    model = small()
    state = model.init_state(2, text=TEXT, audio=AUDIO, sinks=sinks)
    before = {name: x.shape for name, x in tensors(state)}
    heard = torch.randint(model.spec.card, (2, model.spec.heard, 1000))
    for part in range(45):
        tokens = run(model, state, heard)
        assert (tokens[:, model.spec.lag if part == 0 else 0:] >= 0).all()
        if part == 0:
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert {name: x.shape for name, x in tensors(state)} == before and (state.offset == 45_000).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 20_000  # KiB
    assert tokens.unique(dim=1).shape[1] > 500


def test_a_session_may_keep_its_first_frames_in_sight():
    """Past the context it is the model whose window has places for them, and no longer the one without."""
    model = small()
    layers = [replace(one, mixer=replace(one.mixer, window=replace(one.mixer.window, first=2)))
              for one in model.spec.stack.layers]
    other = small(stack=replace(model.spec.stack, layers=tuple(layers)))
    other.load_state_dict(model.state_dict())
    codes, own, seen = random_codes(model, 2, 40), 1 + model.spec.own, []
    hooks = Hooks(text_logits=lambda logits: seen.append(logits) or logits)
    state, targets = model.init_state(2, sinks=2), model.frames(codes).targets
    for t in range(40):
        model.step(codes[:, own:, max(t - 1, 0)], state, given=targets[:, :own, t], hooks=hooks)
    made = torch.stack(seen, 1)
    torch.testing.assert_close(made, other(codes).text, atol=1e-5, rtol=0)
    assert (made - model(codes).text)[:, 8:].abs().max() > 0.01
    with pytest.raises(InputError, match="need a causal window"):
        model.init_state(1, sinks=6)


@pytest.mark.parametrize("guidance", [None, Guidance(scale=2.0, hides="text")])
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_prompt_is_as_many_steps_that_are_given_their_tokens(chunk, guidance):
    model, own = small(), 5
    codes = random_codes(model, 2, 11)
    told = {"chunk": chunk, "guidance": guidance}
    state, wanted = model.init_state(2, **told), model.init_state(2, **told)
    rows = torch.tensor([True, False])
    model.prompt(codes[:, :own], codes[:, own:], state, rows=rows)
    targets = model.frames(codes).targets
    for t in range(11):
        model.step(codes[:, own:, t], wanted, rows=rows, given=targets[:, :own, t])
    heard = torch.randint(model.spec.card, (2, model.spec.heard, 9))
    assert torch.equal(run(model, state, heard), run(model, wanted, heard))
    assert not torch.equal(run(model, model.init_state(2, **told), heard)[:1],
                           run(model, state, heard)[:1])


def test_conditions_before_the_frames_stream_as_they_train():
    voice = spec.Condition(name="voice", of=spec.Vectors(dim=4), into="prepend")
    layer = duplex.layer(left=None, rope=spec.Rope())
    model = small(conditioning=spec.Conditioning(conditions=(voice,)), context=40,
                  stack=spec.Stack(dim=32, layers=(layer,) * 2, final_norm=spec.RMSNorm()))
    codes, values, seen = random_codes(model, 1, 9), {"voice": [torch.randn(3, 4)]}, []
    state, targets = model.init_state(1, conditions=values, chunk=4), model.frames(codes).targets
    hooks = Hooks(text_logits=lambda logits: seen.append(logits) or logits)
    for t in range(9):
        model.step(codes[:, 5:, max(t - 1, 0)], state, given=targets[:, :5, t], hooks=hooks)
    wanted = model(codes, model.condition(values, 1)).text
    torch.testing.assert_close(torch.stack(seen, 1), wanted, atol=1e-5, rtol=0)


def test_hooks_force_and_edit_what_is_said():
    model = small(extra=(3, 2))
    heard = torch.randint(model.spec.card, (1, model.spec.heard))
    banned = model.step(heard, model.init_state(1)).written[0, 0].item()
    hooks = Hooks(text_logits=lambda x: x.index_fill(1, torch.tensor([banned]), -torch.inf),
                  codes=lambda x: x.index_fill(1, torch.tensor([2]), 7))
    made = model.step(heard, model.init_state(1), hooks=hooks)
    assert made.written[0, 0] != banned and made.written[0, 3] == 7
    assert model.step(heard, model.init_state(1), hooks=Hooks(text=lambda t: t * 0 + 11)).written[0, 0] == 11
    assert [tuple(x.shape) for x in made.extra] == [(1, 3), (1, 2)] and abs(made.extra[0].sum() - 1) < 1e-5


@pytest.mark.parametrize(("call", "words"), [
    (lambda m, s: m.step(torch.zeros(1, 3, dtype=torch.long), s), r"heard should be integers \(2, 2\)"),
    (lambda m, s: m.step(torch.zeros(2, 2), s), "heard should be integers"),
    (lambda m, s: m.step(torch.zeros(2, 2, dtype=torch.long), s, rows=torch.ones(3, dtype=torch.bool)), "rows"),
    (lambda m, s: m.step(torch.zeros(2, 2, dtype=torch.long), s, given=torch.zeros(2, 4, dtype=torch.long)), "given"),
    (lambda m, s: small(card=13).step(torch.zeros(2, 2, dtype=torch.long), s), "made by a model"),
    (lambda m, s: m.step(torch.zeros(2, 2, dtype=torch.long), s, given=torch.tensor([[-2] * 5, [21] + [-2] * 4])),
     "a given text should be tokens up to 20, .* not 21"),
    (lambda m, s: m.step(torch.zeros(2, 2, dtype=torch.long), s, given=torch.tensor([[-2] * 5, [-2] * 4 + [-3]])),
     "given codes should be tokens up to 12, .* not -3"),
    (lambda m, s: m.step(torch.tensor([[0, 12], [13, 0]]), s), "heard codes should be tokens up to 12, .* not 13"),
    (lambda m, s: m.prompt(*[torch.zeros(2, n, 3 + n, dtype=torch.long) for n in (5, 2)], s), "as many said"),
    (lambda m, s: m.prompt(*[torch.zeros(2, n, 0, dtype=torch.long) for n in (5, 2)], s), "holds frames"),
    (lambda m, s: m.prompt(*[torch.zeros(2, n, dtype=torch.long) for n in (5, 2)], s), "holds frames"),
    (lambda m, s: m.prompt(torch.full((2, 5, 3), 21), torch.zeros(2, 2, 3, dtype=torch.long), s),
     "a prompt's text should be tokens up to 20, or -1 for none, not 21"),
    (lambda m, s: m.prompt(torch.full((2, 5, 3), 12), torch.full((2, 2, 3), 13), s), "codes .* up to 12, .* not 13"),
    (lambda m, s: m.prompt(torch.full((2, 5, 3), -2), torch.zeros(2, 2, 3, dtype=torch.long), s), "not -2"),
    (lambda m, s: m.init_state(1, conditions={"voice": ["a"]}), "knows no conditions"),
    (lambda m, s: Guidance(scale=1.0, hides="audio"), "hides")])
def test_bad_input(call, words):
    model = small()
    with pytest.raises(InputError, match=words):
        call(model, model.init_state(2))
