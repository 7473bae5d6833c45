"""What moshi-finetune saves: low-rank changes beside the weights that they change, or both merged."""

import json

import duplex
import pytest
import torch
from safetensors.torch import load_file, save_file

from mm import DuplexLM
from mm.errors import InputError

RANK, SCALE = 3, 1.7


@pytest.fixture(autouse=True)
def loaders(monkeypatch):
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    return pytest.importorskip("moshi.models.loaders", reason="the official package")


def changes(model) -> dict[str, torch.Tensor]:
    """A pair for every linear layer, under the names of the official package's memory."""
    linear = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    return {f"{name}.lora_{side}.weight": torch.randn(shape) * shape[1] ** -0.5 / 2 for name, part in linear.items()
            for side, shape in (("A", (RANK, part.in_features)), ("B", (part.out_features, RANK)))}


@pytest.fixture
def tuned(tmp_path):
    """A directory with a model, its changes, embeddings among them, and a config that says so."""
    config = duplex.settings("moshi")
    model = duplex.official(config)
    duplex.write(model, config, tmp_path)
    return finish(tmp_path, config, changes(model) | {"emb.3.weight": torch.randn(33, 64)})


def finish(folder, config, state):
    save_file(state, folder / "lora.safetensors")
    told = config | {"lora": True, "lora_rank": RANK, "lora_scaling": SCALE, "moshi_name": "model.safetensors"}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("shape", ["moshi", "hibiki_zero", "tts", "odd"])
@torch.no_grad()
def test_logits_of_the_official_package(loaders, tmp_path, shape, joined):
    """With attention's projections as in files, and as in memory; `odd` has biases, which the official package loses
    when it merges."""
    config = duplex.settings(shape)
    model = duplex.official(config)
    finish(duplex.write(model, config, tmp_path, joined=joined), config, changes(model))
    theirs = loaders.get_moshi_lm(tmp_path / "model.safetensors", config | {
        "lora": True, "lora_rank": RANK, "lora_scaling": SCALE}, dtype=torch.float32,
        lora_weights=tmp_path / "lora.safetensors", fuse_lora=shape != "odd")
    ours, plain = DuplexLM.from_pretrained(tmp_path), model
    codes, values = duplex.codes(config, 2, 24), duplex.told(config, 2)
    made = ours(codes, ours.condition(values, 2))
    wanted = theirs(codes, duplex.official_conditions(theirs, values))
    torch.testing.assert_close(made.text, wanted.text_logits[:, 0], atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(made.audio, wanted.logits, atol=1e-5, rtol=1e-5, equal_nan=True)
    before = plain(codes, duplex.official_conditions(plain, values))
    assert (before.text_logits[:, 0] - made.text).abs().max() > 0.1


@torch.no_grad()
def test_embeddings_that_were_trained_take_the_place_of_the_models(tuned):
    ours, state = DuplexLM.from_pretrained(tuned), load_file(tuned / "lora.safetensors")
    assert torch.equal(ours.codes.weight[3], state["emb.3.weight"])
    base = load_file(tuned / "model.safetensors")
    assert torch.equal(ours.codes.weight[2], base["emb.2.weight"])


@torch.no_grad()
def test_half_precision_is_rounded_once(tuned):
    """In float32 the changes are exact; by default the model is of the type of its file."""
    state = {name: value.bfloat16() for name, value in load_file(tuned / "model.safetensors").items()}
    save_file(state, tuned / "model.safetensors")
    half, exact = DuplexLM.from_pretrained(tuned), DuplexLM.from_pretrained(tuned, dtype=torch.float32)
    low = load_file(tuned / "lora.safetensors")
    wanted = state["text_linear.weight"].float() + SCALE * (low["text_linear.lora_B.weight"]
                                                            @ low["text_linear.lora_A.weight"])
    torch.testing.assert_close(exact.head.weight, wanted)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.head.weight, exact.head.weight.bfloat16())


def test_merged_by_moshi_finetune(tuned):
    """Its config says lora all the same."""
    merged = DuplexLM.from_pretrained(tuned)
    config = duplex.settings("moshi")
    merged.save_pretrained(tuned / "again", layout="kyutai")
    (tuned / "again/model.safetensors").rename(tuned / "again/consolidated.safetensors")
    again = DuplexLM.from_pretrained(finish(tuned / "again", config, load_file(tuned / "lora.safetensors")))
    assert again.fingerprint() == merged.fingerprint()


def test_the_model_may_lie_elsewhere(tuned, tmp_path):
    wanted = DuplexLM.from_pretrained(tuned).fingerprint()
    (tmp_path / "base").mkdir()
    (tuned / "model.safetensors").rename(tmp_path / "base/weights.safetensors")
    with pytest.raises(InputError, match="changes of another model's weights: put those beside it as model.safeten"):
        DuplexLM.from_pretrained(tuned)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"moshi_name": "base/weights.safetensors"}))
    assert DuplexLM.from_pretrained(tuned).fingerprint() == wanted


@pytest.mark.parametrize(("change", "words"), [
    (lambda state: state.pop("linears.0.lora_B.weight"), "holds linears.0.lora_A.weight without linears.0.lora_B"),
    (lambda state: state.update({"other.lora_A.weight": torch.zeros(3, 4)}), "changes other, which is not in"),
    (lambda state: state.update({"linears.0.lora_A.weight": torch.zeros(4, 32)}), "by a lora_rank of 3"),
    (lambda state: state.update({"linears.0.lora_A.weight": torch.zeros(3, 31)}), "not for a weight"),
    (lambda state: state.update({"linears.0.lora_B.weight": torch.zeros(31, 3)}), "31 rows of linears.0.weight"),
    (lambda state: state.update({"emb.1.weight": torch.zeros(33, 63)}), "emb.1.weight is"),
    (lambda state: state.pop("depformer.layers.0.self_attn.in_projs.3.lora_A.weight"), "rows of depformer.layers.0"),
    (None, "says lora, but there is no")])
def test_changes_that_do_not_fit(tuned, change, words):
    state = load_file(tuned / "lora.safetensors")
    if change is None:
        (tuned / "lora.safetensors").unlink()
    else:
        change(state)
        save_file(state, tuned / "lora.safetensors")
    with pytest.raises(InputError, match=words):
        DuplexLM.from_pretrained(tuned)
