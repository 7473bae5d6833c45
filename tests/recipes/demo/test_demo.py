"""`mm demo`: the server's answers and the page that opens from disk, over a handful of drawings."""

from __future__ import annotations

import asyncio
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image
from torch import nn

from mm.encoders.vision.image import Preprocess
from mm.errors import InputError
from mm.recipes import cli
from mm.recipes.commands import demo as command
from mm.recipes.data.emojicross import DemoPicture
from mm.recipes.demo import library, server
from mm.recipes.demo.library import Library
from mm.recipes.demo.once import PICTURE
from mm.recipes.search.embed import Embedder

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "cat": (255, 255, 0)}
FOX = Path(PICTURE).stem


class Colours(nn.Module):
    """Sees a picture as its mean colour and a text as the colours that it names."""

    collate = staticmethod(torch.stack)

    def __init__(self) -> None:
        super().__init__()
        self.spec = type("Spec", (), {"dim": 3})
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.preprocess = Preprocess(size=(4, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def fingerprint(self) -> str:
        return "colours"

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[sum(COLOURS[w][c] / 255 for w in text.split() if w in COLOURS) for c in range(3)]
                             for text in texts])

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3)) + 1e-3

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return ids + 1e-3


def drawings(side: int):
    for style in ("openmoji", "twemoji"):
        for key, name in zip(("1f534", "1f7e2", "1f535", FOX), COLOURS, strict=True):
            image = Image.new("RGB", (side, side), COLOURS[name])
            yield DemoPicture(key=key, name=f"{name} thing", style=style, image=image, licence="", package="")


@pytest.fixture
def shelf(monkeypatch, tmp_path) -> Library:
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "demo_pictures", drawings)
    monkeypatch.setattr(Embedder, "load", lambda name: Embedder(Colours(), name))
    return Library.open("colours")


def ask(shelf: Library, *requests: tuple) -> list[tuple[int, str, bytes]]:
    """Status, content type and body of (method, path, options) requests, in order."""
    async def talk() -> list[tuple[int, str, bytes]]:
        async with TestClient(TestServer(server.Server(shelf).app())) as client:
            replies = [await client.request(method, path, **options) for method, path, options in requests]
            return [(reply.status, reply.content_type, await reply.read()) for reply in replies]

    return asyncio.run(talk())


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 9), colour).save(stream, "png")
    return stream.getvalue()


def test_the_first_start_draws_and_indexes_and_the_next_does_neither(shelf, monkeypatch):
    assert len(shelf.index) == 8
    monkeypatch.setattr(library, "demo_pictures", lambda side: pytest.fail("drawn again"))
    monkeypatch.setattr(Colours, "encode_image", lambda self, pixels: pytest.fail("encoded again"))
    assert len(Library.open("colours").index) == 8


def test_drawing_that_was_cut_short_is_done_again(shelf):
    (shelf.folder / ".complete").unlink()
    (shelf.folder / "twemoji" / f"{FOX}.png").unlink()
    assert len(Library.open("colours").index) == 8


def test_words_and_pictures_are_answered(shelf):
    replies = ask(shelf, ("GET", "/search", {"params": {"text": "a green one", "top": "3"}}),
                  ("POST", "/search", {"data": png("blue")}), ("GET", "/about", {}))
    words, picture, about = (json.loads(body) for _, _, body in replies)
    assert [status for status, _, _ in replies] == [200, 200, 200]
    assert len(words["results"]) == 3 and words["seconds"] > 0
    first, second = words["results"][:2]
    assert {first["path"], second["path"]} == {"openmoji/1f7e2.png", "twemoji/1f7e2.png"}
    assert first["name"] == "green thing" and {first["style"], second["style"]} == {"OpenMoji", "Twemoji"}
    assert (first["rank"], first["score"]) == (1, pytest.approx(1.0, abs=1e-4))
    assert len(picture["results"]) == 8 and picture["results"][0]["name"] == "blue thing"
    assert about["pictures"] == 8 and "CC BY-SA 4.0" in about["licences"][0] and "CC BY 4.0" in about["licences"][1]


def test_the_page_and_the_pictures_are_served(shelf):
    page, picture = ask(shelf, ("GET", "/", {}), ("GET", "/pictures/openmoji/1f534.png", {}))
    assert page[:2] == (200, "text/html") and b"<title>" in page[2]
    assert picture[:2] == (200, "image/png") and picture[2].startswith(b"\x89PNG")


