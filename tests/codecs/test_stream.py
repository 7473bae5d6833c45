"""Streaming equals offline: any chunks, rows that pause, reset and join, past the window, in another process."""

import subprocess
import sys

import codec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import close

from mm.codecs import Mimi
from mm.codecs.state import Framer
from mm.errors import InputError

FRAME, LENGTH = 16, 24  # samples; frames, almost five windows


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return codec.small()


def pieces(x, sizes, axis, unit=1):
    """x cut into runs of `sizes` units, in turns."""
    found, start, turn = [], 0, 0
    while start < x.shape[axis]:
        stop = min(start + sizes[turn % len(sizes)] * unit, x.shape[axis])
        found.append(x.narrow(axis, start, stop - start))
        start, turn = stop, turn + 1
    return found


sizes = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@settings(max_examples=8)
@given(sizes, st.integers(1, 5), st.integers(1, 3))
def test_any_chunks_of_whole_frames(model, sizes, chunk, batch):
    wave = codec.wave(batch, LENGTH * FRAME)
    state = model.init_state(batch, chunk=chunk)
    latents = torch.cat([model.latents(piece, state=state) for piece in pieces(wave, sizes, 2, FRAME)], 1)
    offline = model.latents(wave)
    close(latents, offline)
    state.reset()
    codes = torch.cat([model.encode(piece, state=state) for piece in pieces(wave, sizes, 2, FRAME)], 2)
    codec.same_codes(model, offline, codes, model.encode(wave))
    decoded = torch.cat([model.decode(piece, state=state) for piece in pieces(codes, sizes, 2)], 2)
    close(decoded, model.decode(codes))


def test_frames_whose_codes_differ_are_at_most_one_in_a_thousand(model):
    """Where two entries are about as near, rounding decides; all codebooks of 2,400 frames."""
    wave = codec.wave(100, LENGTH * FRAME)
    state = model.init_state(100)
    codes = torch.cat([model.encode(piece, state=state) for piece in wave.split(FRAME, 2)], 2)
    assert (codes != model.encode(wave)).any(1).float().mean() <= 0.001


@settings(max_examples=8)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any))
def test_any_number_of_samples(model, sizes):
    wave = codec.wave(2, LENGTH * FRAME - 5)
    framer, state, latents = Framer.empty(2, 1, FRAME), model.init_state(2), []
    for piece in [*(framer.push(piece) for piece in pieces(wave, sizes, 2)), framer.flush()]:
        if piece.shape[2]:
            latents.append(model.latents(piece, state=state))
    close(torch.cat(latents, 1), model.latents(wave))
    assert framer.flush().shape == (2, 1, 0)


ROWS = 3
events = st.lists(st.tuples(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
                            st.sampled_from([None, None, None, 0, 1, 2])), min_size=12, max_size=30)


@settings(max_examples=8)
@given(events, st.integers(0, 99))
def test_rows_that_pause_reset_and_join(model, events, seed):
    """Each row's stream is what it would be alone; rows start again in the middle, some by a state from elsewhere."""
    state, said, heard = model.init_state(ROWS), [[] for _ in range(ROWS)], [[] for _ in range(ROWS)]
    wave = codec.wave(ROWS, len(events) * FRAME, seed).split(FRAME, 2)
    for (mask, restart), piece in zip(events, wave, strict=True):
        if restart is not None:
            if restart:
                state.reset(torch.arange(ROWS) == restart)
            else:
                state.insert(torch.tensor([restart]), model.init_state(1))
            said[restart], heard[restart] = [], []
        rows = torch.tensor(mask)
        latents = model.latents(piece, state=state, rows=rows)
        codes = model.quantizer.encode(latents, 8)
        decoded = model.decode(codes, state=state, rows=rows)
        for row in rows.nonzero().flatten().tolist():
            said[row].append(piece[row])
            heard[row].append((latents[row], codes[row], decoded[row]))
    for row in range(ROWS):
        if said[row]:
            latents, codes, decoded = (torch.cat(x, axis) for x, axis in zip(zip(*heard[row], strict=True), (0, 1, 1),
                                                                             strict=True))
            close(latents, model.latents(torch.cat(said[row], 1)[None])[0])
            close(decoded, model.decode(codes[None])[0])


def test_a_row_moves_to_another_state(model):
    wave = codec.wave(1, LENGTH * FRAME)
    alone, many = model.init_state(1), model.init_state(4)
    first = model.latents(wave[..., : 7 * FRAME], state=alone)
    many.insert(torch.tensor([2]), alone)
    noise = codec.wave(4, (LENGTH - 7) * FRAME, 5)
    noise[2] = wave[0, :, 7 * FRAME :]
    second = model.latents(noise, state=many)[2:3]
    close(torch.cat([first, second], 1), model.latents(wave))
    back = many.select(torch.tensor([2]))
    close(model.latents(wave, state=back), model.latents(torch.cat([wave, wave], 2))[:, LENGTH:])


