"""Writes mimi.safetensors, mimi_config.json and mimi_expected.safetensors: a tiny codec of the official package and
what it makes of noise, offline and streamed past its window. Run it with moshi installed."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

os.environ["NO_TORCH_COMPILE"] = "1"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "support"))
import codec  # noqa: E402

SETTINGS = {"sample_rate": 1600, "channels": 1, "frame_rate": 100,
            "seanet": codec.SEANET | {"dimension": 16, "n_filters": 2, "ratios": [4, 2]},
            "quantizer": {"dimension": 8, "n_q": 4, "bins": 16, "input_dimension": 16, "output_dimension": 16},
            "transformer": codec.TRANSFORMER | {"d_model": 16, "num_heads": 2, "num_layers": 1, "dim_feedforward": 24,
                                                "input_dimension": 16, "output_dimensions": [16]}}

torch.manual_seed(0)
model = codec.official(SETTINGS, 4)
wave = codec.wave(1, 16 * 24)
with torch.no_grad():
    codes = model.encode(wave)
    expected = {"wave": wave, "latents": model.encode_to_latent(wave, quantize=False).transpose(1, 2),
                "codes": codes.to(torch.uint8), "decoded": model.decode(codes)}
    with model.streaming(1):
        pieces = [model.encode_to_latent(piece, quantize=False) for piece in wave.split(16, 2)]
expected["streamed"] = torch.cat(pieces, 2).transpose(1, 2)
codec.write_kyutai(model, HERE, SETTINGS)
(HERE / "config.json").unlink()
(HERE / "mimi_config.json").write_text(json.dumps(SETTINGS, indent=1) + "\n")
save_file({name: value.contiguous() for name, value in expected.items()}, HERE / "mimi_expected.safetensors")
