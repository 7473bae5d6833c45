"""Reading pictures of every kind, and preprocessing against open_clip and transformers."""

import io
import json
import struct
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm.encoders.vision import image as module
from mm.encoders.vision.image import Preprocess, read_image
from mm.errors import InputError

transform = pytest.importorskip("open_clip.transform")
transformers = pytest.importorskip("transformers")

SHAPES = [(300, 400), (401, 301), (1, 1), (8, 2000), (2000, 8), (64, 64), (67, 64), (37, 53), (231, 511)]


def noise(height, width, channels=3, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- preprocessing against the references

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(64, 64), (96, 40), (31, 48)])
def test_equals_open_clip(shape, mode, size):
    picture = Image.fromarray(noise(*shape))
    config = {"resize_mode": mode, "interpolation": "bilinear", "fill_color": 77, "std": [0.1, 0.2, 0.3]}
    ours = Preprocess(**module.files.from_open_clip(
        {"model_cfg": {"vision_cfg": {"image_size": list(size)}}, "preprocess_cfg": config}))
    reference = transform.image_transform_v2(transform.PreprocessCfg(size=size, **config), is_train=False)
    try:
        expected = reference(picture)
    except ValueError:  # a side that rounds to no pixel at all
        assert mode == "longest" and max(shape) == 2000 and ours(picture).shape == (3, *size)
        return
    assert torch.equal(ours(picture), expected)


PROCESSORS = [
    ("clip", {}), ("clip", {"size": {"shortest_edge": 70}, "crop_size": {"height": 64, "width": 64}}),
    ("clip", {"size": {"shortest_edge": 40}, "crop_size": {"height": 64, "width": 51}}),
    ("clip", {"size": {"height": 64, "width": 48}, "do_center_crop": False}),
    ("clip", {"size": {"height": 64, "width": 48}, "crop_size": {"height": 33, "width": 60}, "resample": 2}),
    ("clip", {"do_resize": False, "crop_size": {"height": 50, "width": 50}, "do_normalize": False}),
    ("clip", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_rescale": False}),
    ("clip", {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1], "resample": 1,
              "size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}),
    ("siglip", {"size": {"height": 64, "width": 64}}), ("vit", {"size": {"height": 48, "width": 64}}),
    ("bit", {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}})]


def pil_processor(kind, settings):
    from importlib import import_module

    found = import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
    return getattr(found, {"clip": "CLIP", "siglip": "Siglip", "vit": "ViT", "bit": "Bit"}[kind] + "ImageProcessorPil")(
        **settings)


@pytest.mark.parametrize(("kind", "settings"), PROCESSORS)
def test_equals_transformers(tmp_path, kind, settings):
    processor = pil_processor(kind, settings)
    processor.save_pretrained(tmp_path)
    ours = Preprocess.from_files(tmp_path)
    for shape in SHAPES:
        picture = Image.fromarray(noise(*shape))
        assert torch.equal(ours(picture), processor(picture, return_tensors="pt")["pixel_values"][0])
    if ours.fill == 0:  # what we write back reads as the same
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(ours.to_hf()))
        assert Preprocess.from_files(tmp_path) == ours


def test_the_torchvision_processor_is_one_grey_level_away():
    processor = transformers.CLIPImageProcessor()
    ours = Preprocess(size=(224, 224), crop="floor")
    for shape in [(300, 400), (37, 53), (8, 2000)]:
        expected = processor(Image.fromarray(noise(*shape)), return_tensors="pt")["pixel_values"][0]
        gap = (ours(noise(*shape)) - expected).abs()
        assert gap.max() < 2.1 / 255 / min(ours.std) and gap.mean() < 1e-3


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
       resize=st.sampled_from(["shortest", "longest", "squash", "none"]), crop=st.sampled_from(["round", "floor"]))