def test_a_state_goes_on_in_another_process(model, tmp_path):
    from safetensors.torch import load_file, save_file

    wave = codec.wave(2, LENGTH * FRAME)
    codes, framer = model.encode(wave), Framer.empty(2, 1, FRAME)
    state = model.init_state(2)
    head = framer.push(wave[..., : 10 * FRAME + 3])
    model.latents(head, state=state)
    model.decode(codes[..., :10], state=state)
    model.save_pretrained(tmp_path / "model")
    state.save(tmp_path / "state.safetensors")
    framer.save(tmp_path / "framer.safetensors")
    save_file({"wave": wave[..., 10 * FRAME + 3 :].contiguous(), "codes": codes[..., 10:].contiguous()},
              tmp_path / "rest.safetensors")
    script = """
import sys, torch
from safetensors.torch import load_file, save_file
from mm.codecs import Mimi
from mm.codecs.state import Framer
torch.set_num_threads(1)
torch.set_grad_enabled(False)
model, rest = Mimi.from_pretrained("model"), load_file("rest.safetensors")
state = model.init_state(2).load("state.safetensors")
framer = Framer.empty(2, 1, model.spec.frame).load("framer.safetensors")
out = {"latents": model.latents(framer.push(rest["wave"]), state=state),
       "wave": model.decode(rest["codes"], state=state)}
save_file({name: value.contiguous() for name, value in out.items()}, "out.safetensors")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    out = load_file(tmp_path / "out.safetensors")
    close(out["latents"], model.latents(wave)[:, 10:])
    close(out["wave"], model.decode(codes)[..., 10 * FRAME :])


def test_the_official_window_loses_keys_and_ours_does_not(model):
    """After the window, the first step of a frame sees one key less under the official rule (moshi 0.2.13)."""
    wave = codec.wave(1, LENGTH * FRAME)
    offline = model.latents(wave)
    state = model.init_state(1, official_window=True)
    streamed = torch.cat([model.latents(piece, state=state) for piece in wave.split(FRAME, 2)], 1)
    within = codec.WINDOW // 2
    close(streamed[:, :within], offline[:, :within])
    assert (streamed - offline)[:, within:].abs().max() > 1e-3


def test_the_official_window_is_the_official_packages(tmp_path, monkeypatch):
    pytest.importorskip("moshi", reason="the official package; goldens are compared elsewhere")
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    theirs, wave = codec.official(), codec.wave(2, 1920 * 16)
    ours = Mimi.from_pretrained(codec.write_kyutai(theirs, tmp_path / "kyutai"))
    for frames in (1, 2):
        state = ours.init_state(2, chunk=frames, official_window=True)
        with theirs.streaming(2):
            for piece in wave.split(1920 * frames, 2):
                wanted = theirs.encode_to_latent(piece, quantize=False).transpose(1, 2)
                close(ours.latents(piece, state=state), wanted)


def test_lengths_of_a_batch(model):
    lengths = torch.tensor([5, 3 * FRAME, 7 * FRAME + 1, LENGTH * FRAME])
    wave = codec.wave(4, LENGTH * FRAME)
    for padding in ("frame", "layer"):
        codes = model.encode(wave, lengths=lengths, padding=padding)
        latents = model.latents(wave, lengths=lengths, padding=padding)
        for row, length in enumerate(lengths.tolist()):
            alone, frames = wave[row : row + 1, :, :length], -(-length // FRAME)
            close(latents[row : row + 1, :frames], model.latents(alone, padding=padding))
            assert torch.equal(codes[row : row + 1, :, :frames], model.encode(alone, padding=padding))
            assert bool((codes[row, :, frames:] == -1).all())
    frames = -(-lengths // FRAME)
    decoded = model.decode(codes, lengths=frames)
    for row, count in enumerate(frames.tolist()):
        close(decoded[row : row + 1, :, : count * FRAME], model.decode(codes[row : row + 1, :, :count]))
        assert not decoded[row, :, count * FRAME :].any()


def test_fewer_codebooks_are_the_first_ones(model):
    wave = codec.wave(1, 6 * FRAME)
    codes = model.encode(wave)
    for count in (1, 3):
        assert torch.equal(model.encode(wave, codebooks=count), codes[:, :count])
        assert torch.isfinite(model.decode(codes[:, :count])).all()


def test_memory_of_a_stream_does_not_grow(model):
    from mm.tree import tensors

    state = model.init_state(1)
    before = {name: (x.shape, x.data_ptr()) for name, x in tensors(state)}
    for piece in codec.wave(1, LENGTH * FRAME).split(FRAME, 2):
        model.decode(model.encode(piece, state=state), state=state)
    assert {name: (x.shape, x.data_ptr()) for name, x in tensors(state)} == before


def bad(value):
    wave = codec.wave(1, FRAME)
    wave[0, 0, 3] = value
    return wave


@pytest.mark.parametrize("call, message", [
    (lambda m: m.encode(torch.zeros(1, 2, FRAME)), r"floating-point \(B, 1, L\), not torch.float32 \(1, 2, 16\)"),
    (lambda m: m.encode(torch.zeros(1, 1, FRAME, dtype=torch.int16)), "not torch.int16"),
    (lambda m: m.encode(torch.zeros(1, 1, 0)), "the wave is empty"),
    (lambda m: m.encode(bad(torch.nan)), "samples that are not finite"),
    (lambda m: m.encode(bad(torch.inf), state=m.init_state(1)), "samples that are not finite"),
    (lambda m: m.encode(bad(0), codebooks=9), "codebooks should be 1 to 8, not 9"),
    (lambda m: m.encode(bad(0), lengths=torch.tensor([17])), "lengths should be 1 to 16 samples, not 17"),
    (lambda m: m.encode(bad(0), lengths=torch.tensor([0])), "lengths should be 1 to 16 samples"),
    (lambda m: m.encode(bad(0), lengths=torch.tensor([1]), state=m.init_state(1)), "lengths is for whole waves"),
    (lambda m: m.encode(torch.zeros(1, 1, 9), state=m.init_state(1)), "whole frames of 16 samples, not 9"),
    (lambda m: m.encode(bad(0), state=m.init_state(2)), "the state holds 2 rows and the input 1"),
    (lambda m: m.encode(bad(0), rows=torch.tensor([True])), "rows says which rows of a state advance"),
    (lambda m: m.encode(bad(0), state=m.init_state(1), rows=torch.tensor([1])), r"rows should be \(1,\) bool"),
    (lambda m: m.encode(bad(0), state=codec.small(codec.SPEC).init_state(1)), "the state was made by a model"),
    (lambda m: m.decode(torch.full((1, 8, 2), 64)), "codes should be 0 to 63, not 64 to 64"),
    (lambda m: m.decode(torch.full((1, 8, 2), -1)), "codes should be 0 to 63"),
    (lambda m: m.decode(torch.zeros(1, 9, 2, dtype=torch.long)), "9 codebooks of codes are more than the model's 8"),
    (lambda m: m.decode(torch.zeros(1, 0, 2, dtype=torch.long)), r"integers \(B, Q, T\)"),
    (lambda m: m.decode(torch.zeros(1, 8, 2)), r"integers \(B, Q, T\), not torch.float32"),
    (lambda m: m.init_state(0), "at least one row"),
    (lambda m: Framer.empty(1, 1, 16).push(torch.zeros(2, 1, 5)), r"expected samples \(1, 1, L\), not \(2, 1, 5\)"),
])
def test_bad_input(model, call, message):
    with pytest.raises(InputError, match=message):
        call(model)


def test_a_paused_row_may_hold_anything(model):
    wave = torch.cat([codec.wave(1, FRAME), bad(torch.nan)])
    state = model.init_state(2)
    codes = model.encode(wave, state=state, rows=torch.tensor([True, False]))
    assert torch.equal(codes[:1], model.encode(wave[:1]))
    again = model.encode(codec.wave(2, FRAME), state=state, rows=torch.tensor([False, True]))
    assert torch.equal(again[1:], model.encode(codec.wave(2, FRAME)[1:]))


def test_gradients_and_a_state_exclude_each_other(model):
    with torch.enable_grad(), pytest.raises(InputError, match="updated in place"):
        model.latents(codec.wave(1, FRAME), state=model.init_state(1))


def test_gradients_reach_every_weight_of_both_sides():
    model = codec.small()
    with torch.enable_grad():
        latents = model.latents(codec.wave(1, 4 * FRAME))
        model.synthesise(latents).square().mean().backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(name.startswith("quantizer.") for name in missing)


def test_a_saved_state_of_another_model_is_refused(model, tmp_path):
    model.init_state(1).save(tmp_path / "state.safetensors")
    with pytest.raises(InputError, match="made by a model with spec"):
        codec.small(codec.SPEC).init_state(1).load(tmp_path / "state.safetensors")
    with pytest.raises(InputError, match="has shape"):
        model.init_state(2).load(tmp_path / "state.safetensors")
