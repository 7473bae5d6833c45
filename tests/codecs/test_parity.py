"""Mimi against the official package and transformers, with re-drawn weights; layouts in every direction."""

import json
from pathlib import Path

import codec
import pytest
import torch
from safetensors.torch import load_file
from support import close

from mm.codecs import Mimi
from mm.errors import InputError

GOLDENS = Path(__file__).parent / "goldens"
FRAME = 1920
FULL = pytest.mark.full


@pytest.fixture(autouse=True)
def no_grad(monkeypatch):
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    with torch.no_grad():
        yield


@pytest.fixture
def moshi():
    return pytest.importorskip("moshi", reason="the official package; goldens are compared elsewhere")


def alike(ours: Mimi, wave, latents, codes, decoded) -> None:
    """Latents (B, T, D) within 1e-5, waves (B, C, L) within 1e-6 relative to their norm (at full size each side is
    about 0.7e-6 away from float64), codes (B, Q, T) equal."""
    assert (ours.latents(wave) - latents).abs().max() <= 1e-5 * max(1, latents.abs().max())
    assert (ours.decode(codes) - decoded).norm() <= 1e-6 * decoded.norm()
    codec.same_codes(ours, latents, ours.encode(wave, codebooks=codes.shape[1]), codes)


def by_official(model, wave):
    codes = model.encode(wave)
    return model.encode_to_latent(wave, quantize=False).transpose(1, 2), codes, model.decode(codes)


def by_peer(model, wave):
    codes = model.encode(wave).audio_codes
    return model.encoder(wave).latents.transpose(1, 2), codes, model.decode(codes).audio_values


@pytest.mark.parametrize("in_memory", [False, True])
def test_official(moshi, tmp_path, in_memory):
    model, wave = codec.official(), codec.wave(2, 40 * FRAME)
    folder = codec.write_kyutai(model, tmp_path / "kyutai", in_memory=in_memory)
    alike(Mimi.from_pretrained(folder), wave, *by_official(model, wave))


def test_official_with_more_residual_blocks_and_other_strides(moshi, tmp_path):
    seanet = codec.SEANET | {"n_residual_layers": 2, "ratios": [5, 2], "compress": 4, "kernel_size": 5}
    settings = codec.SETTINGS | {"seanet": seanet, "sample_rate": 300, "frame_rate": 10}
    model = codec.official(settings)
    ours = Mimi.from_pretrained(codec.write_kyutai(model, tmp_path / "kyutai", settings))
    assert (ours.spec.frame, ours.spec.stride) == (30, 3)
    wave = codec.wave(1, 30 * 20)
    alike(ours, wave, *by_official(model, wave))


@pytest.mark.parametrize("samples", [1, 100, 960, 1919, 1921, 2 * FRAME + 961])
def test_official_length_rule(moshi, tmp_path, samples):
    model, wave = codec.official(), codec.wave(1, samples)
    ours = Mimi.from_pretrained(codec.write_kyutai(model, tmp_path / "kyutai"))
    close(ours.latents(wave), model.encode_to_latent(wave, quantize=False).transpose(1, 2))


@pytest.mark.parametrize("samples", [1, 3, 100, 960, 1919, 1921, 2 * FRAME + 961, 20 * FRAME])
def test_transformers_length_rule(tmp_path, samples):
    model, wave = codec.peer(), codec.wave(1, samples)
    model.save_pretrained(tmp_path)
    latents = model.encoder(wave).latents.transpose(1, 2)
    close(Mimi.from_pretrained(tmp_path).latents(wave, padding="layer"), latents)


def test_transformers(tmp_path):
    model, wave = codec.peer(), codec.wave(2, 40 * FRAME)
    model.save_pretrained(tmp_path)
    alike(Mimi.from_pretrained(tmp_path), wave, *by_peer(model, wave))


@FULL
def test_official_at_full_size(moshi, tmp_path):
    model, wave = codec.official(None, 32), codec.wave(1, 130 * FRAME)
    folder = codec.write_kyutai(model, tmp_path / "kyutai", None)
    ours = Mimi.from_pretrained(folder / "mimi.safetensors")
    alike(ours, wave, *by_official(model, wave))


@FULL
def test_transformers_at_full_size(tmp_path):
    from transformers import MimiConfig, MimiModel

    model, wave = codec.redraw(MimiModel(MimiConfig())), codec.wave(1, 130 * FRAME)
    model.save_pretrained(tmp_path)
    alike(Mimi.from_pretrained(tmp_path), wave, *by_peer(model, wave))


