"""Whisper equal to transformers and to openai-whisper: spectrogram, logits, files, tokens, and transcripts of clips."""

import json
import os
from pathlib import Path

import pytest
import torch
from installed import whisper_tiny
from support import close, redraw

from mm.encoders.audio import spectrogram as logmel
from mm.encoders.audio.spectrogram import LogMel, open_ended, read_sound
from mm.encoders.audio.speech_tokens import LANGUAGES, SpeechTokens
from mm.encoders.audio.transcribe import Settings, transcribe
from mm.encoders.audio.whisper import Whisper
from mm.errors import InputError

GREEDY = Settings(temperatures=(0.0,))
GOLDENS = json.loads((Path(__file__).parent / "goldens" / "whisper.json").read_text("utf-8"))
SMALL = {"vocab_size": 97, "num_mel_bins": 16, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
         "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40,
         "max_source_positions": 20, "max_target_positions": 24, "pad_token_id": 1, "bos_token_id": 2,
         "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' model with re-drawn weights, and its directory."""
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    library.logging.set_verbosity_error()
    model = redraw(library.WhisperForConditionalGeneration(library.WhisperConfig(**SMALL)))
    model.proj_out.weight = model.model.decoder.embed_tokens.weight
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def tiny():
    return Whisper.from_pretrained(whisper_tiny(), dtype=torch.float32)


def clip(name):
    path = Path(os.environ.get("MM_SPEECH", Path(__file__).parent / "clips")) / name
    if not path.is_file():
        pytest.skip(f"no {name}: set MM_SPEECH to a folder with ljspeech/ and librispeech/")
    return read_sound(path, 16000)


# ------------------------------------------------------------------------------------- spectrogram
@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("length", [150, 16000, 16000 * 7 + 33, 16000 * 31])
def test_spectrogram_equals_both_references(bins, length):
    torch.manual_seed(1)
    wave = torch.randn(length) * torch.linspace(0, 0.3, length)
    reference = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=bins)
    close(LogMel(bins=bins)(wave), torch.from_numpy(
        reference(wave.numpy(), sampling_rate=16000, return_tensors="np").input_features[0]))
    openai = pytest.importorskip("whisper")
    expected = openai.log_mel_spectrogram(wave, bins, padding=480000)
    ours = open_ended(wave, bins)
    close(ours, expected[:, : ours.shape[1]])
    assert bool((expected[:, ours.shape[1]:] == ours.min()).all())


def test_a_spectrogram_in_blocks_is_the_same(monkeypatch):
    wave = torch.randn(16000 * 3 + 77)
    whole = open_ended(wave, 80)
    monkeypatch.setattr(logmel, "BLOCK", 100)
    close(open_ended(wave, 80), whole, 1e-6)


def test_spectrogram_settings_go_through_files(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(LogMel(bins=128).to_hf()))
    assert LogMel.from_files(tmp_path, 80) == LogMel(bins=128)
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor.from_pretrained(tmp_path)
    assert (extractor.feature_size, extractor.hop_length) == (128, 160)
    (tmp_path / "preprocessor_config.json").write_text('{"hop_length": 100}')
    with pytest.raises(InputError, match="hop_length should be 160"):
        LogMel.from_files(tmp_path, 80)


# ------------------------------------------------------------------------------------- the model
def test_equals_transformers_both_ways(theirs, tmp_path):
    reference, folder = theirs
    ours = Whisper.from_pretrained(folder)
    mel, ids = torch.randn(3, 16, 40), torch.randint(4, 97, (3, 24))
    with torch.no_grad():
        expected = reference(input_features=mel, decoder_input_ids=ids).logits
        close(ours.encoder(mel), reference.model.encoder(mel).last_hidden_state)
        close(ours(mel, ids), expected)
        ours.save_pretrained(tmp_path / "hf", layout="hf")
        again = type(reference).from_pretrained(tmp_path / "hf").eval()
        close(again(input_features=mel, decoder_input_ids=ids).logits, expected)
        ours.save_pretrained(tmp_path / "mm")
        assert Whisper.from_pretrained(tmp_path / "mm").fingerprint() == ours.fingerprint()


@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side(theirs, left):
    ours = Whisper.from_pretrained(theirs[1])
    mel, ids = torch.randn(1, 16, 40), torch.randint(4, 97, (1, 6))
    blank = torch.zeros(1, 3, dtype=torch.long)
    wide = torch.cat([blank, ids] if left else [ids, blank], 1)
    real = slice(3, 9) if left else slice(0, 6)
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[:, real] = True
    with torch.no_grad():
        close(ours(mel, wide, mask)[:, real], ours(mel, ids))


def test_steps_with_remembered_keys_equal_one_pass(theirs):
    ours = Whisper.from_pretrained(theirs[1])
    mel, ids = torch.randn(2, 16, 40), torch.randint(4, 97, (2, 24))
    with torch.no_grad():
        whole, memory = ours(mel, ids), ours.decoder.stack.remember(ours.encoder(mel))
        state = ours.decoder.init_state(2)
        parts = [ours.decoder.hidden(part, memory=memory, state=state) for part in ids.split([7, 1, 1, 9, 1, 5], 1)]
        close(ours.decoder.logits(torch.cat(parts, 1)), whole)
        close(ours.decoder.hidden(ids[:1], memory=memory.select(torch.tensor([0]))), torch.cat(parts, 1)[:1])
        with pytest.raises(InputError, match="memory of 2 rows"):
            ours.decoder.hidden(ids[:1], memory=memory)


