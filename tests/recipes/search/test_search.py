"""`mm index`, `mm search` and `mm classify`, with a model that sees a picture as its mean colour."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mm.encoders.vision.image import Preprocess
from mm.errors import InputError
from mm.recipes import cli
from mm.recipes.common.files import AHEAD, Walk, read_ahead
from mm.recipes.search import embed, table
from mm.recipes.search.classify import best, choose_templates, read_labels
from mm.recipes.search.embed import Embedder
from mm.recipes.search.index import _gone, open_or_create, refresh
from mm.recipes.search.matryoshka import kept, nearest_short
from mm.recipes.search.pictures import walk
from mm.recipes.search.table import Index, Row

COLOURS = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}


class Colours(nn.Module):
    """A text is the sum of the colours that it names; the name of the model is its fingerprint."""

    kind, collate = "clip", staticmethod(torch.stack)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.spec = name, type("Spec", (), {"dim": 3})
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.preprocess = Preprocess(size=(4, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.seen = 0

    def fingerprint(self) -> str:
        return f"print-of-{self.name}"

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(word in text.split()) for word in COLOURS] for text in texts])

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return pixels.mean(dim=(2, 3))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return ids + 1e-3


def paint(path: Path, *colours: str, size: tuple[int, int] = (6, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = tuple(int(255 * sum(COLOURS[name][c] for name in colours)) for c in range(3))
    Image.new("RGB", size, rgb).save(path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    paint(tmp_path / "photos/red.png", "red")
    paint(tmp_path / "photos/sub/green.png", "green")
    paint(tmp_path / "photos/sub/it's blue.png", "blue")
    paint(tmp_path / "photos/sub/yellow.png", "red", "green", size=(9, 3))
    (tmp_path / "photos/red.txt").write_text("a red\n  wall")
    (tmp_path / "photos/notes.md").write_text("not a picture")
    return tmp_path / "photos"


@pytest.fixture
def run(monkeypatch, capsys):
    """run("index", ...) -> exit status, stdout, stderr; any model name is a `Colours` of that name."""
    monkeypatch.setattr(embed, "opened", lambda name, device, *kinds: Colours(name))

    def call(*argv: object) -> tuple[int, str, str]:
        status = cli.main([str(word) for word in argv])
        return status, *capsys.readouterr()

    return call


def update(photos: Path, to: Path, model: str = "eye") -> tuple[str, int]:
    """What a run counts and how many pictures the model saw."""
    embedder, found = Embedder(Colours(model), model), walk(photos)
    return str(refresh(open_or_create(to, embedder, found.root), embedder, found, batch=2)), embedder.clip.seen


# ------------------------------------------------------------------------------------------------- index
def test_only_what_changed_is_read_again(photos, tmp_path):
    to = tmp_path / "photos.lance"
    assert update(photos, to) == ("indexed 4, updated 0, removed 0, unchanged 0, skipped 0 (bad)", 4)
    assert update(photos, to) == ("indexed 0, updated 0, removed 0, unchanged 4, skipped 0 (bad)", 0)
    paint(photos / "red.png", "blue", size=(7, 7))
    paint(photos / "new.jpg", "red")
    (photos / "sub/it's blue.png").unlink()
    os.utime(photos / "sub/green.png", ns=(1, 1))
    assert update(photos, to) == ("indexed 1, updated 1, removed 1, unchanged 2, skipped 0 (bad)", 2)
    assert update(photos, to) == ("indexed 0, updated 0, removed 0, unchanged 4, skipped 0 (bad)", 0)
    rows = {row["path"]: row for row in Index.open(to).table.to_arrow().to_pylist()}
    assert sorted(rows) == ["new.jpg", "red.png", "sub/green.png", "sub/yellow.png"]
    assert rows["sub/green.png"]["mtime_ns"] == 1
    assert (rows["red.png"]["width"], rows["red.png"]["height"]) == (7, 7)
    np.testing.assert_allclose(rows["red.png"]["vector"], [0, 0, 1], atol=1e-6)


def test_a_caption_beside_a_picture_is_kept_without_looking_at_it_again(photos, tmp_path):
    to = tmp_path / "photos.lance"
    update(photos, to)
    assert Index.open(to).known()["red.png"]["caption"] == "a red wall"
    (photos / "red.txt").write_text("another wall")
    assert update(photos, to)[1] == 0
    assert Index.open(to).known()["red.png"]["caption"] == "another wall"


def test_bad_pictures_are_reported_counted_and_passed_over(photos, tmp_path, run):
    whole = (paint(photos / "noise.jpg", "red", size=(64, 64))).read_bytes()
    (photos / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.png").write_text("hello")
    (photos / "empty.gif").touch()
    paint(photos / "one.png", "green", size=(1, 1))
    Image.new("CMYK", (3, 3)).save(photos / "cmyk.jpg")
    Image.fromarray(np.full((3, 3), 65535, np.uint16)).save(photos / "deep.png")
    Image.new("RGB", (2, 2)).save(photos / "black.png")  # its mean colour has no direction
    status, out, err = run("index", photos, "--model", "eye", "--to", tmp_path / "a.lance")
    assert status == 0
    assert out.strip() == "indexed 8, updated 0, removed 0, unchanged 0, skipped 4 (bad); 2 other files"
    assert sorted(line.split(":")[0] for line in err.splitlines()) == [
        f"skipped {name}" for name in ("black.png", "empty.gif", "text.png", "truncated.jpg")
    ]


def test_a_picture_that_went_bad_leaves_the_index(photos, tmp_path):
    update(photos, tmp_path / "a.lance")
    (photos / "red.png").write_text("gone")
    assert update(photos, tmp_path / "a.lance")[0] == "indexed 0, updated 0, removed 1, unchanged 3, skipped 1 (bad)"
    assert "red.png" not in Index.open(tmp_path / "a.lance").known()


def test_what_lies_in_an_unreadable_folder_is_kept():
    found = Walk(root=Path("/x"), unreadable={"closed": "Permission denied"})
    assert _gone({"closed/a.png": {}, "closed-too/b.png": {}, "c.png": {}}, found) == ["closed-too/b.png", "c.png"]


def test_an_index_belongs_to_one_model_and_one_folder(photos, tmp_path, run):
    to = tmp_path / "a.lance"
    assert run("index", photos, "--model", "eye", "--to", to)[0] == 0
    status, _, err = run("index", photos, "--model", "other", "--to", to)
    assert status == 2 and "the model eye (print-of-eye), not by other (print-of-other)" in err
    paint(tmp_path / "elsewhere/x.png", "red")
    status, _, err = run("index", tmp_path / "elsewhere", "--to", to)
    assert status == 2 and str(photos) in err and "elsewhere" in err
    photos.rename(tmp_path / "moved")
    assert "unchanged 4" in run("index", tmp_path / "moved", "--to", to)[1]  # the model is remembered
    assert Index.open(to).folder == tmp_path / "moved"


@pytest.mark.parametrize("argv, words", [
    (["{tmp}/nowhere", "--to", "{tmp}/a.lance"], "does not exist; expected a folder"),
    (["{tmp}/photos/red.png", "--to", "{tmp}/a.lance"], "is a file; expected a folder"),
    (["{tmp}/none", "--to", "{tmp}/a.lance"], "holds no pictures"),
    (["{tmp}/photos", "--to", "{tmp}/photos"], "exists and is no index"),
    (["{tmp}/photos", "--to", "{tmp}/photos/red.png"], "exists and is no index"),
    (["{tmp}/photos", "--to", "{tmp}/photos/red.png/a.lance"], "a.lance: the index cannot be written"),
])
def test_index_says_what_is_wrong(photos, tmp_path, run, argv, words):
    (tmp_path / "none").mkdir()
    status, _, err = run("index", *[word.format(tmp=tmp_path) for word in argv], "--model", "eye")
    assert status == 2 and words in err and len(err.splitlines()) == 1
    assert len(walk(photos).files) == 4


def test_a_run_that_died_before_its_first_batch_is_no_obstacle(photos, tmp_path, run):
    (tmp_path / "a.lance/pictures.lance/data").mkdir(parents=True)
    embedder = Embedder(Colours("eye"), "eye")
    assert len(open_or_create(tmp_path / "a.lance", embedder, photos)) == 0
    assert run("index", photos, "--to", tmp_path / "a.lance")[1].startswith("indexed 4")
    assert Index.open(tmp_path / "a.lance").model == "eye"


def test_another_layout_of_the_index_is_refused(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "VERSION", "0")
    update(photos, tmp_path / "a.lance")
    monkeypatch.undo()
    with pytest.raises(InputError, match="layout 0, expected 1"):
        Index.open(tmp_path / "a.lance")


def test_killed_half_way_it_keeps_what_was_written(tmp_path):
    """A real model in a process of its own, killed with SIGKILL after some commits."""
    from mm.recipes.clip.settings import ImageTower, Shape, TextTower
    from mm.recipes.clip.shape import new_clip

    image = ImageTower(size=16, patch=8, width=16, depth=1, heads=2)
    shape = Shape(dim=8, image=image, text=TextTower(vocab=520, context=8, width=16, depth=1, heads=2))
    new_clip(shape, ["red green blue"]).save_pretrained(tmp_path / "model")
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(240):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"photos/{number:03d}.png")
    to, model = tmp_path / "a.lance", str(tmp_path / "model")
    argv = ["index", str(tmp_path / "photos"), "--model", model, "--to", str(to), "--batch", "1", "--device", "cpu"]
    child = subprocess.Popen([sys.executable, "-m", "mm.recipes.cli", *argv], stderr=subprocess.DEVNULL)
    versions = to / "pictures.lance/_versions"
    while not versions.is_dir() or len(list(versions.iterdir())) < 20:
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = Index.open(to).known()
    assert 10 <= len(kept) < 240
    embedder, found = Embedder.load(model, "cpu"), walk(tmp_path / "photos")
    counts = refresh(open_or_create(to, embedder, found.root), embedder, found)
    assert (counts.indexed, counts.unchanged) == (240 - len(kept), len(kept))
    index = Index.open(to)
    assert len(index) == len(index.known()) == 240
    with Image.open(tmp_path / "photos/123.png") as picture:
        vector = embedder.images([embedder.clip.preprocess(picture)])[0]
    match = index.nearest(vector, 1)[0]
    assert match.path == "123.png" and match.score == pytest.approx(1.0, abs=1e-5)


# ------------------------------------------------------------------------------------------------ search
def test_text_and_picture_find_what_is_nearest(photos, tmp_path, run):
    run("index", photos, "--model", "eye", "--to", tmp_path / "a.lance")
    status, out, _ = run("search", tmp_path / "a.lance", "a green thing", "--top", "2")
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert status == 0 and lines[0] == ["rank", "score", "path"]
    assert lines[1] == ["1", "1.0000", "sub/green.png"] and lines[2] == ["2", "0.7078", "sub/yellow.png"]
    query = paint(tmp_path / "query.png", "blue")
    answer = json.loads(run("search", tmp_path / "a.lance", "--image", query, "--json")[1])
    assert answer["model"] == "eye" and answer["pictures"] == 4 and len(answer["results"]) == 4
    first = {"rank": 1, "path": "sub/it's blue.png", "caption": None, "score": pytest.approx(1.0)}
    assert answer["results"][0] == first
    assert [hit["score"] for hit in answer["results"][1:]] == pytest.approx([0, 0, 0], abs=1e-6)


def test_the_page_links_to_the_pictures(photos, tmp_path, run):
    run("index", photos, "--model", "eye", "--to", tmp_path / "a.lance")
    assert run("search", tmp_path / "a.lance", "blue <b>", "--top", "1", "--html", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert 'src="photos/sub/it%27s%20blue.png"' in page and "blue &lt;b&gt;" in page and "<b>1.000</b>" in page
    status, _, err = run("search", tmp_path / "a.lance", "blue", "--html", tmp_path / "no/page.html")
    assert status == 2 and "cannot be written" in err


@pytest.mark.parametrize("argv, words", [
    (["{tmp}/a.lance"], "a text or --image FILE"),
    (["{tmp}/a.lance", "red", "--image", "{tmp}/photos/red.png"], "a text or --image FILE"),
    (["{tmp}/a.lance", "  "], "the query is empty"),
    (["{tmp}/a.lance", "--image", "{tmp}/photos/notes.md"], "notes.md: not a picture"),
    (["{tmp}/a.lance", "--image", "{tmp}/none.png"], "none.png: No such file"),
    (["{tmp}/photos", "red"], "is no index"),
    (["{tmp}/a.lance", "red", "--model", "other"], "the model eye (print-of-eye), not by other"),
])
def test_search_says_what_is_wrong(photos, tmp_path, run, argv, words):
    update(photos, tmp_path / "a.lance")
    status, _, err = run("search", *[word.format(tmp=tmp_path) for word in argv])
    assert status == 2 and words in err and len(err.splitlines()) == 1


def test_a_large_index_is_partitioned_and_its_scores_stay_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ANN_ROWS", 1500)
    vectors = np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = Index.create(tmp_path / "a.lance", model="m", fingerprint="f", dim=8, folder=tmp_path)
    index.put(rows(vectors[:1400]))
    index.optimize()
    assert index.table.index_stats("vector_idx") is None
    index.put(rows(vectors[1400:1900], start=1400))
    index.optimize()
    assert index.table.index_stats("vector_idx").num_indexed_rows == 1900
    index.put(rows(vectors[1900:], start=1900))  # found before they are partitioned, too
    index.remove(["5", "it's not there"])
    scores = vectors @ vectors[1950]
    scores[5] = -1
    found = Index.open(tmp_path / "a.lance").nearest(vectors[1950], 10)
    assert [int(match.path) for match in found] == np.argsort(-scores)[:10].tolist()
    np.testing.assert_allclose([match.score for match in found], np.sort(scores)[::-1][:10], atol=1e-5)
    assert found[0].path == "1950"
    with pytest.raises(InputError, match=r"shape \(8,\), the query has shape \(3,\)"):
        index.nearest(np.ones(3, np.float32), 1)
    with pytest.raises(InputError, match="no finite vector"):
        index.nearest(np.full(8, np.nan, np.float32), 1)


def test_the_first_dimensions_find_what_all_of_them_rank(tmp_path, monkeypatch):
    """Vectors as Matryoshka training leaves them, the first dimensions the weightiest."""
    monkeypatch.setattr(table, "ANN_ROWS", 1500)
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((2000, 32)) * 0.85 ** np.arange(32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    index = Index.create(tmp_path / "a.lance", model="m", fingerprint="f", dim=32, folder=tmp_path)
    index.put(rows(vectors[:1900]))
    recalls = []
    for query in vectors[draw.integers(0, 1900, 8)] + 0.05 * draw.standard_normal((8, 32)).astype(np.float32):
        scores = vectors[:1900] @ query / np.linalg.norm(query)
        found = nearest_short(index, query, 10, 8)
        best = {str(i) for i in np.argsort(-scores)[:10]}
        recalls.append(len(best & {match.path for match in found}) / 10)
        np.testing.assert_allclose([m.score for m in found], [scores[int(m.path)] for m in found], atol=1e-5)
        assert [m.score for m in found] == sorted((m.score for m in found), reverse=True)
    assert np.mean(recalls) >= 0.95 and index.table.index_stats("vector_8_idx").num_indexed_rows == 1900
    index.put(rows(vectors[1900:], start=1900))  # the column is kept up, and an open reader sees it
    assert kept(Index.open(tmp_path / "a.lance").table.schema) == [8]
    assert nearest_short(Index.open(tmp_path / "a.lance"), vectors[1950], 1, 8)[0].path == "1950"
    assert Index.open(tmp_path / "a.lance").nearest(vectors[1950], 1)[0].path == "1950"
    with pytest.raises(InputError, match="33 is more than the 32 dimensions of m"):
        nearest_short(index, vectors[0], 1, 33)


def test_search_by_the_first_dimensions_from_the_command_line(photos, tmp_path, run):
    run("index", photos, "--model", "eye", "--to", tmp_path / "a.lance")
    plain = json.loads(run("search", tmp_path / "a.lance", "red green", "--json")[1])["results"]
    short = json.loads(run("search", tmp_path / "a.lance", "red green", "--json", "--matryoshka", "3")[1])["results"]
    assert [hit["path"] for hit in short] == [hit["path"] for hit in plain]
    assert [hit["score"] for hit in short] == pytest.approx([hit["score"] for hit in plain], abs=1e-6)
    paint(photos / "new.png", "red", "green")
    run("index", photos, "--to", tmp_path / "a.lance")
    assert "new.png" in run("search", tmp_path / "a.lance", "red green", "--matryoshka", "3", "--top", "2")[1]
    status, _, err = run("search", tmp_path / "a.lance", "red", "--matryoshka", "4")
    assert status == 2 and "--matryoshka 4 is more than the 3 dimensions of eye" in err


def rows(vectors: np.ndarray, start: int = 0) -> list[Row]:
    about = {"size": 0, "mtime_ns": 0, "hash": "", "caption": None, "width": 1, "height": 1}
    return [Row(path=str(start + i), vector=vector, **about) for i, vector in enumerate(vectors)]


# ---------------------------------------------------------------------------------------------- pictures
def test_a_walk_is_sorted_and_passes_over_what_is_hidden(photos):
    paint(photos / ".thumbnails/a.png", "red")
    paint(photos / "._red.png", "red")
    paint(photos / "UPPER.PNG", "red")
    found = walk(photos)
    paths = ["UPPER.PNG", "red.png", "sub/green.png", "sub/it's blue.png", "sub/yellow.png"]
    assert [picture.path for picture in found.files] == paths
    assert found.others == 3


def test_what_is_no_plain_file_is_reported_and_not_waited_for(photos):
    os.mkfifo(photos / "pipe.png")
    (photos / "dangling.png").symlink_to(photos / "nowhere.png")
    found = walk(photos)
    assert len(found.files) == 4 and set(found.unreadable) == {"pipe.png", "dangling.png"}


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are always UTF-8")
def test_a_name_that_is_not_utf8_is_reported(photos):
    (photos / os.fsdecode(b"caf\xe9.png")).write_bytes((photos / "red.png").read_bytes())
    found = walk(photos)
    assert len(found.files) == 4 and list(found.unreadable.values()) == ["the file name is not UTF-8"]


def test_reading_ahead_keeps_the_order_hands_on_errors_and_stays_bounded():
    taken = []

    def items():
        for number in range(500):
            taken.append(number)
            yield number

    def read(number: int) -> int:
        if number == 3:
            raise InputError("three")
        return 2 * number

    ahead = read_ahead(items(), read)
    assert next(ahead) == (0, 0) and len(taken) <= AHEAD + 1
    rest = list(ahead)
    assert [number for number, _ in rest] == list(range(1, 500))
    assert str(rest[2][1]) == "three" and rest[3] == (4, 8)


# ---------------------------------------------------------------------------------------------- classify
def test_pictures_are_sorted_by_labels(photos, tmp_path, run):
    (photos / "bad.png").write_text("x")
    labels = tmp_path / "labels.txt"
    labels.write_text("green\n\nred\n  \nblue\n")
    status, out, err = run("classify", photos, "--labels", labels, "--model", "eye", "--templates", "plain", "--top", 2)
    lines = [line.split("\t") for line in out.splitlines()]
    assert status == 0 and "left out 2 blank lines" in err and "skipped bad.png" in err
    assert {line[0]: line[1] for line in lines[:3]} == {
        "red.png": "red", "sub/green.png": "green", "sub/it's blue.png": "blue"}
    assert lines[3][0] == "sub/yellow.png" and {lines[3][1], lines[3][3]} == {"red", "green"}
    assert lines[-1] == ["classified 4, skipped 1 (bad)"]
    shares = np.exp(np.exp(2.0) * np.array([1.0, 0.001, 0.001]))
    assert float(lines[0][2]) == pytest.approx(shares[0] / shares.sum(), abs=2e-3)


def test_labels_as_json_with_a_prompt_of_ones_own(photos, tmp_path, run):
    (tmp_path / "labels.txt").write_text("# red\ngreen\nblue", "utf-8-sig")
    argv = ["--labels", tmp_path / "labels.txt", "--model", "eye", "--templates", "the {} wall", "--json", "--top", "9"]
    answer = json.loads(run("classify", photos, *argv)[1])
    assert answer["labels"] == ["# red", "green", "blue"] and answer["skipped"] == 0
    first = answer["pictures"][0]
    assert first["path"] == "red.png" and first["labels"][0]["label"] == "# red"
    assert sum(label["probability"] for label in first["labels"]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("content, words", [
    (b"red\nblue\nred\n", "line 3 repeats the label 'red' of line 1"),
    (b"\n  \n", "holds no label"),
    (b"", "holds no label"),
    (b"caf\xe9\n", "not UTF-8 text"),
])
def test_a_labels_file_that_cannot_be_used(tmp_path, content, words):
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_labels(str(tmp_path / "labels.txt"))


def test_templates_by_name_or_as_given():
    assert choose_templates("a drawing of {}") == ("a drawing of {}",)
    assert len(choose_templates("photo")) > 1
    with pytest.raises(InputError, match="expected plain, photo, .* with {} for the label"):
        choose_templates("foto")


def test_best_labels_are_ranked():
    assert best(np.array([0.2, 0.5, 0.3]), ["a", "b", "c"], 2) == [("b", 0.5), ("c", 0.3)]


def test_an_unknown_device_is_one_sentence():
    from mm.recipes.common.options import choose_device

    with pytest.raises(InputError, match="--device abacus"):
        choose_device("abacus")
    assert choose_device("cpu") == torch.device("cpu")