def test_goldens_of_the_official_package():
    wanted = load_file(GOLDENS / "mimi_expected.safetensors")
    ours = Mimi.from_pretrained(GOLDENS / "mimi.safetensors")
    wave, frame = wanted["wave"], ours.spec.frame
    alike(ours, wave, wanted["latents"], wanted["codes"].long(), wanted["decoded"])
    state = ours.init_state(1, official_window=True)
    streamed = torch.cat([ours.latents(piece, state=state) for piece in wave.split(frame, 2)], 1)
    close(streamed, wanted["streamed"])
    assert (streamed - wanted["latents"]).abs().max() > 1e-3  # where the official window differs from offline


LAYOUTS = ("mm", "kyutai", "kyutai_memory", "hf", "hf_halves")


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_layouts_in_every_direction(tmp_path, source, target):
    model = codec.small(codec.SPEC)
    model.save_pretrained(tmp_path / "a", source)
    Mimi.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", target)
    again = Mimi.from_pretrained(tmp_path / "b")
    assert again.spec == model.spec
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("layout", ["hf", "hf_halves"])
def test_transformers_opens_what_is_written(tmp_path, layout):
    from transformers import MimiModel

    ours, wave = codec.small(codec.SPEC), codec.wave(1, 20 * FRAME)
    ours.save_pretrained(tmp_path, layout)
    theirs, report = MimiModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    alike(ours, wave, *by_peer(theirs, wave))


@pytest.mark.parametrize("layout", ["kyutai", "kyutai_memory"])
def test_the_official_package_opens_what_is_written(moshi, tmp_path, layout):
    from moshi.models import loaders

    ours, wave = codec.small(codec.SPEC), codec.wave(1, 20 * FRAME)
    ours.save_pretrained(tmp_path, layout)
    settings = json.loads((tmp_path / "mimi_config.json").read_text())
    theirs = loaders.get_mimi(tmp_path / "mimi.safetensors", settings)
    alike(ours, wave, *by_official(theirs, wave))


def test_older_names_of_codebooks(tmp_path):
    from safetensors.torch import save_file

    model = codec.small(codec.SPEC)
    model.save_pretrained(tmp_path, "kyutai")
    older = {"_initialized": "inited", "cluster_usage": "cluster_size", "embedding_sum": "embed_avg"}
    state = load_file(tmp_path / "mimi.safetensors")
    for new, old in older.items():
        state = {name.replace(f"_codebook.{new}", f"_codebook.{old}"): value for name, value in state.items()}
    save_file(state, tmp_path / "mimi.safetensors")
    assert torch.equal(Mimi.from_pretrained(tmp_path).quantizer.acoustic.codebooks[3].table,
                       model.quantizer.acoustic.codebooks[3].table)


def test_names_and_sizes_of_the_official_file():
    from mm.codecs.families.mimi import OFFICIAL, table

    with torch.device("meta"):
        model = Mimi(OFFICIAL)
    names = table(OFFICIAL, ()).save(model.state_dict(), "kyutai")
    assert len(names) == 318 and sum(p.numel() for p in model.parameters()) == 79_308_609
    assert names["decoder.model.2.convtr.convtr.weight"].shape == (1024, 512, 16)
    assert names["encoder_transformer.transformer.layers.7.self_attn.in_proj_weight"].shape == (1536, 512)
    assert names["upsample.convtr.convtr.convtr.weight"].shape == (512, 1, 4)


def changed(tmp_path, layout, file, **changes):
    codec.small(codec.SPEC).save_pretrained(tmp_path, layout)
    config = json.loads((tmp_path / file).read_text())
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (config[part] if part else config)[key] = value
    (tmp_path / file).write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("changes, message", [
    ({"use_conv_shortcut": True}, "use_conv_shortcut should be False"),
    ({"pad_mode": "reflect"}, "pad_mode should be 'constant'"),
    ({"frame_rate": 11}, "11 frames a second are not a whole fraction"),
    ({"novelty": 1}, "asks for something that is not supported: novelty=1"),
    ({"num_quantizers": 7}, "not expected by the config"),
    ({"codebook_size": 32}, "should have shape"),
])
def test_configs_of_transformers_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        Mimi.from_pretrained(changed(tmp_path, "hf", "config.json", **changes))


@pytest.mark.parametrize("changes, message", [
    ({"seanet__norm": "weight_norm"}, "norm should be 'none'"),
    ({"transformer__gating": "silu"}, "gating should be 'none'"),
    ({"transformer__num_heads": 5}, "5 heads do not divide"),
    ({"quantizer__n_q": 1}, "more than the semantic ones"),
    ({"seanet": 3}, "seanet should be dict"),
])
def test_settings_of_kyutai_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        Mimi.from_pretrained(changed(tmp_path, "kyutai", "mimi_config.json", **changes))


def test_files_that_are_no_mimi(tmp_path):
    codec.small(codec.SPEC).save_pretrained(tmp_path, "hf")
    with pytest.raises(InputError, match="does not hold a Mimi under Kyutai's names"):
        Mimi.from_pretrained(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        Mimi.from_pretrained(tmp_path)
