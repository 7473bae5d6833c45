"""The server of `mm talk`: conversations, their company, and clients that do wrong."""

import asyncio
import shutil
import socketserver
import subprocess
import time

import aiohttp
import numpy as np
import pytest
import talking
from talking import FRAME, Speaker, served, speech

from mm.decode.requests import TextStream
from mm.errors import InputError
from mm.recipes.commands import talk as command
from mm.recipes.talk import engine, protocol, session, sound
from mm.recipes.talk.dialogues import Dialogues
from mm.recipes.talk.limits import Limits
from mm.recipes.talk.server import Address, Server, serve, shown
from mm.recipes.talk.wishes import Wishes

GREEDY = "text_temperature=0&audio_temperature=0&format=pcm"


@pytest.fixture(scope="module")
def partner():
    return talking.partner()


def alone(partner, wave: np.ndarray, query: dict) -> tuple[np.ndarray, str]:
    """What the model says to a wave, and its text, without any server."""
    lone, words, s = Dialogues(partner, 1), TextStream(partner.model.tokenizer), partner.model.spec.text
    lone.enter("one", Wishes.of(query))
    said = [lone.step({"one": frame})["one"] for frame in wave.reshape(-1, FRAME)]
    text = "".join(words.push(one.token) for one in said if one and one.token not in (s.padding, s.word_end))
    return np.concatenate([one.wave for one in said if one]), text


def heard(wave: np.ndarray) -> np.ndarray:
    """As 16 bits keep it."""
    return np.concatenate(list(sound.Samples().heard(sound.Samples().said(wave))))


async def converse(client, wave: np.ndarray, query: str) -> Speaker:
    """All of a wave, in pieces of any size, and what comes back to it."""
    async with Speaker.joined(client, query) as speaker:
        await speaker.listen(lambda it: 4 in it.kinds)
        for piece in np.array_split(wave, 7):
            await speaker.say(piece)
        await speaker.listen(lambda it: len(it.wave) >= len(wave) - FRAME)
        await asyncio.sleep(0.1)
        return speaker


def test_a_conversation_is_what_the_model_says_alone(partner):
    async def go():
        async with served(partner) as (client, _):
            return await asyncio.gather(*(converse(client, speech(10, seed), GREEDY) for seed in (1, 2)))
    for seed, speaker in enumerate(asyncio.run(go()), 1):
        wave, text = alone(partner, heard(speech(10, seed)), {"text_temperature": "0", "audio_temperature": "0"})
        assert len(wave) == 9 * FRAME and text
        assert np.abs(speaker.wave - wave.clip(-1, 1)).max() < 1e-3
        assert speaker.text and text.startswith(speaker.text)
        assert speaker.kinds[:2] == [0, 4] and set(speaker.kinds) == {0, 1, 2, 4}
        assert speaker.told[0]["text_temperature"] == 0 and speaker.told[0]["lag"] == 1
        assert speaker.told[-1]["dropped_frames"] == 0


def test_seeds_and_temperatures_are_each_sessions_own(partner):
    async def go():
        async with served(partner, capacity=3) as (client, _):
            wave, query = speech(8), "format=pcm&text_temperature=1&audio_temperature=1&text_seed=5&audio_seed="
            return await asyncio.gather(*(converse(client, wave, query + seed) for seed in "117"))
    first, same, other = asyncio.run(go())
    assert np.array_equal(first.wave, same.wave) and first.text == same.text
    assert not np.array_equal(first.wave, other.wave)


def test_the_queue_says_its_place_and_moves(partner):
    async def go():
        async with served(partner, capacity=1, limits=Limits(queue=2)) as (client, server), \
                Speaker.joined(client) as first:
            await first.listen(lambda it: 4 in it.kinds)
            async with Speaker.joined(client) as second, Speaker.joined(client) as third:
                await second.listen(lambda it: it.told)
                await third.listen(lambda it: it.told)
                async with Speaker.joined(client) as fourth:
                    full = await fourth.ended()
                health = await (await client.get("/health")).json()
                await first.socket.close()
                await second.listen(lambda it: 0 in it.kinds)
                await third.listen(lambda it: len(it.told) == 2)
                return second, third, full, health, server
    second, third, full, health, server = asyncio.run(go())
    assert server.metrics.counts["refused"] == 1 and not server.metrics.counts["complaints"]
    assert second.told[0]["queue"] == 1 and [told["queue"] for told in third.told] == [2, 1]
    assert second.kinds[:2] == [4, 0] and 0 not in third.kinds
    assert "2 clients wait already" in full
    assert (health["live"], health["waiting"], health["capacity"]) == (1, 2, 1)
    assert server.hall.live == 0 and not server.hall.line and not server.engine.seats


