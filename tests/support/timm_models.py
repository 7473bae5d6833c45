"""timm's vision transformers as references: small, re-drawn, on disk as timm writes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import redraw

from mm.encoders import ViT

timm = pytest.importorskip("timm")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "dynamic_img_size": True}


def write(architecture: str, settings: Mapping[str, Any], folder: Path, patches: float = 1.0) -> torch.nn.Module:
    """A timm model with re-drawn weights, those of the patches times `patches`, and its directory."""
    model = redraw(timm.create_model(architecture, pretrained=False, **settings))
    if patches != 1.0:
        with torch.no_grad():
            model.patch_embed.proj.weight.mul_(patches)
    timm.models.save_for_hf(model, folder, model_args=dict(settings), safe_serialization=True)
    return model


def references(kinds: Mapping[str, tuple[str, Mapping[str, Any]]], small: Mapping[str, Any], patches: float = 1.0
               ) -> Callable[..., Any]:
    """A fixture: kind -> (timm's model, its directory, ours read from there), each made once."""
    @pytest.fixture(scope="module")
    def theirs(tmp_path_factory):
        made = {}

        def make(kind):
            if kind not in made:
                torch.manual_seed(0)
                architecture, changes = kinds[kind]
                folder = tmp_path_factory.mktemp("theirs")
                made[kind] = (write(architecture, {**small, **changes}, folder, patches), folder,
                              ViT.from_pretrained(folder))
            return made[kind]
        return make
    return theirs


def reopened(folder: Path) -> torch.nn.Module:
    """What timm makes of a directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
