"""CSM against transformers, forward and greedy, and its files."""

import json

import pytest
import torch

from mm.decode.sampling import GREEDY, Sampling, controls
from mm.errors import InputError
from mm.speech.csm import CSM

CARD, COUNT = 67, 8


def peer():
    from transformers import CsmConfig, CsmForConditionalGeneration, MimiConfig

    codec = MimiConfig(hidden_size=32, num_filters=4, codebook_size=64, codebook_dim=16, num_quantizers=8,
                       vector_quantization_hidden_dimension=16, upsample_groups=32, num_hidden_layers=1,
                       intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, sliding_window=10)
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 0.125,
              "high_freq_factor": 0.5, "original_max_position_embeddings": 64}
    model = CsmForConditionalGeneration(CsmConfig(
        num_codebooks=COUNT, vocab_size=CARD, text_vocab_size=128, hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        pad_token_id=100, codebook_pad_token_id=66, bos_token_id=101, audio_token_id=102, audio_eos_token_id=103,
        rope_parameters=scaled, codec_config=codec.to_dict(), depth_decoder_config={
            "num_codebooks": COUNT, "backbone_hidden_size": 64, "vocab_size": CARD, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": COUNT + 1, "rope_parameters": scaled | {"original_max_position_embeddings": 4}}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(std=0.3 if value.ndim == 1 else value.shape[-1] ** -0.5)
            if "norm" in name:
                value.add_(1)
    return model.eval()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = peer(), tmp_path_factory.mktemp("csm")
    model.save_pretrained(folder)
    return model, CSM.from_pretrained(folder), folder


def conversation(batch: int = 2, words: int = 5, frames: int = 9):
    """Frames of text, then of audio."""
    text = torch.full((batch, 1 + COUNT, words), -1)
    text[:, 0] = torch.randint(100, (batch, words))
    audio = torch.full((batch, 1 + COUNT, frames), -1)
    audio[:, 1:] = torch.randint(1, 64, (batch, COUNT, frames))
    return torch.cat([text, audio], 2)


def embedded(model, codes):
    text, audio = codes[:, 0], codes[:, 1:].transpose(1, 2)
    x = model.embed_text_tokens(text.clamp(min=0))
    return torch.where((text >= 0).unsqueeze(-1), x, model.backbone_model.embed_tokens(audio.clamp(min=0)))


@torch.no_grad()
def test_logits(both):
    model, ours, _ = both
    codes = conversation()
    hidden = model.backbone_model(inputs_embeds=embedded(model, codes)).last_hidden_state
    made = ours(codes)
    assert made.shape == (2, COUNT, 14, CARD) and made[:, :, 0].isnan().all() and not made[:, :, 1:].isnan().any()
    torch.testing.assert_close(made[:, 0, 1:], model.lm_head(hidden)[:, :-1], atol=1e-5, rtol=0)
    for t in range(5, 14):  # frames of audio
        ids = torch.nn.functional.pad(codes[:, 1:COUNT, t], (1, 0))
        deep = model.depth_decoder(input_ids=ids, backbone_last_hidden_state=hidden[:, t - 1].clone()).logits
        torch.testing.assert_close(made[:, 1:, t], deep, atol=1e-5, rtol=0)


@torch.no_grad()
def test_greedy_frames(both):
    model, ours, _ = both
    text = torch.randint(100, (1, 6))
    wanted = model.generate(input_ids=text, max_new_tokens=7, do_sample=False, depth_decoder_do_sample=False)[0]
    codes = torch.full((1, 1 + COUNT, 6), -1)
    codes[:, 0] = text
    made = torch.cat(list(ours.generate(codes, Sampling(max_tokens=7))))
    assert torch.equal(made, wanted) and made.unique(dim=0).shape[0] > 2


@torch.no_grad()
def test_streams_are_the_forward_pass_and_rows_are_alone(both):
    _, ours, _ = both
    codes = conversation(frames=6)
    state, hidden = ours.init_state(2, length=20, chunk=4), ours.hidden(codes)
    made = torch.cat([ours.hidden(codes[..., :5], state=state), ours.hidden(codes[..., 5:], state=state)], 1)
    torch.testing.assert_close(made, hidden, atol=1e-5, rtol=0)
    sampled = Sampling(temperature=0.9, top_k=20, seed=3, max_tokens=5)
    both_rows = torch.stack(list(ours.generate(codes, sampled)), 1)
    for i in range(2):
        alone = torch.stack(list(ours.generate(codes[i:i + 1], sampled)), 1)[0]
        assert torch.equal(alone, both_rows[i])
    frame = ours.step(codes, ours.init_state(2, chunk=16), controls([GREEDY] * 2))
    assert frame.shape == (2, COUNT)


def test_files_in_both_directions(both, tmp_path):
    from transformers import CsmForConditionalGeneration

    model, ours, folder = both
    ours.save_pretrained(tmp_path / "mm")
    assert CSM.from_pretrained(tmp_path / "mm").fingerprint() == ours.fingerprint()
    ours.save_pretrained(tmp_path / "hf", layout="hf")
    again = CSM.from_pretrained(tmp_path / "hf")
    assert again.spec == ours.spec and again.fingerprint() == ours.fingerprint()
    read = CsmForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith("codec_model.")}
    assert all(torch.equal(read[name], value) for name, value in wanted.items())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_codebooks_embeddings": False}))
    with pytest.raises(InputError, match="not tied"):
        CSM.from_pretrained(tmp_path)


def test_bad_input(both):
    with pytest.raises(InputError, match=r"codes should be integers \(B, 9, T\)"):
        both[1](torch.zeros(1, 8, 4, dtype=torch.long))
    longer = both[1].spec.context + 1
    for shape, words in (((9, 4), "should be integers"), ((1, 9, 0), "should be integers"),
                         ((1, 9, longer), f"codes of {longer} frames are longer than the context, {longer - 1}")):
        with pytest.raises(InputError, match=words):
            next(both[1].generate(torch.zeros(shape, dtype=torch.long)))
