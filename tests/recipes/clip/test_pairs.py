"""Pairs of pictures and captions from every kind of source, good and bad."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm.encoders.vision.image import read_image
from mm.errors import InputError
from mm.recipes.clip.pairs import read_pairs
from mm.recipes.data.pictures import ArrayPicture


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), colour).save(path)
    return path


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize(("name", "text"), [
    ("a.csv", 'image,caption\nx/1.png,"red, round"\nx/1.png,dot\nx/2.png,sky\n'),
    ("a.csv", "filepath\ttitle\nx/1.png\tred, round\nx/1.png\tdot\nx/2.png\tsky\n"),
    ("a.tsv", "\ufeffcaption\tsize\tpath\r\nred, round\t1\tx/1.png\r\ndot\t2\tx/1.png\r\nsky\t3\tx/2.png\r\n"),
    ("a.jsonl", '{"Image": "x/1.png", "text": ["red, round", "dot"]}\n\n{"image": "x/2.png", "text": "sky"}\n'),
])
def test_tables(tmp_path, name, text):
    pairs = read_pairs(write(tmp_path / name, text))
    assert [pair.captions for pair in pairs.items] == [("red, round", "dot"), ("sky",)]
    assert [pair.picture.name for pair in pairs.items] == [str(tmp_path / "x" / f"{i}.png") for i in (1, 2)]
    assert pairs.notes == ()


def test_empty_captions_are_counted_and_repeated_ones_kept_once(tmp_path):
    text = "image,caption\n1.png,\n1.png,dot\n1.png,  dot \n2.png,  \n3.png,a\n"
    pairs = read_pairs(write(tmp_path / "a.csv", text))
    assert [pair.captions for pair in pairs.items] == [("dot",), ("a",)]
    assert any("2 empty captions" in note for note in pairs.notes)
    assert any("1 pictures without a caption" in note for note in pairs.notes)


def test_groups_come_from_the_table_or_from_equal_captions(tmp_path):
    plain = read_pairs(write(tmp_path / "a.csv", "image,caption\n1.png,a\n2.png,b\n3.png,a\n"))
    assert [pair.group for pair in plain.items] == [0, 1, 0]
    named = read_pairs(write(tmp_path / "b.csv", "image,caption,group\n1.png,a,x\n2.png,b,x\n3.png,a,\n"))
    assert [pair.group for pair in named.items] == [0, 0, 1]


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.csv", b"image,caption\n1.png,a\n1.png,a,b\n", r"line 3: expected 2 fields .*found 3"),
    ("a.csv", b"image,caption\n1.png\n", r"line 2: expected 2 fields .*found 1"),
    ("a.csv", b"image,caption\n1.png,caf\xe9\n", r"line 2: expected UTF-8 text, found the byte 0xe9"),
    ("a.csv", "image,caption\n1.png,a\n".encode("utf-16"), r"line 1: expected UTF-8"),
    ("a.csv", b'image,caption\n1.png,"never closed\n2.png,b\n', r"line \d: unexpected end of data"),
    ("a.csv", b"file,words\n1.png,a\n", r"line 1: expected a column image or .*found file, words"),
    ("a.csv", b"image,caption\n,a\n", r"line 2: expected the path of a picture"),
    ("a.csv", b"", r"is empty"),
    ("a.csv", b"image,caption\n", r"no picture with a caption"),
    ("a.jsonl", b'{"image": "1.png", "caption": "a"}\n{"image"\n', r"line 2: not valid JSON"),
    ("a.jsonl", b"[1]\n", r"line 1: expected a JSON object"),
    ("a.jsonl", b'{"image": "1.png", "caption": 3}\n', r"line 1: expected a caption"),
    ("a.jsonl", b'{"image": "1.png"}\n', r"line 1: expected a column caption"),
    ("a.parquet", b"x", r"neither a folder nor a file"),
])
def test_a_bad_table_is_named_with_its_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_pairs(str(tmp_path / name))
    assert name in str(caught.value)


def test_a_folder_of_classes_gets_captions_from_templates(tmp_path):
    for name in ("hot_dog/1.png", "hot_dog/deep/2.jpg", "cat/3.png"):
        picture(tmp_path / name)
    write(tmp_path / "cat" / "readme.md", "not a picture")
    pairs = read_pairs(str(tmp_path), ("a {}", "the {}"))
    assert pairs.classes == ("cat", "hot dog")
    assert [(pair.group, pair.captions[1]) for pair in pairs.items] == [(0, "the cat")] + [(1, "the hot dog")] * 2


def test_a_folder_with_captions_beside_the_pictures(tmp_path):
    for name in ("1.png", "b/2.png", "3.png"):
        picture(tmp_path / name)
    write(tmp_path / "1.txt", "a dot\n\nsomething red\n")
    write(tmp_path / "b" / "2.txt", "sky")
    pairs = read_pairs(str(tmp_path))
    assert [pair.captions for pair in pairs.items] == [("a dot", "something red"), ("sky",)]
    assert any("1 pictures without a caption" in note for note in pairs.notes)


def test_folders_without_captions_or_pictures_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no picture"):
        read_pairs(str(tmp_path))
    picture(tmp_path / "1.png")
    with pytest.raises(InputError, match="sub-folder of pictures per class"):
        read_pairs(str(tmp_path))
    write(tmp_path / "1.txt", "caf\u00e9", "latin-1")
    with pytest.raises(InputError, match=r"1\.txt is not UTF-8"):
        read_pairs(str(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        read_pairs(str(tmp_path / "nowhere"))


def shard(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_shards_are_read_in_place(tmp_path):
    red, blue = (picture(tmp_path / f"{colour}.png", colour).read_bytes() for colour in ("red", "blue"))
    shard(tmp_path / "s-0.tar", {"a/1.txt": b"red one", "a/1.png": red, "a/2.png": blue, "a/2.cls": b"7"})
    shard(tmp_path / "s-1.tar", {"1.json": json.dumps({"caption": ["blue", "sky"], "id": 4}).encode(), "1.PNG": blue})
    pairs = read_pairs(str(tmp_path / "s-{0..1}.tar"))
    assert [pair.captions for pair in pairs.items] == [("red one",), ("blue", "sky")]
    assert [read_image(pair.picture.open()).getpixel((0, 0)) for pair in pairs.items] == [(255, 0, 0), (0, 0, 255)]
    assert pairs.items[0].picture.name == f"{tmp_path}/s-0.tar:a/1.png"


def test_a_damaged_member_names_shard_and_member(tmp_path):
    pairs = read_pairs(shard(tmp_path / "s.tar", {"1.txt": b"x", "1.png": b"no picture"}))
    with pytest.raises(InputError, match=r"s\.tar:1\.png"):
        read_image(pairs.items[0].picture.open())


def test_bad_shards_are_named(tmp_path):
    whole = Path(shard(tmp_path / "whole.tar", {"1.txt": b"x", "1.png": bytes(5000)}))
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:3000])
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.add(whole, "1.png")
    for name, says in (("cut", "not a whole"), ("zipped", "uncompressed"), ("absent", "does not exist")):
        with pytest.raises(InputError, match=rf"{name}\.tar.* {says}"):
            read_pairs(str(tmp_path / f"{name}.tar"))
    bad = shard(tmp_path / "bad.tar", {"1.json": b"{", "1.png": b""})
    with pytest.raises(InputError, match=r"bad\.tar:1\.json is not valid JSON"):
        read_pairs(bad)


def test_a_picture_in_memory_is_itself():
    pixels = np.full((2, 3, 3), 7, np.uint8)
    assert read_image(ArrayPicture("p", pixels).open()).size == (3, 2)