def test_every_picture_ends_up_in_one_size(height, width, size, resize, crop):
    out = Preprocess(size=size, resize=resize, crop=crop)(noise(height, width))
    assert out.shape == (3, *size) and out.dtype == torch.float32 and out.isfinite().all() and out.is_contiguous()


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_opaque_pictures_of_other_modes_equal_open_clip(mode):
    picture = Image.fromarray(noise(90, 70)).convert(mode)
    reference = transform.image_transform(32, is_train=False)
    assert torch.equal(Preprocess(size=(32, 32))(picture), reference(picture))


def test_a_sliver_is_cut_before_it_is_resized(monkeypatch):
    picture = Image.fromarray(np.linspace(0, 255, 30 * 4000 * 3).reshape(30, 4000, 3).astype(np.uint8))
    preprocess = Preprocess(size=(64, 64))
    whole = preprocess(picture)
    monkeypatch.setattr(module, "LARGE", 1000)
    assert (preprocess(picture) - whole).abs().max() < 1.1 / 255 / min(preprocess.std)
    longest = replace(preprocess, resize="longest", fill=9)
    part = longest(picture)
    monkeypatch.undo()
    assert torch.equal(part, longest(picture))


def test_a_sliver_too_long_for_memory():
    out = Preprocess(size=(224, 224))(np.zeros((1, 200_000), dtype=np.uint8))
    assert out.shape == (3, 224, 224) and torch.allclose(out[0], torch.tensor(-0.48145466 / 0.26862954))


def test_batches():
    preprocess = Preprocess(size=(16, 16))
    pictures = [noise(20, 30), Image.fromarray(noise(5, 5)), encoded(Image.fromarray(noise(40, 8)))]
    assert torch.equal(preprocess.batch(pictures), torch.stack([preprocess(p) for p in pictures]))
    assert preprocess.batch([]).shape == (0, 3, 16, 16)


# --- the files

def test_every_file_reads_back(tmp_path):
    ours = Preprocess(size=(32, 48), resize="longest", edge=(30, 40), interpolation="box", fill=3, mean=(0, 0.5, 1))
    (tmp_path / "preprocess.json").write_text(json.dumps(ours.to_mm()))
    assert Preprocess.from_files(tmp_path) == ours
    (tmp_path / "preprocess.json").unlink()
    ours = Preprocess(size=(32, 48), resize="squash", interpolation="bilinear", std=(0.1, 0.2, 0.3))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": {"vision_cfg": {"image_size": [32, 48]}}, "preprocess_cfg": ours.to_open_clip()}))
    assert Preprocess.from_files(tmp_path) == ours


def test_old_and_bare_files(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
                                "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 224}))
    assert Preprocess.from_files(tmp_path) == Preprocess(size=(224, 224), crop="floor")
    path.write_text(json.dumps({"image_processor_type": "ViTImageProcessor", "size": 96}))
    assert Preprocess.from_files(tmp_path) == Preprocess(
        size=(96, 96), resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, crop="floor")
    path.unlink()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {"image_size": 240}}}))
    assert Preprocess.from_files(tmp_path) == Preprocess(size=(240, 240))


def test_newer_transformers_files(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({
        "image_processor": transformers.CLIPImageProcessor().to_dict(), "processor_class": "CLIPProcessor"}))
    assert Preprocess.from_files(tmp_path) == Preprocess(size=(224, 224), crop="floor")


def test_a_directory_that_says_nothing(tmp_path):
    assert Preprocess.from_files(tmp_path, (96, 64)) == Preprocess(size=(96, 64))
    with pytest.raises(InputError, match="tells a picture size"):
        Preprocess.from_files(tmp_path)


