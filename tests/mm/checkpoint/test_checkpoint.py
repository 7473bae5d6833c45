"""Files: lazy, sharded, whole or not at all, and one sentence for whatever is wrong with them."""

import json
import os

import pytest
import torch
from torch import nn

from mm.checkpoint import door
from mm.checkpoint import files as checkpoint
from mm.errors import InputError
from mm.spec import Attention, Layer, Mlp, Stack


def tensors():
    torch.manual_seed(0)
    return {"a": torch.randn(4, 5), "b": torch.randn(7), "c": torch.tensor(3.0)}


def same(weights, expected):
    assert weights.shapes == {name: tuple(x.shape) for name, x in expected.items()}
    assert all(torch.equal(weights.read(name), x) for name, x in expected.items())


def test_one_file(tmp_path):
    checkpoint.write_weights(tmp_path, tensors())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    same(checkpoint.open_weights(tmp_path), tensors())


def test_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    checkpoint.write_weights(tmp_path, tensors())
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_shards(tmp_path):
    checkpoint.write_weights(tmp_path, tensors(), shard_bytes=90)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors",
                                   "c": "model-00002-of-00002.safetensors"}
    same(checkpoint.open_weights(tmp_path), tensors())


@pytest.mark.parametrize(("first", "then"), [(90, 2**30), (2**30, 90), (30, 90)])
def test_new_files_replace_old_ones_of_another_number(tmp_path, first, then):
    checkpoint.write_weights(tmp_path, tensors(), shard_bytes=first)
    changed = {name: x + 1 for name, x in tensors().items()}
    checkpoint.write_weights(tmp_path, changed, shard_bytes=then)
    same(checkpoint.open_weights(tmp_path), changed)
    assert len(list(tmp_path.iterdir())) == (1 if then > 90 else 3)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    checkpoint.write_weights(tmp_path, tensors())
    with pytest.raises(Exception, match="xyz"), checkpoint.replacing(tmp_path / "model.safetensors") as part:
        part.write_bytes(b"half")
        raise RuntimeError("xyz")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    same(checkpoint.open_weights(tmp_path), tensors())


def test_views_and_transposes_are_written_as_they_look(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    expected = {"top": whole[:1], "rotated": whole.T}
    checkpoint.write_weights(tmp_path, expected)
    same(checkpoint.open_weights(tmp_path), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, zipped):
    torch.save(tensors(), tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    same(checkpoint.open_weights(tmp_path, ["model.safetensors", "w.bin"]), tensors())


def test_a_training_checkpoint_is_unwrapped(tmp_path):
    state = {f"module.{name}": x for name, x in tensors().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 1e-3}}, tmp_path / "w.pt")
    same(checkpoint.open_weights(tmp_path, ["w.pt"]), tensors())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path):
    torch.save({"a": torch.ones(2), "evil": Payload(tmp_path / "ran")}, tmp_path / "w.bin")
    with pytest.raises(InputError, match="w.bin holds more than tensors, and reading it could run code"):
        checkpoint.open_weights(tmp_path, ["w.bin"])
    assert not (tmp_path / "ran").exists()


def test_the_override_reads_a_pickle_of_trusted_classes(tmp_path):
    torch.save({"state_dict": tensors(), "note": Payload(tmp_path / "ran")}, tmp_path / "w.bin")
    same(checkpoint.open_weights(tmp_path, ["w.bin"], allow_pickle=True), tensors())
    assert (tmp_path / "ran").exists()


def test_a_plain_value_among_the_weights_is_named(tmp_path):
    torch.save({**tensors(), "step": 7}, tmp_path / "w.bin")
    with pytest.raises(InputError, match="more than tensors: step is a int"):
        checkpoint.open_weights(tmp_path, ["w.bin"])


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives(tmp_path):
    torch.jit.script(nn.Linear(2, 3)).save(str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match="TorchScript archive"):
        checkpoint.open_weights(tmp_path, ["w.pt"])
    assert checkpoint.open_weights(tmp_path, ["w.pt"], allow_pickle=True).shapes == {"weight": (3, 2), "bias": (3,)}


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "old.bin"])
@pytest.mark.parametrize("keep", [0, 10, 100, -5])
def test_truncated_files(tmp_path, name, keep):
    path = tmp_path / name
    if name == "w.safetensors":
        checkpoint.write_weights(tmp_path, tensors(), name)
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=name == "w.bin")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"{name} is truncated or not a (safetensors|torch) file"):
        checkpoint.open_weights(tmp_path, [name])


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_files_of_something_else(tmp_path, name):
    (tmp_path / name).write_text("just a note " * 100)
    with pytest.raises(InputError, match=f"{name} is truncated or not a"):
        checkpoint.open_weights(tmp_path, [name])


