"""Moshi against transformers: equal where transformers is right, and what it computes wrongly."""

import copy

import duplex
import pytest
import torch
from safetensors.torch import save_file

from mm import DuplexLM
from mm.errors import InputError

WINDOW, CARD = 20, 32


def peer(window: int = WINDOW):
    from transformers import MimiConfig, MoshiConfig, MoshiForConditionalGeneration

    codec = MimiConfig(hidden_size=32, num_filters=4, codebook_size=CARD, codebook_dim=16, num_quantizers=8,
                       vector_quantization_hidden_dimension=16, upsample_groups=32, num_hidden_layers=1,
                       intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, sliding_window=10)
    config = MoshiConfig(
        vocab_size=48, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, ffn_dim=352,
        sliding_window=window, num_codebooks=8, audio_encoder_config=codec.to_dict(), depth_decoder_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 176, "sliding_window": 8})
    return redraw(MoshiForConditionalGeneration(config)).eval()


def redraw(model):
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(std=0.3 if value.ndim == 1 else value.shape[-1] ** -0.5)
            if value.ndim == 1 and "norm" in name:
                value.add_(1)
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = peer(), tmp_path_factory.mktemp("moshi")
    model.save_pretrained(folder)
    return model, DuplexLM.from_pretrained(folder), folder


def stepped(model, ours, frames):
    """transformers' hidden states and logits of the text, given the streams as they are read, step by step."""
    x = sum(model.embed_tokens[k](frames.inputs[:, 1 + k]) for k in range(16))
    return model.decoder(inputs_embeds=x + model.decoder.model.embed_tokens(frames.inputs[:, 0]))


@torch.no_grad()
def test_logits_within_the_window(both):
    model, ours, _ = both
    codes = torch.cat([torch.randint(48, (2, 1, WINDOW)), torch.randint(CARD, (2, 16, WINDOW))], 1)
    frames, made = ours.frames(codes), ours(codes)
    theirs = stepped(model, ours, frames)
    torch.testing.assert_close(made.text, theirs.logits, atol=1e-5, rtol=0)
    hidden = ours.hidden(frames.inputs)
    tokens = frames.targets[:, :8].transpose(1, 2).flatten(0, 1)
    deep = model.depth_decoder(last_hidden_state=hidden.flatten(0, 1)[:, None], input_ids=tokens).logits
    logits = ours.depth.logits(ours.depth.hidden(hidden, frames.targets))  # (K, B, T, card)
    torch.testing.assert_close(logits.flatten(1, 2).transpose(0, 1), deep, atol=1e-5, rtol=0)


@torch.no_grad()
def test_transformers_ignores_its_window(both, tmp_path):
    """Longer than the window it differs from Kyutai's, whose logits are ours (test_duplex)."""
    model, ours, _ = both
    codes = torch.cat([torch.randint(48, (1, 1, 3 * WINDOW)), torch.randint(CARD, (1, 16, 3 * WINDOW))], 1)
    made, theirs = ours(codes).text, stepped(model, ours, ours.frames(codes)).logits
    assert (made - theirs)[:, :WINDOW].abs().max() < 1e-5 and (made - theirs)[:, WINDOW:].abs().max() > 1e-2
    wide = peer(window=3 * WINDOW)  # the same weights where the window holds all
    wide.load_state_dict(model.state_dict())
    wide.save_pretrained(tmp_path)
    torch.testing.assert_close(DuplexLM.from_pretrained(tmp_path)(codes).text, theirs, atol=1e-5, rtol=0)


def test_transformers_depth_loss_sees_the_answer(both):
    """What scores a frame's codes may not depend on that frame: in transformers it does, here it does not."""
    model, ours, _ = both
    model = copy.deepcopy(model).double()
    codes = torch.cat([torch.randint(48, (1, 1, 8)), torch.randint(CARD, (1, 16, 8))], 1)
    changed = codes.clone()
    changed[:, 1, 5] = (changed[:, 1, 5] + 1) % CARD

    def theirs(codes, said):
        """Logits of the codes `said`, after `codes` were heard and said."""
        with torch.no_grad():
            return model(input_ids=codes[:, 0], moshi_audio_codes=codes[:, 1:9], user_audio_codes=codes[:, 9:],
                         text_labels=said[:, 0], audio_labels=said[:, 1:9]).audio_logits.view(1, -1, 8, CARD)
    leak = (theirs(codes, codes) - theirs(changed, codes))[:, 5, 0].abs().max()
    with torch.no_grad():
        mine = (ours(codes).audio - ours(changed).audio)[:, 0, :6].abs().max()
    assert leak > 1e-2 and mine == 0


@torch.no_grad()
def test_layouts_in_every_direction(both, tmp_path):
    from transformers import MoshiForConditionalGeneration

    model, ours, folder = both
    ours.save_pretrained(tmp_path / "kyutai", layout="kyutai")
    again = DuplexLM.from_pretrained(tmp_path / "kyutai")
    assert again.fingerprint() == ours.fingerprint()
    again.save_pretrained(tmp_path / "hf", layout="hf")
    read = MoshiForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith("audio_encoder.")}
    assert all(torch.equal(read[name], value) for name, value in wanted.items())
    with pytest.raises(InputError, match="hf"):
        duplex.small().save_pretrained(tmp_path / "no", layout="hf")


def test_a_file_with_less_is_refused(both, tmp_path):
    model, _, folder = both
    state = {name: value for name, value in model.state_dict().items() if "lm_heads" not in name}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match="depth_decoder.lm_heads.weight"):
        DuplexLM.from_pretrained(tmp_path)