@pytest.mark.parametrize(("name", "content", "told"), [
    ("preprocess.json", "{", "not a readable"), ("preprocess.json", "3", "not a readable"),
    ("preprocess.json", '{"size": [8, 8], "sharpen": 1}', "sharpen"),
    ("preprocess.json", '{"fill": 1}', "size is missing"),
    ("preprocess.json", '{"size": [8]}', "size"), ("preprocess.json", '{"size": [8, 8], "std": [1, 0, 1]}', "std"),
    ("preprocess.json", '{"size": [8, 8], "mean": [NaN, 0, 0]}', "mean"), ("preprocess.json", '{"size": "8"}', "size"),
    ("preprocess.json", '{"size": [8, 8], "resize": "stretch"}', "resize"),
    ("preprocess.json", '{"size": [8, 8], "fill": 300}', "fill"),
    ("preprocessor_config.json", '{"do_pad": true}', "do_pad"),
    ("preprocessor_config.json", '{"do_flip_channel_order": true}', "do_flip_channel_order"),
    ("preprocessor_config.json", '{"do_center_crop": false}', "do_center_crop"),
    ("preprocessor_config.json", '{"resample": 9}', "resample"),
    ("preprocessor_config.json", '{"size": {"max_height": 3, "max_width": 3}}', "max_height"),
    ("preprocessor_config.json", '{"image_processor_type": "OddImageProcessor"}', "OddImageProcessor"),
    ("preprocessor_config.json", '{"size": {"shortest_edge": "x"}}', "x"),
    ("preprocessor_config.json", "[]", "not a readable"),
    ("processor_config.json", "{}", "image_processor"),
    ("open_clip_config.json", '{"preprocess_cfg": {"crop_pct": 0.9}}', "crop_pct"),
    ("open_clip_config.json", '{"preprocess_cfg": {"mode": "L"}}', "mode"),
    ("open_clip_config.json", '{"model_cfg": {"vision_cfg": {"image_size": [1, 2, 3]}}}', "size")])
def test_unknown_settings_are_named(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=told) as error:
        Preprocess.from_files(tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize("fields", [{"resize": "longest"}, {"fill": 5}, {"edge": (8, 9)}])
def test_what_transformers_cannot_say(fields):
    with pytest.raises(InputError, match="transformers"):
        Preprocess(size=(8, 8), **fields).to_hf()


@pytest.mark.parametrize("fields", [{"resize": "none"}, {"edge": (9, 9)}, {"interpolation": "box"}, {"rescale": 1.0}])
def test_what_open_clip_cannot_say(fields):
    with pytest.raises(InputError, match="open_clip"):
        Preprocess(size=(8, 8), **fields).to_open_clip()


# --- reading

def test_sources_agree(tmp_path):
    pixels = noise(20, 30)
    picture = Image.fromarray(pixels)
    path = tmp_path / "a.png"
    picture.save(path)
    with path.open("rb") as file:
        sources = [path, str(path), path.read_bytes(), file, picture, pixels]
        for source in sources:
            got = read_image(source)
            assert got.mode == "RGB" and np.array_equal(np.asarray(got), pixels)


def test_arrays():
    pixels = noise(4, 5)
    for same in (pixels / 255, (pixels / 255).astype(np.float32), pixels.astype(np.uint16) * 257):
        assert np.array_equal(np.asarray(read_image(same)), pixels)
    grey = noise(4, 5, 1)
    assert np.array_equal(np.asarray(read_image(grey))[..., 1], grey)
    assert np.array_equal(np.asarray(read_image(grey[..., None]))[..., 2], grey)
    assert np.asarray(read_image(grey > 127)).max() == 255


def test_sixteen_bits_are_scaled_and_not_clipped():
    deep = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    for source in (encoded(Image.fromarray(deep)), encoded(Image.fromarray(deep), "TIFF"), Image.fromarray(deep),
                   Image.fromarray(deep.astype(np.int32)), Image.fromarray((deep / 65535).astype(np.float32)),
                   Image.fromarray((deep / 257).astype(np.float32))):
        assert np.asarray(read_image(source))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparent_parts_are_white():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (10, 20, 30, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    got = np.asarray(read_image(encoded(rgba)))
    assert got[0, 0].tolist() == [10, 20, 30] and got[3, 3].tolist() == [255] * 3 and got[0, 1].tolist() == [127] * 3
    for mode in ("LA", "PA"):
        assert np.asarray(read_image(rgba.convert(mode)))[3, 3].tolist() == [255] * 3
    palette = Image.fromarray(noise(4, 4, 1)).convert("P")
    key = palette.getpixel((2, 2))
    got = np.asarray(read_image(encoded(palette, transparency=key)))
    assert got[2, 2].tolist() == [255] * 3
    keyed = Image.new("RGB", (2, 1), (9, 9, 9))
    keyed.putpixel((1, 0), (1, 2, 3))
    assert np.asarray(read_image(encoded(keyed, transparency=(1, 2, 3))))[0].tolist() == [[9] * 3, [255] * 3]


def test_other_modes():
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV"):
        kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode)
        picture = Image.new("RGB", (16, 16), (255, 0, 0)).convert(mode)
        got = read_image(encoded(picture, kind) if kind else picture)
        assert got.mode == "RGB" and got.size == (16, 16)
        if mode in ("P", "CMYK", "YCbCr", "HSV"):
            assert np.abs(np.asarray(got)[8, 8].astype(int) - [255, 0, 0]).max() <= 3


def test_the_first_frame_of_a_moving_picture():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(read_image(data))[4, 4].astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation):
    upright = Image.fromarray(noise(16, 24))
    turned = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])
    for method in turned:
        upright_turned = upright.transpose(Image.Transpose(method))
    stored = upright_turned if turned else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read_image(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(got), np.asarray(upright))


