"""`mm index` and `mm search` on a folder of texts, with a model that counts words and with all-MiniLM-L6-v2."""

import json
import os

import pytest
import torch
from installed import minilm

from mm.errors import InputError
from mm.recipes import cli
from mm.recipes.search import embed
from mm.recipes.search.embed import SentenceEmbedder
from mm.recipes.search.index import open_or_create, refresh
from mm.recipes.search.table import Index
from mm.recipes.search.texts import Passage, passages, walk

WORDS = ("cat", "dog", "boat", "tree")


class Counter:
    """A sentence encoder whose vector counts words; it reads 12 tokens, a word each."""

    kind, pooling, dim, room = "encoder", True, len(WORDS), 12
    tokenizer = type("Splitter", (), {"encode": staticmethod(str.split)})

    def __init__(self) -> None:
        self.seen: list[str] = []

    def fingerprint(self) -> str:
        return "print"

    def encode(self, texts: list[str]) -> torch.Tensor:
        self.seen += texts
        return torch.tensor([[float(text.lower().split().count(word)) for word in WORDS] for text in texts])


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("A cat here.\n\nAnd a dog there.\n\nThen one more cat and a cat on the boat.\n")
    (folder / "sub" / "it's b.md").write_text("# Boats\n\nthe boat of a dog\n\n## Trees\n\ntree tree\n")
    (folder / "c.jsonl").write_text('{"text": "boat tree"}\n\n{"messages": [{"role": "user", "content": "dog?"}, '
                                    '{"role": "assistant", "content": "a dog tree"}]}\n')
    (folder / "photo.png").write_bytes(b"")
    return folder


def update(notes, to):
    """What a run counts and which passages the model saw."""
    embedder, found = SentenceEmbedder(Counter(), "counter"), walk(notes)
    return str(refresh(open_or_create(to, embedder, found.root), embedder, found, batch=2)), embedder.encoder.seen


def held(to):
    rows = Index.open(to).table.to_arrow().to_pylist()
    return sorted((row["path"], row["part"], row["line"], row["caption"]) for row in rows)


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr(embed, "opened", lambda name, device, *kinds: Counter())

    def call(*argv):
        status = cli.main([str(word) for word in argv])
        return status, *capsys.readouterr()
    return call


# ------------------------------------------------------------------------------------------------ passages
def cut(text, longest=5, name="x.txt"):
    return passages(text if isinstance(text, bytes) else text.encode(), name, lambda words: len(words.split()), longest)


def test_paragraphs_share_a_passage_while_they_fit():
    assert cut("one two\n  three\n\nfour five\n\n\nsix\n") == [
        Passage("one two\nthree\n\nfour five", 1), Passage("six", 7)]


def test_a_heading_begins_a_passage():
    assert cut("intro\n\n# Title\n\ntext\n\n#hash is none\n") == [
        Passage("intro", 1), Passage("# Title\n\ntext", 3), Passage("#hash is none", 7)]


def test_long_paragraphs_are_cut_after_sentences_and_long_sentences_between_words():
    text = 'Two words. He said "three more words!" Done?\nOne sentence that is too long for any passage. End.'
    found = cut(text, 6)
    assert [one.text for one in found] == [
        'Two words.', 'He said "three more words!" Done?', "One sentence that is too long", "for any passage. End."]
    assert [one.line for one in found] == [1, 1, 2, 2]
    assert " ".join(" ".join(one.text for one in found).split()) == " ".join(text.split())
    assert all(len(one.text.split()) <= 6 for one in found)


def test_nothing_is_lost_of_any_text():
    text = "\ufeffa\r\nb\r\r\n" + "w" * 450 + " 你好。再见！ . ... \n\n  \t\n ?x"
    for longest in (1, 2, 7, 1000):
        found = cut(text.encode(), longest)
        assert "".join("".join(one.text for one in found).split()) == "".join(text[1:].split())


@pytest.mark.parametrize("name, data, told", [
    ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8 text \(byte 3\)"), ("a.md", b"", "holds no words"),
    ("a.md", b" \n\t\n", "holds no words"), ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl: line 2: "),
    ("a.jsonl", b'{"title": "x"}', "line 1: expected text")])
def test_files_that_cannot_be_used(name, data, told):
    with pytest.raises(InputError, match=told):
        cut(data, name=name)


