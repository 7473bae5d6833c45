"""Tiny reference checkpoints with re-drawn weights: default initialisation hides wrong activations and scales."""

import json

import pytest
import torch

VISION = {"layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 32, "mlp_ratio": 2.0}
TEXT = {"context_length": 16, "vocab_size": 512, "width": 32, "heads": 4, "layers": 3, "mlp_ratio": 2.0}
HF_VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
             "image_size": 32, "patch_size": 8}
HF_TEXT = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
           "num_attention_heads": 4, "max_position_embeddings": 16, "bos_token_id": 510, "eos_token_id": 511,
           "pad_token_id": 0}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def redraw(model, std=0.3):
    """Every weight random, norms and biases too; tables that are not trained keep their values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return model.eval()


@pytest.fixture
def open_clip_model(tmp_path):
    """make(vision={}, text={}, custom=False, **model_cfg) -> (directory, open_clip's model)."""
    def make(vision=None, text=None, custom=False, **top):
        from open_clip.model import CLIP, CustomTextCLIP
        from safetensors.torch import save_file

        config = {"embed_dim": 24, **top, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {})}
        model = redraw((CustomTextCLIP if custom else CLIP)(**json.loads(json.dumps(config))))
        folder = tmp_path / "open_clip"
        folder.mkdir(exist_ok=True)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors", {"format": "pt"})
        if custom:
            config["custom_text"] = True
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        return folder, model
    return make


@pytest.fixture
def hf_model(tmp_path):
    """make(vision={}, text={}, **config) -> (directory, transformers' model)."""
    def make(vision=None, text=None, **top):
        from transformers import CLIPConfig, CLIPModel

        towers = {"text_config": HF_TEXT | {"projection_dim": 24} | (text or {}),
                  "vision_config": HF_VISION | {"projection_dim": 24} | (vision or {})}
        model = redraw(CLIPModel(CLIPConfig(projection_dim=24, **towers, **top)))
        model.save_pretrained(tmp_path / "hf")
        return tmp_path / "hf", model
    return make


@pytest.fixture
def ids():
    """(4, 16) token ids with the largest, 511, in different places, twice in one row, and never last."""
    rows = torch.randint(1, 500, (4, 16))
    for row, at in enumerate((3, 7, 14, 5)):
        rows[row, at] = 511
        rows[row, at + 1 :] = 0
    rows[3, 9] = 511
    return rows