def test_files_that_are_no_pictures_are_named(tmp_path):
    files = {"empty.png": b"", "notes.txt": b"hello", "cut.jpg": encoded(Image.fromarray(noise(64, 64)), "JPEG")[:700],
             "cut.png": encoded(Image.fromarray(noise(64, 64)))[:3000], "cut.gif": b"GIF89a\x01"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="none.png: no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="cannot be decoded"):
        read_image(tmp_path)


def test_hostile_pictures():
    def chunk(kind, data):
        import zlib
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(InputError, match="too large a picture"):
        read_image(bomb)
    with pytest.raises(InputError, match="0 x 5 pixels"):
        read_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(("array", "told"), [
    (np.zeros((2, 2, 2), np.uint8), r"\(2, 2, 2\)"), (np.zeros((0, 4, 3), np.uint8), "empty"),
    (np.full((2, 2), np.nan), "nan"), (np.full((2, 2), 7.0), "run from 7"), (np.zeros((2, 2), np.int64), "int64"),
    (np.zeros((2, 2), complex), "complex"), (np.zeros(3, np.uint8), r"\(3,\)")])
def test_wrong_arrays(array, told):
    with pytest.raises(InputError, match=told):
        read_image(array)


def test_wrong_sources_and_depths():
    with pytest.raises(InputError, match="got int"):
        read_image(3)
    with pytest.raises(InputError, match="got Tensor"):
        read_image(torch.zeros(3, 4, 4))
    with pytest.raises(InputError, match="expected 0 to 65535"):
        read_image(Image.fromarray(np.array([[70000]], np.int32)))
    with pytest.raises(InputError, match="nan"):
        read_image(Image.fromarray(np.array([[np.nan]], np.float32)))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]), st.randoms(use_true_random=False))
def test_damaged_pictures_never_crash(kind, random):
    data = bytearray(encoded(Image.fromarray(noise(12, 9)), kind))
    for _ in range(random.randint(1, 6)):
        data[random.randrange(len(data))] = random.randrange(256)
    del data[random.choice([len(data), random.randrange(len(data))]):]
    with pytest.MonkeyPatch.context() as patch, suppress(InputError):
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
        assert read_image(bytes(data)).mode == "RGB"