BAD = {
    "no Opus": ("", [protocol.audio(b"this is no Ogg stream at all" * 4)] * 2, "not an Ogg/Opus stream"),
    "half a sample": ("format=pcm", [protocol.audio(b"123")], "not whole samples"),
    "text": ("", ["hello"], "should be binary"),
    "too long": ("", [protocol.audio(bytes(70000))], "70001 bytes is longer than 65536"),
    "too fast": ("format=pcm", [protocol.audio(bytes(48000))] * 12, "10 s of sound ahead"),
    "too much": ("format=pcm", [b"\x04" + bytes(60000)] * 20, "131072 bytes a second"),
    "too many": ("", [protocol.PING] * 900, "200 messages a second"),
    "a wish": ("text_temperature=hot", [], "text_temperature should be a number from 0 to 100, not 'hot'"),
    "a long wish": ("text_temperature=x" + "%C3%A9" * 200, [], "from 0 to 100, not 'xéé"),
}


@pytest.mark.parametrize("query, messages, words", BAD.values(), ids=BAD)
def test_who_does_wrong_is_told_and_nobody_else_suffers(partner, query, messages, words):
    async def go():
        async with served(partner) as (client, server), Speaker.joined(client, GREEDY) as good:
            await good.say(speech(3))
            await good.listen(lambda it: len(it.wave) >= 2 * FRAME)
            async with Speaker.joined(client, query) as bad:
                for message in messages:
                    if bad.socket.closed:
                        break
                    send = bad.socket.send_str if isinstance(message, str) else bad.socket.send_bytes
                    await send(message)
                sentence = await bad.ended()
            await good.say(speech(3))
            await good.listen(lambda it: len(it.wave) >= 5 * FRAME)
            return sentence, bad.close_code, good, server.metrics.counts["complaints"]
    sentence, code, good, complaints = asyncio.run(go())
    assert words in sentence and code == 1008 and complaints == 1
    assert not good.errors and good.told[-1]["dropped_frames"] == 0


def test_a_message_that_is_not_even_read(partner):
    async def go():
        async with served(partner) as (client, _), Speaker.joined(client) as bad:
            await bad.socket.send_bytes(bytes(3 << 20))
            await bad.listen(lambda it: False)
            return bad.close_code, (await client.get("/health")).status
    assert asyncio.run(go()) == (1009, 200)


def test_kinds_that_mean_nothing_are_passed_over(partner):
    async def go():
        async with served(partner) as (client, _), Speaker.joined(client, GREEDY) as speaker:
            for odd in (b"", b"\xff", b"\x08abc", b"\x02hello", b"\x04{", b"\x03", b"\x03\x09", b"\x00", b"\x06"):
                await speaker.socket.send_bytes(odd)
            await speaker.say(speech(3))
            await speaker.listen(lambda it: len(it.wave) >= 2 * FRAME)
            return speaker.errors
    assert asyncio.run(go()) == []


def test_pause_and_restart(partner):
    """What is said in a pause is not heard; after a restart the model begins as it began."""
    wave = speech(4)

    async def go():
        async with served(partner) as (client, _), Speaker.joined(client, GREEDY) as speaker:
            await speaker.say(wave)
            await speaker.listen(lambda it: len(it.wave) >= 3 * FRAME)
            await speaker.socket.send_bytes(b"\x03\x02")
            await speaker.say(speech(5, 3))
            await speaker.socket.send_bytes(b"\x03\x00")
            await speaker.socket.send_bytes(b"\x03\x03")
            await speaker.say(wave)
            await speaker.listen(lambda it: len(it.wave) >= 6 * FRAME)
            await asyncio.sleep(0.1)
            return speaker.wave
    first, second = np.split(asyncio.run(go()), 2)
    assert len(first) == 3 * FRAME and np.array_equal(first, second)


def test_who_never_sends_and_who_talks_too_long(partner, monkeypatch):
    monkeypatch.setattr(session, "KEEPALIVE", 0.05)

    async def go():
        limits = Limits(silence=0.3, session=1.5)
        async with served(partner, limits=limits) as (client, server), Speaker.joined(client, GREEDY) as silent, \
                Speaker.joined(client, GREEDY) as talker:
            async def talk():
                while not talker.socket.closed:
                    await talker.say(speech(1))
                    await asyncio.sleep(0.08)
            talking = asyncio.create_task(talk())
            ends = await asyncio.gather(silent.ended(), talker.ended())
            talking.cancel()
            return *ends, server.metrics.counts["complaints"]
    silent, talker, complaints = asyncio.run(go())
    assert complaints == 1 and silent == "nothing was heard for 0.3 s" and "lasts at most 0.025 minutes" in talker


