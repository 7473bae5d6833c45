"""Small codecs with re-drawn weights: the official package's, transformers', ours, and random waves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mm.codecs import Mimi
from mm.codecs.spec import MimiSpec, Quantizer, Seanet, mimi_stack

WINDOW = 10  # steps of the small transformers: 5 frames
SEANET = {"channels": 1, "dimension": 32, "causal": True, "n_filters": 4, "n_residual_layers": 1, "activation": "ELU",
          "compress": 2, "dilation_base": 2, "disable_norm_outer_blocks": 0, "kernel_size": 7,
          "residual_kernel_size": 3, "last_kernel_size": 3, "norm": "none", "pad_mode": "constant",
          "ratios": [8, 6, 5, 4], "true_skip": True}
QUANTIZER = {"dimension": 16, "n_q": 8, "bins": 64, "input_dimension": 32, "output_dimension": 32}
TRANSFORMER = {"d_model": 32, "num_heads": 4, "num_layers": 2, "causal": True, "layer_scale": 0.01, "context": WINDOW,
               "conv_layout": True, "max_period": 10000, "gating": "none", "norm": "layer_norm",
               "positional_embedding": "rope", "dim_feedforward": 64, "input_dimension": 32, "output_dimensions": [32]}
SETTINGS = {"sample_rate": 24000, "channels": 1, "frame_rate": 12.5, "seanet": SEANET, "quantizer": QUANTIZER,
            "transformer": TRANSFORMER}
SPEC = MimiSpec(seanet=Seanet(filters=4), encoder=mimi_stack(dim=32, depth=2, heads=4, hidden=64, window=WINDOW),
                decoder=mimi_stack(dim=32, depth=2, heads=4, hidden=64, window=WINDOW),
                quantizer=Quantizer(codebooks=8, size=64, dim=16))
TINY = MimiSpec(rate=1600, seanet=Seanet(filters=4, ratios=(4, 2)), encoder=SPEC.encoder, decoder=SPEC.decoder,
                quantizer=SPEC.quantizer)  # frames of 16 samples


def redraw(model: nn.Module) -> nn.Module:
    """Every weight random at a scale that keeps signals alive through the layers; codebooks and their counts too."""
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not value.is_floating_point() or "inv_freq" in name:
                continue
            if name.endswith(("cluster_usage", ".usage")):
                value.uniform_(0.5, 2.0)
            elif name.endswith(("embedding_sum", "embed_sum", ".sum")):
                value.normal_()
            elif name.endswith("initialized"):
                value.fill_(1)
            elif value.ndim == 1:
                value.normal_(std=0.3)
            elif value.ndim > 1:
                value.normal_(std=fan(name, value) ** -0.5)
    return model.eval()


def fan(name: str, value: Tensor) -> int:
    """Inputs that reach an output: two steps of a transposed convolution, whose first size is its inputs or kernel."""
    if "convtr" in name:
        return 2 * value.shape[0]
    return value.numel() // value.shape[0]


def small(spec: MimiSpec = TINY) -> Mimi:
    return redraw(Mimi(spec))


def official(settings: dict | None = SETTINGS, codebooks: int = 8) -> nn.Module:
    from moshi.models import loaders

    return redraw(loaders.get_mimi(None, settings, num_codebooks=codebooks))


def peer(**changes) -> nn.Module:
    from transformers import MimiConfig, MimiModel

    return redraw(MimiModel(MimiConfig(**{
        "hidden_size": 32, "num_filters": 4, "codebook_size": 64, "codebook_dim": 16, "num_quantizers": 8,
        "vector_quantization_hidden_dimension": 16, "upsample_groups": 32, "num_hidden_layers": 2,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": WINDOW,
        **changes})))


def write_kyutai(model: nn.Module, folder: Path, settings: dict | None = SETTINGS, in_memory: bool = False) -> Path:
    """The official package's weights as a directory, under the names of its files or of its memory."""
    folder.mkdir(exist_ok=True)
    state = model.state_dict()
    if not in_memory:
        state = {name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0", "out_proj"): value
                 for name, value in state.items()}
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "mimi.safetensors")
    beside = {} if settings is None else {"mimi_config_name": "mimi_config.json"}
    (folder / "config.json").write_text(json.dumps({"mimi_name": "mimi.safetensors", **beside}))
    if settings is not None:
        (folder / "mimi_config.json").write_text(json.dumps(settings))
    return folder


def wave(batch: int, samples: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed)) * 0.5


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The share of codes that differ."""
    assert ours.shape == theirs.shape
    return (ours != theirs).float().mean().item()


@torch.no_grad()
def clear(model: Mimi, latents: Tensor, by: float = 1e-4) -> Tensor:
    """(B, T) bool: whether in every codebook the nearest entry is nearer than the second by more than `by`."""
    sure = torch.ones(latents.shape[:2], dtype=torch.bool)
    for part in (model.quantizer.semantic, model.quantizer.acoustic):
        left = part.down(latents).double()
        for codebook in part.codebooks:
            table = codebook.table.double()
            distance = torch.cdist(left, table.expand(len(left), -1, -1), compute_mode="donot_use_mm_for_euclid_dist")
            near = distance.topk(2, largest=False).values
            sure &= near[..., 1] - near[..., 0] > by
            left = left - table[distance.argmin(-1)]
    return sure


def same_codes(model: Mimi, latents: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """Equal codes wherever no two entries are about as near; those other frames are few."""
    sure = clear(model, latents)
    assert sure.float().mean() > 0.9
    assert torch.equal(ours.transpose(1, 2)[sure], theirs.transpose(1, 2)[sure])
