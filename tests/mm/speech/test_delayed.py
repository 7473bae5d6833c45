"""Speech to text and text to speech: what is said equals the official package's, what is heard becomes words."""

import duplex
import pytest
import torch

from mm.errors import InputError
from mm.speech.delayed import Script, Word, speak, transcribe


@pytest.fixture(autouse=True)
def no_gradients(monkeypatch):
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    with torch.no_grad():
        yield


@pytest.mark.parametrize("ahead", [0, 2])
def test_scripts_are_said_as_by_the_official_package(tmp_path, ahead):
    """Greedy, two sessions with different texts and pauses, with and without words ahead in the second stream."""
    pytest.importorskip("moshi", reason="the official package")
    from moshi.models import tts

    theirs, ours, config = duplex.pair("tts", tmp_path)
    theirs.text_linear.weight[0] += 0.3 * theirs.text_linear.weight[3]  # words are asked for now and then
    ours.head.weight[0] += 0.3 * ours.head.weight[3]
    texts = [[[5, 6, 7], [8], 3, [9, 10], [11]], [[20, 21], [22, 23, 24, 25], [26]]]
    entries = [[tts.Entry(tokens=[] if isinstance(word, int) else word, text="w",
                          padding=word if isinstance(word, int) else 0) for word in text] for text in texts]
    machine = tts.StateMachine(tts.TokenIds(config["text_card"] + 1), ahead, max_padding=5, initial_padding=2)
    model = tts.TTSModel(theirs, None, None, "", "", machine, 3, temp=0.0, n_q=8, max_gen_length=60)
    rows, values = [], duplex.told(config, 2)
    values["speaker"] = [torch.randn(4, 10) for _ in range(2)]
    for i in range(2):
        from moshi.conditioners import ConditionAttributes, TensorCondition
        rows.append(ConditionAttributes(text={"description": values["description"][i]},
                                        tensor={"speaker": TensorCondition.from_tensor(values["speaker"][i][None])}))
    wanted = model.generate(entries, rows)
    scripts = [Script(text, ours.spec.text, ahead=ahead, padding=5) for text in texts]
    made = list(speak(ours, scripts, ours.init_state(2, conditions=values), 3, most=60))
    assert [script.ended for script in scripts] == wanted.end_steps and None not in wanted.end_steps
    written = [frame.written[:, 0].tolist() for frame in made]
    assert [[row[i] for row in written] for i in range(2)] == [[token for _, token in row]
                                                               for row in wanted.logged_text_tokens]
    tokens = torch.stack([frame.tokens for frame in made[ours.spec.lag:]], 2)
    assert torch.equal(tokens, torch.cat(wanted.frames, 2))


def test_words_and_the_frames_in_which_they_begin():
    """A model that writes tokens by the step alone, two frames behind."""
    model = duplex.small(depth=None)
    plan = [3, 3, 0, 7, 8, 3, 3, 0, 9, 3]

    def step(heard, state):
        state.offset += 1
        return duplex.SimpleFrame(torch.tensor([[plan[int(state.offset[0]) - 1]]]))
    model.step = step
    codes = torch.zeros(1, 6, 10, dtype=torch.long)
    assert transcribe(model, codes, 2) == [[Word(2, [7, 8]), Word(7, [9])]]
    state = model.init_state(1)
    parts = [transcribe(model, piece, 2, state) for piece in codes.split([4, 6], 2)]
    assert parts == [[[Word(2, [7])]], [[Word(3, [8]), Word(7, [9])]]]


def test_bad_input():
    model = duplex.small()
    with pytest.raises(InputError, match="none for speech to text"):
        transcribe(model, torch.zeros(1, 6, 3, dtype=torch.long), 2)
    with pytest.raises(InputError, match=r"codes should be \(B, 2, T\), not \(2, 3\)"):
        transcribe(duplex.small(depth=None, delays=(0, 0, 0)), torch.zeros(2, 3, dtype=torch.long), 2)
    with pytest.raises(InputError, match="hears nothing"):
        next(speak(model, [Script([[5]], model.spec.text)], model.init_state(1), 2))
    for word, token in (([5, 20], 20), ([-1], -1)):
        with pytest.raises(InputError, match=f"tokens from 0 to 19, not {token}"):
            Script([3, word], model.spec.text)
    with pytest.raises(InputError, match="second text stream"):
        Script([[5]], model.spec.text, ahead=2)
