"""A small partner to talk with, random, whole and on disk as Kyutai lays it out, and speakers."""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import codec
import duplex
import numpy as np
import torch
from aiohttp.test_utils import TestClient, TestServer
from safetensors.torch import save_file
from torch import nn

from mm import DuplexLM, spec
from mm.codecs.spec import MimiSpec, Quantizer, Seanet
from mm.recipes.talk import protocol, sound
from mm.recipes.talk.limits import Limits
from mm.recipes.talk.partner import Partner
from mm.recipes.talk.server import Address, Server
from mm.tokenizer.tokenizer import load_tokenizer

WORDS = 40
FRAME, RATE = 1920, 24000


def words() -> bytes:
    """A sentencepiece model of a few words, with padding at 3 and the end of padding at 0, as Moshi's has."""
    import sentencepiece

    model = io.BytesIO()
    text = ["hello there my friend how are you today", "the sum of two and three is five", "naïve café"] * 20
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, vocab_size=WORDS,
                                             pad_id=3, unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False,
                                             minloglevel=2)
    return model.getvalue()


def fast(rate: int = RATE) -> MimiSpec:
    """A codec of real frames, 80 ms at 24 kHz, that costs next to nothing."""
    return MimiSpec(rate=rate, seanet=Seanet(filters=2, ratios=(8, 6, 5, 4)), encoder=codec.SPEC.encoder,
                    decoder=codec.SPEC.decoder, quantizer=Quantizer(codebooks=8, size=12, dim=16))


def lm() -> DuplexLM:
    """Four codebooks said and four heard."""
    return duplex.small(text=spec.TextStream(vocab=WORDS), delays=(0, 0, 1, 1, 1, 0, 1, 1, 1))


def partner(rate: int = RATE) -> Partner:
    torch.manual_seed(0)
    made = Partner(lm(), codec.small(fast(rate)), "small")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(words())
        made.model.tokenizer = load_tokenizer(folder)
    return made


def written(folder: Path) -> Path:
    """The same partner on disk: weights and words, and the codec in a folder of its own."""
    made = partner()
    made.model.save_pretrained(folder)
    made.codec.save_pretrained(folder / "codec")
    return folder


def speech(frames: int, seed: int = 0) -> np.ndarray:
    """(frames * FRAME,) float32"""
    return np.random.default_rng(seed).normal(0, 0.2, frames * FRAME).astype(np.float32)


def as_kyutai(folder: Path, shape: str = "moshi", **more) -> tuple[nn.Module, nn.Module]:
    """A directory as Kyutai publishes them, one config (with `more`), and every file under the name that it has there;
    and the official package's own model and codec with these weights."""
    config = duplex.settings(shape) | {"card": 64, "text_card": WORDS}
    theirs = duplex.official(config)
    duplex.write(theirs, config, folder)
    longer = codec.SETTINGS | {"transformer": codec.TRANSFORMER | {"context": 100}}  # past it, the official one errs
    mimi = codec.official(longer)
    state = {name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0", "out_proj"): value
             for name, value in mimi.state_dict().items()}
    name = "tokenizer-e351c8d8-checkpoint125.safetensors"
    save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / name)
    (folder / "mimi_config.json").write_text(json.dumps(longer))
    (folder / "tokenizer_spm_32k_3.model").write_bytes(words())
    (folder / "config.json").write_text(json.dumps(config | {
        "mimi_name": name, "mimi_config_name": "mimi_config.json", "moshi_name": "model.safetensors",
        "tokenizer_name": "tokenizer_spm_32k_3.model"} | more))
    return theirs, mimi




# ----------------------------------------------------------------------------------------- a server and its clients
@asynccontextmanager
async def served(partner: Partner, capacity: int = 2, limits: Limits | None = None, **address):
    """A client of a server that runs, and the server."""
    server = Server(partner, capacity, Address(**address), limits or Limits())
    async with TestClient(TestServer(server.app())) as client:
        yield client, server


class Speaker:
    """A client that keeps what it gets: messages by kind, sound as samples; `first` are the kinds in order."""

    def __init__(self, socket, wire):
        self.socket, self.wire = socket, wire
        self.kinds, self.told, self.text, self.errors, self.wave = [], [], "", [], np.zeros(0, np.float32)
        self.at: list[float] = []
        self.close_code = None

    @classmethod
    @asynccontextmanager
    async def joined(cls, client, query: str = "", rate: int = RATE):
        """Connected; `query` as in an address."""
        form = "pcm" if "format=pcm" in query else "opus"
        async with client.ws_connect(f"/api/chat?{query}") as socket:
            yield cls(socket, sound.wire(form, rate))

    async def say(self, wave: np.ndarray) -> None:
        if data := self.wire.said(wave):
            await self.socket.send_bytes(protocol.audio(data))

    async def listen(self, until) -> None:
        """Until `until(self)`, or the end; at most 20 s."""
        async with asyncio.timeout(20):
            while not until(self):
                message = await self.socket.receive()
                if message.type != aiohttp.WSMsgType.BINARY:
                    self.close_code = self.socket.close_code
                    return
                self.take(message.data)

    def take(self, data: bytes) -> None:
        kind, payload = protocol.parse(data)
        self.kinds.append(int(kind))
        self.at.append(time.monotonic())
        if kind == 1:
            self.wave = np.concatenate([self.wave, *self.wire.heard(payload)])
        elif kind == 2:
            self.text += payload.decode()
        elif kind == 4:
            self.told.append(json.loads(payload))
        elif kind == 5:
            self.errors.append(payload.decode())

    async def ended(self) -> str:
        """The one error before the server closed the connection."""
        await self.listen(lambda self: False)
        assert len(self.errors) == 1 and self.kinds[-1] == 5
        return self.errors[0]