def test_who_vanishes_leaves_the_place_to_others(partner):
    async def go():
        async with served(partner, capacity=1) as (client, server):
            async with Speaker.joined(client, GREEDY) as first:
                await first.say(speech(2))
                await first.listen(lambda it: 1 in it.kinds)
                first.socket._response.connection.transport.abort()
            async with Speaker.joined(client, GREEDY) as second:
                await second.listen(lambda it: 0 in it.kinds)
            return server.engine.is_alive()
    assert asyncio.run(go())


def slow(monkeypatch, seconds: float) -> None:
    quick = Dialogues.step

    def step(self, heard):
        time.sleep(seconds if heard else 0)
        return quick(self, heard)
    monkeypatch.setattr(Dialogues, "step", step)


def test_late_frames_are_dropped_and_told(partner, monkeypatch):
    slow(monkeypatch, 0.2)

    async def go():
        async with served(partner) as (client, server), Speaker.joined(client, GREEDY) as speaker:
            await speaker.listen(lambda it: 4 in it.kinds)
            for piece in speech(40).reshape(4, -1):
                await speaker.say(piece)
            await speaker.listen(lambda it: it.told[-1]["dropped_frames"] > 0)
            return speaker.told[-1]["dropped_frames"], server.metrics.counts["frames_dropped"]
    told, counted = asyncio.run(go())
    assert told == counted > 20


def test_a_client_that_takes_nothing_loses_frames_and_keeps_the_text(partner):
    async def go():
        async with served(partner) as (_, server):
            one = session.Session(None, Wishes(), server.engine, server.hall, Limits(unsent=3), server.pool, {})
            for i in range(5):
                one.post(engine.Spoken(np.full(4, i), f"{i} ", 0.0))
            return one
    one = asyncio.run(go())
    assert [spoken.wave[0] for spoken in one.outbox] == [2, 3, 4] and one.unsent == 2
    assert "".join(spoken.text for spoken in one.outbox) == "0 1 2 3 4 "


def test_sessions_share_steps(partner, monkeypatch):
    slow(monkeypatch, 0.02)

    async def go():
        async with served(partner, capacity=4) as (client, server):
            async def talk(delay):
                await asyncio.sleep(delay)
                async with Speaker.joined(client, GREEDY) as speaker:
                    for _ in range(15):
                        await speaker.say(speech(1))
                        await asyncio.sleep(0.08)
            await asyncio.gather(*(talk(0.019 * i) for i in range(4)))
            return server.metrics
    metrics = asyncio.run(go())
    assert metrics.counts["frames"] > 40 and metrics.counts["frames"] > 2 * sum(metrics.buckets["step_seconds"])


def test_a_step_that_fails_ends_its_sessions_and_not_the_server(partner, monkeypatch):
    good, failures = Dialogues.go, [ZeroDivisionError("once")]

    def go_wrong_once(self):
        if failures:
            raise failures.pop()
        return good(self)
    monkeypatch.setattr(Dialogues, "go", go_wrong_once)

    async def go():
        async with served(partner) as (client, _):
            async with Speaker.joined(client, GREEDY) as unlucky:
                await unlucky.say(speech(1))
                sentence = await unlucky.ended()
            return sentence, unlucky.close_code, await converse(client, speech(3), GREEDY)
    sentence, code, speaker = asyncio.run(go())
    assert "the model failed in this step" in sentence and code == 1011 and len(speaker.wave) == 2 * FRAME


def test_an_engine_that_has_stopped_is_told_to_who_talks_and_who_comes(partner, monkeypatch):
    monkeypatch.setattr(session, "KEEPALIVE", 0.05)

    async def go():
        async with served(partner) as (client, server), Speaker.joined(client, GREEDY) as there:
            await there.listen(lambda it: 4 in it.kinds)
            await asyncio.to_thread(server.engine.stop)
            async with Speaker.joined(client, GREEDY) as late:
                return await there.ended(), await late.ended(), (await client.get("/health")).status
    there, late, health = asyncio.run(go())
    assert there == late == "the engine has stopped; the server's log shows why" and health == 503