# ------------------------------------------------------------------------------------------------ index
def test_only_what_changed_is_read_again(notes, tmp_path):
    to = tmp_path / "notes.lance"
    counts, seen = update(notes, to)
    assert counts == "indexed 3, updated 0, removed 0, unchanged 0, skipped 0 (bad)" and len(seen) == 6
    assert held(to)[:2] == [("a.txt", 0, 1, "A cat here.\n\nAnd a dog there."),
                            ("a.txt", 1, 5, "Then one more cat and a cat on the boat.")]
    assert [row[:3] for row in held(to)[2:4]] == [("c.jsonl", 0, 1), ("c.jsonl", 1, 3)]
    assert update(notes, to) == ("indexed 0, updated 0, removed 0, unchanged 3, skipped 0 (bad)", [])
    (notes / "a.txt").write_text("tree\n")
    (notes / "c.jsonl").unlink()
    (notes / "new.md").write_text("dog")
    os.utime(notes / "sub" / "it's b.md", ns=(1, 1))
    assert update(notes, to) == ("indexed 1, updated 1, removed 1, unchanged 1, skipped 0 (bad)", ["tree", "dog"])
    assert [row[:3] for row in held(to)] == [
        ("a.txt", 0, 1), ("new.md", 0, 1), ("sub/it's b.md", 0, 1), ("sub/it's b.md", 1, 5)]
    assert Index.open(to).known()["sub/it's b.md"]["mtime_ns"] == 1
    assert update(notes, to)[0] == "indexed 0, updated 0, removed 0, unchanged 3, skipped 0 (bad)"


def test_what_cannot_be_read_is_reported_counted_and_leaves_the_index(notes, tmp_path, run):
    to = tmp_path / "notes.lance"
    assert run("index", notes, "--model", "counter", "--to", to)[1].endswith("; 1 other files\n")
    (notes / "a.txt").write_bytes(b"caf\xe9")
    (notes / "empty.txt").touch()
    (notes / "sub" / "it's b.md").write_text("nothing that it knows")  # a vector of zeros has no direction
    status, out, err = run("index", notes, "--to", to)
    assert status == 0 and out.startswith("indexed 0, updated 0, removed 2, unchanged 1, skipped 3 (bad)")
    assert sorted(line.split(":")[0] for line in err.splitlines()) == [
        "skipped a.txt", "skipped empty.txt", "skipped sub/it's b.md"]
    assert {row[0] for row in held(to)} == {"c.jsonl"}


# ------------------------------------------------------------------------------------------------ search
def test_search_shows_where_a_passage_begins_and_how(notes, tmp_path, run):
    to = tmp_path / "notes.lance"
    run("index", notes, "--model", "counter", "--to", to)
    status, out, _ = run("search", to, "cat cat boat", "--top", "2")
    lines = [line.strip() for line in out.splitlines()]
    assert status == 0 and lines[1:3] == ["1  0.8944  a.txt:5", "Then one more cat and a cat on the boat."]
    answer = json.loads(run("search", to, "dog tree", "--top", "1", "--json")[1])
    assert answer["passages"] == 6 and "pictures" not in answer
    assert answer["results"] == [{"rank": 1, "score": pytest.approx(1.0), "path": "c.jsonl", "line": 3,
                                  "caption": "dog?\n\na dog tree"}]
    short = json.loads(run("search", to, "dog tree", "--top", "1", "--json", "--matryoshka", "4")[1])
    assert short["results"][0]["path"] == "c.jsonl" and short["results"][0]["line"] == 3


@pytest.mark.parametrize("argv, told", [
    (["{to}", "--image", "x.png"], "is an index of texts"),
    (["{to}", "cat", "--html", "x.html"], "is an index of texts"),
    (["{to}", " "], "the query is empty")])
def test_search_says_what_is_wrong(notes, tmp_path, run, argv, told):
    update(notes, tmp_path / "a.lance")
    status, _, err = run("search", *[word.format(to=tmp_path / "a.lance") for word in argv])
    assert status == 2 and told in err and len(err.splitlines()) == 1


def test_a_folder_without_texts(tmp_path, run):
    status, _, err = run("index", tmp_path, "--model", "counter", "--to", tmp_path / "a.lance")
    assert status == 2 and "holds no texts" in err


def test_the_real_model_finds_what_is_meant(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    for name, text in {"garden.md": "# Garden\n\nWater the tomatoes in the evening.",
                       "bank.txt": "Open an account at the branch in the high street.",
                       "code.txt": "Sort the list before you search it."}.items():
        (tmp_path / "notes" / name).write_text(text)
    to = str(tmp_path / "notes.lance")
    assert cli.main(["index", str(tmp_path / "notes"), "--model", str(minilm()), "--to", to, "--device", "cpu"]) == 0
    for question, path in (("when do vegetables get a drink?", "garden.md"), ("where can I keep my money", "bank.txt"),
                           ("algorithms", "code.txt")):
        capsys.readouterr()
        assert cli.main(["search", to, question, "--top", "1", "--device", "cpu"]) == 0
        assert f"{path}:1" in capsys.readouterr().out
