"""The text decoder against transformers, both ways, and its streams against itself."""

import pytest
import torch
import transformers
from support import redraw

from mm import TextDecoder
from mm.errors import InputError
from mm.spec import Sections

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **SIZES, **KINDS[request.param])
    theirs = redraw(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, TextDecoder.from_pretrained(folder), folder


@torch.no_grad()
def test_logits_equal_transformers(pair):
    theirs, ours, _ = pair
    ids = torch.randint(97, (2, 40))
    assert (theirs(ids).logits - ours(ids)).abs().max() <= 1e-5
    vectors = ours.embed.look_up(ids)
    assert torch.equal(ours(embeddings=vectors), ours(ids))


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_padding_is_not_seen(pair, left):
    theirs, ours, _ = pair
    ids, mask = torch.randint(97, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    mask[1, :6] = not left
    mask[1, 14:] = left
    mask[1, :6], mask[1, 14:] = (False, True) if left else (True, False)
    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    wanted = theirs(ids, attention_mask=mask.long(), position_ids=places).logits
    assert (wanted - ours(ids, mask=mask))[mask].abs().max() <= 1e-5


@torch.no_grad()
def test_a_stream_in_chunks_equals_the_whole(pair):
    _, ours, _ = pair
    ids = torch.randint(97, (2, 40))
    state = ours.init_state(2, chunk=8)
    cuts = [0, 8, 9, 17, 18, 19, 40]
    parts = [ours(ids[:, a:b], state=state) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert (torch.cat(parts, 1) - ours(ids)).abs().max() <= 1e-5


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(pair):
    _, ours, _ = pair
    ids = torch.randint(97, (1, 30))
    documents = torch.tensor([[0] * 11 + [1] * 14 + [-1] * 5])
    packed = ours(ids, documents=documents)
    assert (packed[:, :11] - ours(ids[:, :11])).abs().max() <= 1e-5
    assert (packed[:, 11:25] - ours(ids[:, 11:25])).abs().max() <= 1e-5


@torch.no_grad()
def test_written_in_their_layout(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path, layout="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.randint(97, (2, 40))
    assert (again(ids).logits - theirs(ids).logits).abs().max() <= 1e-6


def test_own_layout_comes_back(pair, tmp_path):
    _, ours, _ = pair
    ours.save_pretrained(tmp_path)
    assert TextDecoder.from_pretrained(tmp_path).fingerprint() == ours.fingerprint()


@torch.no_grad()
def test_positions_of_three_axes(pair):
    """M-RoPE: with the same position on every axis, a text reads as before."""
    _, ours, _ = pair
    from dataclasses import replace
    width = ours.spec.stack.layers[0].mixer.head_dim // 2
    sizes = (width - 2 * (width // 3), width // 3, width // 3)
    mixers = [replace(layer.mixer, rope=replace(layer.mixer.rope, axes=Sections(sizes=sizes)))
              for layer in ours.spec.stack.layers]
    layers = tuple(replace(layer, mixer=mixer) for layer, mixer in zip(ours.spec.stack.layers, mixers, strict=True))
    spread = TextDecoder(replace(ours.spec, stack=replace(ours.spec.stack, layers=layers))).eval()
    spread.load_state_dict(ours.state_dict())
    ids, places = torch.randint(97, (2, 12)), torch.arange(12).expand(2, 12)
    assert (spread(ids, positions=torch.stack([places] * 3, -1)) - ours(ids)).abs().max() <= 1e-5
    moved = torch.stack([5 * places % 7, places // 4, places % 4], -1)
    assert (spread(ids, positions=moved) - ours(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("call, told", [
    ({}, "either ids or embeddings"),
    ({"ids": torch.zeros(2, 3)}, "integers"),
    ({"embeddings": torch.zeros(2, 3, 5)}, r"\(B, T, 32\)"),
    ({"ids": torch.zeros(2, 3, dtype=torch.long), "mask": torch.ones(2, 4)}, "mask"),
])
def test_wrong_shapes_are_named(pair, call, told):
    with pytest.raises(InputError, match=told):
        pair[1](**call)


def test_unknown_config_keys_are_named(pair, tmp_path):
    import json
    import shutil
    _, _, folder = pair
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"wobble": 3}))
    with pytest.raises(InputError, match="wobble"):
        TextDecoder.from_pretrained(tmp_path / "copy")