async def raw(client, headers: bytes) -> bytes:
    """The status of an answer to headers that no client library would send."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"GET /api/chat HTTP/1.1\r\nHost: here\r\n" + headers + b"\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer.split()[1]


def test_who_may_come_in(partner):
    async def go():
        async with served(partner, token="secret", origins=("https://friend.example",)) as (client, _):
            async def status(path, **headers):
                reply = await client.get(path, headers=headers)
                return reply.status, (await reply.json()).get("error", "") if reply.status > 400 else ""
            refused = await status("/api/chat?token=guess")
            foreign = await status("/api/chat?token=secret", Origin="https://evil.example")
            odd = [await raw(client, header) for header in (
                b"Authorization: Bearer \xff", b"Authorization: Bearer secret\r\nOrigin: http://[",
                b"Authorization: Bearer secret\r\nOrigin: http://\xff")]
            metrics = await status("/metrics"), (await client.get("/metrics?token=secret")).status
            for query in ("token=secret", "worker_auth_id=secret"):
                async with Speaker.joined(client, query) as speaker:
                    await speaker.listen(lambda it: it.kinds)
            async with client.ws_connect("/api/chat?token=secret", headers={"Origin": "https://friend.example"}) as it:
                friend = (await it.receive()).data
            return refused, foreign, odd, metrics, speaker.kinds, friend, (await client.get("/health")).status
    refused, foreign, odd, metrics, kinds, friend, health = asyncio.run(go())
    assert odd == [b"401", b"403", b"403"]
    assert refused[0] == 401 and "?token=" in refused[1]
    assert foreign[0] == 403 and "evil.example' may not connect" in foreign[1]
    assert metrics[0][0] == 401 and metrics[1] == 200 and kinds[0] == 0 and friend == b"\x00" and health == 200


def test_https_and_another_page(partner, tmp_path):
    """As `mm talk --cert --key --static` serves them."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, which makes the certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-subj", "/CN=localhost", "-out", cert, "-keyout", key], check=True, capture_output=True)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "index.html").write_text("theirs")
    (tmp_path / "dist" / "app.js").write_text("1")
    args = command.Talk(cert=cert, key=key, static=tmp_path / "dist", port=0)
    server, ready = Server(partner, 1, command.address_of(args)), []

    async def go():
        serving = asyncio.create_task(serve(server, ready.append))
        while not ready and not serving.done():
            await asyncio.sleep(0.01)
        async with aiohttp.ClientSession(ready[0], connector=aiohttp.TCPConnector(ssl=False)) as client:
            pages = [await (await client.get(path)).text() for path in ("/", "/app.js")]
            status = (await client.get("/../cert.pem")).status
            async with client.ws_connect("/api/chat") as socket:
                first = (await socket.receive()).data
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return pages, status, first
    pages, status, first = asyncio.run(go())
    assert ready[0].startswith("https://localhost:") and pages == ["theirs", "1"] and status == 404
    assert first == b"\x00" and not server.engine.is_alive()


@pytest.mark.parametrize("host, seen", [("0.0.0.0", "localhost"), ("::1", "localhost"), ("fe80::1", "[fe80::1]"),
                                         ("box.lan", "box.lan")])
def test_the_address_that_is_shown(host, seen):
    assert shown(host) == seen


def test_a_port_that_is_taken(partner):
    async def go():
        with socketserver.TCPServer(("127.0.0.1", 0), None) as other:
            await serve(Server(partner, 1, Address(port=other.server_address[1])), print)
    with pytest.raises(InputError, match="--host 127.0.0.1 --port"):
        asyncio.run(go())


def test_metrics_are_prometheus_text(partner):
    async def go():
        async with served(partner) as (client, _):
            await converse(client, speech(5), GREEDY)
            reply = await client.get("/metrics")
            return reply.content_type, await reply.text()
    kind, text = asyncio.run(go())
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert kind == "text/plain" and values["mm_talk_frames_total"] == "5" and values["mm_talk_sessions_total"] == "1"
    assert values['mm_talk_step_seconds_bucket{le="+Inf"}'] == values["mm_talk_step_seconds_count"] == "5"
    assert float(values["mm_talk_memory_bytes"]) > 1e6 and values["mm_talk_live"] == "0"


def test_a_server_that_is_stopped_says_so(partner):
    async def go():
        async with served(partner, capacity=1) as (client, server), Speaker.joined(client, GREEDY) as speaker:
            await speaker.listen(lambda it: 4 in it.kinds)
            async with Speaker.joined(client, GREEDY) as waiting:
                await waiting.listen(lambda it: it.told)
                closing = asyncio.create_task(server.close(None))
                ends = await asyncio.gather(speaker.ended(), waiting.ended())
                await closing
                return ends, speaker.close_code, server.engine.is_alive(), (await client.get("/health")).status
    ends, code, alive, health = asyncio.run(go())
    assert ends == ["the server is being stopped"] * 2 and code == 1001 and not alive and health == 503


def test_nothing_that_was_said_is_logged(partner, caplog):
    async def go():
        async with served(partner) as (client, _):
            return await converse(client, speech(6), GREEDY)
    with caplog.at_level("DEBUG", "mm.talk"):
        speaker = asyncio.run(go())
    assert speaker.text and caplog.messages
    assert all(speaker.text.strip() not in message for message in caplog.messages)