def test_no_weights(tmp_path):
    with pytest.raises(InputError, match="holds none of model.safetensors, w.bin"):
        checkpoint.open_weights(tmp_path, ["model.safetensors", "w.bin"])


def test_a_missing_shard(tmp_path):
    checkpoint.write_weights(tmp_path, tensors(), shard_bytes=90)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="lists the shard model-00002-of-00002.safetensors, which is not beside it"):
        checkpoint.open_weights(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    checkpoint.write_weights(tmp_path, tensors(), "outside.safetensors")
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(InputError, match="not beside it"):
        checkpoint.open_weights(inner)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.register_buffer("count", torch.zeros(2, dtype=torch.long))


def written(tmp_path, **changes):
    module = Two()
    checkpoint.write_weights(tmp_path, {**module.state_dict(), **changes})
    return module


def test_load_takes_the_dtype_of_the_file_or_the_one_asked_for(tmp_path):
    module = written(tmp_path)
    loaded = checkpoint.load(Two, checkpoint.open_weights(tmp_path))
    assert torch.equal(loaded.first.weight, module.first.weight)
    assert isinstance(loaded.first.weight, nn.Parameter) and loaded.first.weight.requires_grad
    half = checkpoint.load(Two, checkpoint.open_weights(tmp_path), dtype=torch.float16)
    assert half.first.bias.dtype == torch.float16 and half.count.dtype == torch.long


def test_a_file_of_several_dtypes_loads_in_the_widest(tmp_path):
    written(tmp_path, **{"first.weight": torch.ones(4, 3, dtype=torch.float16)})
    loaded = checkpoint.load(Two, checkpoint.open_weights(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path, value):
    written(tmp_path, **{"first.bias": torch.tensor([1.0, value, 0.0, 0.0])})
    with pytest.raises(InputError, match="first.bias holds values that are not finite"):
        checkpoint.load(Two, checkpoint.open_weights(tmp_path))


def test_config_round_trip_and_its_faults():
    layer = Layer(mixer=Attention(heads=2, kv_heads=1, head_dim=4), mlp=Mlp(hidden=8))
    stack = Stack(dim=8, layers=(layer,))
    config = json.loads(json.dumps(checkpoint.pack("stack", stack)))
    assert config["family"] == "stack"
    assert checkpoint.unpack(config, Stack, "config.json") == stack
    config["spec"]["dims"] = config["spec"].pop("dim")
    with pytest.raises(InputError, match="config.json: Stack has no field dims"):
        checkpoint.unpack(config, Stack, "config.json")
    with pytest.raises(InputError, match="config.json should hold a Layer under spec, not None"):
        checkpoint.unpack({}, Layer, "config.json")


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match="config.json cannot be read"):
        checkpoint.read_json(path)
    path.write_text('{"a": ')
    with pytest.raises(InputError, match="config.json is not valid JSON"):
        checkpoint.read_json(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="should hold a JSON object, not a list"):
        checkpoint.read_json(path)


def test_resolve(tmp_path, monkeypatch):
    assert door.resolve(tmp_path) == tmp_path
    with pytest.raises(InputError, match="is not a directory with a checkpoint"):
        door.resolve(tmp_path / "absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/nothing is not a directory here .* give the path of a downloaded"):
        door.resolve("nobody/nothing")


def test_resolve_downloads_the_best_weights_only(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert door.resolve("owner/model", ["model*.safetensors", "*.bin", "*.pth"]) == tmp_path
    assert ["model*.safetensors" in asked[0], "*.bin" in asked[1], len(asked)] == [True, True, 2]
