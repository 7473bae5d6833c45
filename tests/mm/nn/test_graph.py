"""When a step is run, captured and replayed; CUDA's graphs are played by a stand-in."""

from contextlib import contextmanager

import pytest
import torch

from mm.nn.graph import Compiled, Replay, compiled


@pytest.fixture
def told(monkeypatch):
    told = []

    class Graph:
        def replay(self):
            told.append("replay")

    @contextmanager
    def capture(graph):
        told.append("capture")
        yield
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return told


def test_it_runs_then_captures_then_replays_and_begins_again(told):
    out = torch.zeros(3)
    replay = Replay(lambda: told.append("step") or out)
    assert all(replay() is out for _ in range(3))
    replay.renew()
    assert replay() is out
    assert told == ["step", "capture", "step", "replay", "replay", "step"]


def test_a_compiled_step_is_checked_at_first_and_after_a_change(monkeypatch):
    skipped = []

    @contextmanager
    def stance(skip_guard_eval_unsafe):
        skipped.append(skip_guard_eval_unsafe)
        yield
    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    step = Compiled(lambda: 7)
    assert [step(), step(), step.renew(), step(), step()] == [7, 7, None, 7, 7]
    assert skipped == [False, True, False, True]


def test_without_a_compiler_the_step_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.warns(UserWarning, match="g\\+\\+ was not found"):
        assert compiled(str, torch.device("cpu")) is str


@pytest.mark.full
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_writes_the_same_text():
    from mm import TextDecoder
    from mm.decode import Engine, Sampling
    from mm.recipes.weights import stories260k

    model = TextDecoder.from_pretrained(stories260k(), device="cuda")
    prompt, way = model.tokenizer.encode("Once upon a time"), Sampling(max_tokens=40)
    engine = Engine(model, 2, compiled=True)
    first, second = engine.submit(prompt, way), engine.submit(prompt[:3], Sampling(max_tokens=60, temperature=0.7))
    engine.run()
    assert first.out == model.generate([prompt], way)[0].ids and len(second.out) == 60