@pytest.mark.parametrize("method, path, options, status, words", [
    ("GET", "/search?text=%20", {}, 400, "the query is empty"),
    ("GET", "/search?text=red&top=0", {}, 400, "from 1 to 200, not '0'"),
    ("GET", "/search?text=red&top=many", {}, 400, "from 1 to 200, not 'many'"),
    ("POST", "/search", {"data": b"hello"}, 400, "the picture: not a picture"),
    ("POST", "/search", {"data": png("red")[:45]}, 400, "the picture"),
    ("POST", "/search", {"data": b""}, 400, "the picture"),
    ("POST", "/search", {"data": bytes(server.UPLOAD + 1)}, 413, "larger than 8 MB"),
    ("GET", "/nothing", {}, 404, "GET /nothing: Not Found"),
    ("GET", "/pictures/..%2f..%2fsecret", {}, 404, "Not Found"),
])
def test_what_goes_wrong_is_a_sentence(shelf, method, path, options, status, words):
    (shelf.folder.parent.parent / "secret").write_text("x")
    [(got, kind, body)] = ask(shelf, (method, path, options))
    assert kind == "application/json" and words in json.loads(body)["error"]
    assert got == status


def test_what_no_one_foresaw_is_a_sentence_too(shelf, monkeypatch):
    monkeypatch.setattr(Library, "by_text", lambda *_: 1 / 0)
    [(status, kind, body)] = ask(shelf, ("GET", "/search?text=red", {}))
    assert (status, kind) == (500, "application/json") and "ZeroDivisionError" in json.loads(body)["error"]


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_once_writes_a_page_that_needs_no_server(shelf, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["demo", "--once", str(out), "--model", "colours"]) == 0
    assert str(out / "index.html") in capsys.readouterr().out
    told = json.loads((out / "results.json").read_text())
    assert (told["model"], told["fingerprint"], told["pictures"]) == ("colours", "colours", 8)
    queries = {query["query"]: query for query in told["queries"]}
    assert queries["red heart"]["results"][0]["name"] == "red thing"
    assert queries["pictures/query.png"]["kind"] == "picture"
    assert queries["pictures/query.png"]["results"][0]["name"] == "cat thing"  # the fox's place holds a yellow square
    assert all((out / hit["path"]).is_file() for query in told["queries"] for hit in query["results"])
    page = (out / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) > 8 and all((out / unquote(link)).is_file() for link in links.found)
    assert "CC BY-SA 4.0" in page and "<h2>red heart</h2>" in page


def test_a_place_that_cannot_be_written_is_named(shelf, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--once", str(tmp_path / "file"), "--model", "colours"]) == 2
    assert f"--once {tmp_path / 'file'}: cannot be written" in capsys.readouterr().err
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "file"))
    assert cli.main(["demo", "--once", str(tmp_path / "out"), "--model", "colours"]) == 2
    assert "the cache cannot be written" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra_that_brings_it(shelf, monkeypatch):
    monkeypatch.setattr(library, "PACKAGES", ("no-such-package",))
    with pytest.raises(InputError, match=r"needs the package no-such-package; .*mm-torch\[demo\]"):
        Library.open("colours")


def test_the_address_is_told_and_a_taken_port_is_one_sentence(shelf, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(command.webbrowser, "open", opened.append)

    async def start_two() -> None:
        ready = asyncio.get_running_loop().create_future()
        first = asyncio.create_task(server.serve(shelf, 0, ready.set_result))
        port = int((await ready).split(":")[2].strip("/"))
        with pytest.raises(InputError, match=f"--port {port}"):
            await server.serve(shelf, port, pytest.fail)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    asyncio.run(start_two())

    async def stop_at_once(library: Library, port: int, ready) -> None:
        ready(f"http://127.0.0.1:{port}/")
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "serve", stop_at_once)
    assert cli.main(["demo", "--port", "5", "--model", "colours"]) == 0
    assert cli.main(["demo", "--port", "6", "--model", "colours", "--no-browser"]) == 0
    assert opened == ["http://127.0.0.1:5/"]
    assert "8 pictures at http://127.0.0.1:5/" in capsys.readouterr().out