def test_openai_file_equals_openai_whisper(tmp_path):
    openai = pytest.importorskip("whisper")
    dims = openai.model.ModelDimensions(16, 20, 32, 4, 2, 51865, 24, 32, 2, 2)
    torch.manual_seed(0)
    reference = redraw(openai.model.Whisper(dims))
    torch.save({"dims": vars(dims), "model_state_dict": reference.state_dict()}, tmp_path / "model.pt")
    ours = Whisper.from_pretrained(tmp_path / "model.pt")
    assert ours.tokenizer is None
    mel, ids = torch.randn(2, 16, 40), torch.randint(0, 51865, (2, 24))
    with torch.no_grad():
        close(ours(mel, ids), reference(mel, ids))
    with pytest.raises(InputError, match="multilingual.tiktoken"):
        transcribe(ours, [torch.randn(16000)])
    (tmp_path / "multilingual.tiktoken").write_bytes(
        (Path(openai.__file__).parent / "assets" / "multilingual.tiktoken").read_bytes())
    tokens = openai.tokenizer.get_tokenizer(True, language="de", task="translate")
    made = Whisper.from_pretrained(tmp_path / "model.pt").tokenizer
    text = " Grüße, 東京 and 12345's\n  ♪"
    assert made.encode(text) == tokens.encode(text)
    assert made.pieces.token_id("<|30.00|>") == SpeechTokens(51865).times + 1500 == 51864


@pytest.mark.parametrize(("vocab", "languages"), [(51864, 99), (51865, 99), (51866, 100)])
def test_special_tokens_equal_openai_whisper(vocab, languages):
    tokenizer = pytest.importorskip("whisper.tokenizer")
    assert tuple(tokenizer.LANGUAGES) == LANGUAGES
    many = vocab > 51864
    theirs = tokenizer.get_tokenizer(many, num_languages=languages, language="de", task="translate")
    ours = SpeechTokens(vocab)
    assert ours.ready
    assert (ours.times, ours.no_speech, ours.previous, ours.end, ours.no_times) == (
        theirs.timestamp_begin, theirs.no_speech, theirs.sot_prev, theirs.eot, theirs.no_timestamps)
    assert tuple(ours.begin("de", "translate") if many else ours.begin(None, "transcribe")) == theirs.sot_sequence
    with pytest.raises(InputError, match="xx|English"):
        ours.begin("xx", "transcribe")


# ------------------------------------------------------------------------------------- bad input
def test_bad_input(theirs, tmp_path):
    ours = Whisper.from_pretrained(theirs[1])
    with pytest.raises(InputError, match=r"should be \(B, 16, 40\)"):
        ours.encoder(torch.randn(1, 16, 39))
    with pytest.raises(InputError, match="24 positions of this decoder"):
        ours(torch.randn(1, 16, 40), torch.zeros(1, 25, dtype=torch.long))
    (tmp_path / "x.pt").write_bytes(b"no")
    with pytest.raises(InputError, match=r"x\.pt is truncated"):
        Whisper.from_pretrained(tmp_path / "x.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "y.pt")
    with pytest.raises(InputError, match="not OpenAI's Whisper"):
        Whisper.from_pretrained(tmp_path / "y.pt")


def test_no_sound_is_refused(tiny, tmp_path):
    (tmp_path / "text.wav").write_text("words")
    for sound, told in ((torch.zeros(0), "empty"), (torch.tensor([0.0, float("nan")]), "not finite"),
                        (tmp_path / "text.wav", "cannot be read")):
        with pytest.raises(InputError, match=told):
            transcribe(tiny, [sound])
    with pytest.raises(InputError, match="only transcribes English"):
        transcribe(tiny, [torch.zeros(16000)], Settings(language="de"))
    assert transcribe(tiny, [torch.zeros(100)])[0].text == ""


# ------------------------------------------------------------------------------------- real clips
def agree(tiny, names, batch):
    found = transcribe(tiny, [clip(name) for name in names], GREEDY, batch=batch)
    for name, one in zip(names, found, strict=True):
        times = [[round(s.start, 2), round(s.end, 2)] for s in one.segments]
        assert {"text": one.text, "times": times} == GOLDENS[name], name


def test_two_clips_equal_the_goldens(tiny):
    agree(tiny, [f"ljspeech/wavs/LJ001-00{number}.flac" for number in (11, 13)], batch=2)


@pytest.mark.full
@pytest.mark.parametrize("batch", [1, 8])
def test_all_clips_equal_the_goldens(tiny, batch):
    assert len(GOLDENS) == 40
    agree(tiny, list(GOLDENS), batch)


@pytest.mark.full
def test_a_long_file_equals_openai_whisper(tiny):
    openai = pytest.importorskip("whisper")
    wave = torch.cat([clip(name) for name in list(GOLDENS)[:12]])
    assert len(wave) > 60 * 16000
    expected = openai.load_model(str(whisper_tiny()), device="cpu").transcribe(wave, temperature=0.0, fp16=False)
    ours = transcribe(tiny, [wave], GREEDY)[0]
    assert ours.text == expected["text"]
    assert [s.tokens for s in ours.segments] == [s["tokens"] for s in expected["segments"]]
    for mine, other in zip(ours.segments, expected["segments"], strict=True):
        assert mine.start == pytest.approx(other["start"])
        assert mine.logprob == pytest.approx(other["avg_logprob"], abs=1e-4)
        assert mine.no_speech == pytest.approx(other["no_speech_prob"], abs=1e-4)
        assert mine.compression == pytest.approx(other["compression_ratio"])
