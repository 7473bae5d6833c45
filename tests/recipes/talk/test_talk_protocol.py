"""Kyutai's protocol: messages by kind, Ogg/Opus as one stream, plain samples, wishes of a query."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import InputError
from mm.recipes.talk import protocol, sound
from mm.recipes.talk.limits import Allowance
from mm.recipes.talk.protocol import Control, Kind
from mm.recipes.talk.sound import OggOpus, Samples
from mm.recipes.talk.wishes import Wishes
from mm.speech.dialogue import AUDIO, TEXT


def test_messages_byte_for_byte():
    assert protocol.HANDSHAKE == b"\x00" and protocol.PING == b"\x06"
    assert protocol.audio(b"OggS") == b"\x01OggS"
    assert protocol.text(" é") == b"\x02 \xc3\xa9"
    assert protocol.error("no") == b"\x05no"
    told = protocol.metadata({"text_topk": 25})
    assert told[0] == 4 and json.loads(told[1:]) == {"text_topk": 25}


@given(st.binary(max_size=40))
def test_any_bytes_are_a_known_message_or_passed_over(data):
    found = protocol.parse(data)
    if data and data[0] < 8:
        assert found == (Kind(data[0]), data[1:])
    else:
        assert found is None


@given(st.binary(max_size=3))
def test_any_control_is_known_or_passed_over(payload):
    assert protocol.control(payload) == (Control(payload[0]) if len(payload) == 1 and payload[0] < 4 else None)


def test_opus_is_one_ogg_stream_of_pages_of_40_ms():
    sent = OggOpus(24000)
    first, *others = [sent.said(np.zeros(1920, np.float32)) for _ in range(3)]
    pages = list(ogg(b"".join([first, *others])))
    assert pages[0][2][:8] == b"OpusHead" and pages[0][0] == 2 and pages[1][2][:8] == b"OpusTags"
    assert pages[0][2][8:10] == b"\x01\x01"  # version, channels
    assert [granule for _, granule, _ in pages[2:]] == [pages[2][1] + 1920 * i for i in range(6)]
    assert all(page.count(b"OpusHead") == 0 for page in others)


def ogg(data: bytes):
    """(flags, granule, content) of every page."""
    while data:
        assert data[:5] == b"OggS\x00"
        table = data[27 : 27 + data[26]]
        end = 27 + len(table) + sum(table)
        yield data[5], int.from_bytes(data[6:14], "little"), data[27 + len(table) : end]
        data = data[end:]


@given(st.lists(st.integers(1, 700), min_size=1, max_size=30))
def test_opus_may_be_cut_anywhere(cuts):
    wave = np.sin(np.arange(9600) / 9).astype(np.float32) * 0.5
    data, heard = OggOpus(24000).said(wave), OggOpus(24000)
    whole = np.concatenate(list(OggOpus(24000).heard(data)))
    ends = np.cumsum(cuts)
    parts = [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]
    got = np.concatenate([wave for part in parts for wave in heard.heard(part)])
    assert np.array_equal(got, whole) and len(whole) == 9600
    assert np.abs(whole[2400:-154] - wave[2400 - 154 : -308]).max() < 0.1


@pytest.mark.parametrize("data", [b"hello, this is no Ogg stream at all", bytes(4000), b"OggS" + bytes(range(200)) * 9])
def test_bytes_that_are_no_opus_are_named(data):
    with pytest.raises(InputError, match="not an Ogg/Opus stream"):
        for _ in range(2):
            list(OggOpus(24000).heard(data))


def page(serial: bytes, number: int, flags: int) -> bytes:
    """An Ogg page of 2,550 bytes of a packet that goes on."""
    head = b"OggS\x00" + bytes([flags]) + b"\xff" * 8 + serial + number.to_bytes(4, "little")
    rest, check = b"\x0a" + b"\xff" * 10 + bytes(2550), 0
    for byte in head + bytes(4) + rest:
        check ^= byte << 24
        for _ in range(8):
            check = (check << 1 ^ (0x04C11DB7 if check >> 31 else 0)) & 0xFFFFFFFF
    return head + check.to_bytes(4, "little") + rest


def test_a_packet_that_does_not_end(monkeypatch):
    monkeypatch.setattr(sound, "IDLE", 6000)
    data, wire = OggOpus(24000).said(np.zeros(1920, np.float32)), OggOpus(24000)
    serial, heard = data[14:18], []
    with pytest.raises(InputError, match="6000 bytes of an Ogg/Opus stream held no sound"):
        for part in (data, page(serial, 4, 0), page(serial, 5, 1), page(serial, 6, 1)):
            heard += [len(wave) for wave in wire.heard(part)]
    assert sum(heard) == 1920


def test_a_vorbis_stream_is_no_opus(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "a.ogg", np.zeros(24000), 24000, format="OGG", subtype="VORBIS")
    with pytest.raises(InputError, match="not an Ogg/Opus stream"):
        list(OggOpus(24000).heard((tmp_path / "a.ogg").read_bytes()))


def test_a_rate_that_opus_lacks():
    with pytest.raises(InputError, match="no rate of 22050"):
        OggOpus(22050)


def test_samples():
    wave = np.array([0, 0.5, -1, 2, -3], np.float32)
    assert Samples().said(wave) == np.array([0, 16384, -32767, 32767, -32767], "<i2").tobytes()
    [heard] = Samples().heard(Samples().said(wave))
    assert np.abs(heard - wave.clip(-1, 1)).max() < 1e-4
    with pytest.raises(InputError, match="3 bytes are not whole samples"):
        list(Samples().heard(b"abc"))


def test_wishes_as_the_web_client_sends_them():
    query = {"text_temperature": "0.9", "text_topk": "30", "audio_temperature": "0", "audio_topk": "250",
             "pad_mult": "-1.5", "text_seed": "12", "audio_seed": "34", "repetition_penalty_context": "32",
             "repetition_penalty": "1.2", "email": "someone"}
    wishes = Wishes.of(query)
    assert (wishes.text.temperature, wishes.text.top_k, wishes.text.seed) == (0.9, 30, 12)
    assert (wishes.audio.temperature, wishes.audio.top_k, wishes.audio.seed) == (0, 0, 34)
    assert (wishes.pad_mult, wishes.context, wishes.repetition_penalty) == (-1.5, 32, 1.2)
    assert set(wishes.told()) < {*query}
    plain, again = Wishes.of({}), Wishes.of({})
    assert (plain.text.temperature, plain.text.top_k) == (TEXT.temperature, TEXT.top_k)
    assert (plain.audio.temperature, plain.audio.top_k) == (AUDIO.temperature, AUDIO.top_k)
    assert plain.text.seed != again.text.seed


@pytest.mark.parametrize("name, value", [
    ("text_temperature", "hot"), ("text_temperature", "-1"), ("audio_temperature", "nan"), ("audio_temperature", "inf"),
    ("text_topk", "2.5"), ("audio_topk", "-1"), ("text_seed", "x"), ("audio_seed", "9" * 40), ("pad_mult", "1e9"),
    ("repetition_penalty", "0"), ("repetition_penalty_context", "65"), ("format", "mp3")])
def test_a_wish_that_makes_no_sense_is_named(name, value):
    with pytest.raises(InputError, match=name):
        Wishes.of({name: value})


def test_an_allowance_grows_with_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mm.recipes.talk.limits.time.monotonic", lambda: now[0])
    allowance = Allowance(3, 2, "too many")
    for _ in range(3):
        allowance.take(1)
    now[0] += 0.5
    allowance.take(1)
    with pytest.raises(InputError, match="too many"):
        allowance.take(0.5)
    now[0] += 1000
    with pytest.raises(InputError, match="too many"):
        allowance.take(3.5)
