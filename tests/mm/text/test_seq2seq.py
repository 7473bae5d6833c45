"""Encoder-decoders equal transformers' T5 and BART: logits, padding, streams, greedy and beam answers, files."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import close, redraw

from mm import Sampling, Seq2Seq
from mm.decode import Beams
from mm.errors import InputError

SIZES = {"vocab_size": 61, "d_model": 32, "decoder_start_token_id": 0}
T5 = {**SIZES, "d_kv": 12, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "eos_token_id": 1,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "pad_token_id": 0}
BART = {**SIZES, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4, "decoder_attention_heads": 2, "max_position_embeddings": 80,
        "decoder_start_token_id": 2, "forced_eos_token_id": None, "eos_token_id": 2, "pad_token_id": 1}
KINDS = {"t5": (transformers.T5Config, T5),
         "t5 1.1": (transformers.T5Config, {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
         "bart": (transformers.BartConfig, BART),
         "bart scaled": (transformers.BartConfig, {**BART, "scale_embedding": True, "activation_function": "relu"})}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """transformers' model with re-drawn weights, ours from its directory, the directory."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    kind, settings = KINDS[request.param]
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(kind(**settings))
    if request.param == "t5 1.1":  # from_config ties a head that real files of 1.1 hold apart
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(theirs.shared.weight))
    redraw(theirs)
    if kind is transformers.BartConfig:
        theirs.final_logits_bias.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    return theirs, Seq2Seq.from_pretrained(folder), folder


def ids(*shape):
    return torch.randint(3, 61, shape)


@torch.no_grad()
def test_equal_to_transformers_past_the_farthest_bucket(pair):
    theirs, ours, _ = pair
    source, target = ids(2, 70), ids(2, 50)
    heard = theirs.get_encoder()(source).last_hidden_state
    close(ours.encode(source), heard)
    close(ours(source, target), theirs(input_ids=source, decoder_input_ids=target).logits)


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
def test_padded_rows_equal_themselves_alone_in_transformers(pair, left):
    theirs, ours, _ = pair
    lengths = [(40, 30), (9, 3), (25, 30)]
    source, target = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 30, dtype=torch.long)
    mask, target_mask = source.bool(), target.bool()
    for i, (s, t) in enumerate(lengths):
        mask[i, slice(40 - s, 40) if left else slice(s)] = True
        target_mask[i, slice(30 - t, 30) if left else slice(t)] = True
    source[mask], target[target_mask] = ids(int(mask.sum())), ids(int(target_mask.sum()))
    logits = ours(source, target, mask, target_mask)
    for i in range(3):
        alone = theirs(input_ids=source[i, mask[i]][None], decoder_input_ids=target[i, target_mask[i]][None]).logits
        close(logits[i, target_mask[i]], alone[0])


@torch.no_grad()
def test_a_stream_with_a_remembered_text_equals_the_whole(pair):
    _, ours, _ = pair
    source, target = ids(2, 33), ids(2, 45)
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[1, :9] = False
    whole, memory = ours(source, target, mask), ours.remember(source, mask)
    state = ours.decoder.init_state(2, length=50)
    parts = [ours.decoder.hidden(part, memory=memory, state=state) for part in target.split([1, 20, 1, 3, 1, 19], 1)]
    close(ours.decoder.logits(torch.cat(parts, 1)), whole)
    row = ours.decoder(target[1:], memory=memory.select(torch.tensor([1])))
    close(row, whole[1:])


# ------------------------------------------------------------------------------------- answers
TEXTS = [torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 40, 1, 17, 60)]


@torch.no_grad()
def expected(theirs, end, **settings):
    """transformers' answer to each text alone, without its first id and what ends it."""
    rows = [theirs.generate(torch.tensor([row]), do_sample=False, max_new_tokens=16, eos_token_id=end, **settings)
            [0, 1:].tolist() for row in TEXTS]
    return [row[:row.index(end)] if end in row else row for row in rows]


@pytest.fixture(scope="module")
def ended(pair, tmp_path_factory):
    """transformers' model and ours, with weights that make them say more than one word, and a token that ends some
    answers."""
    theirs = copy.deepcopy(pair[0])
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            parameter.data *= 3 if name.endswith("weight") else 0
    for buffer in theirs.buffers():
        buffer.zero_()
    said = expected(theirs, theirs.config.eos_token_id)
    assert len({tuple(row) for row in said}) > 2
    end = next(i for row in said for i in row[1:] if sum(i in other for other in said) in (1, 2, 3))
    theirs.save_pretrained(folder := tmp_path_factory.mktemp("ended"))
    ours = Seq2Seq.from_pretrained(folder)
    ours.spec = replace(ours.spec, end=end)
    return theirs, ours, end


def test_greedy_answers_equal_transformers_also_when_rows_come_and_go(ended):
    theirs, ours, end = ended
    wanted = expected(theirs, end)
    for slots in (1, 2, 5):
        found = ours.generate(TEXTS, Sampling(max_tokens=16), slots=slots)
        assert [one.ids for one in found] == wanted
        assert {one.reason for one in found} == {"eos", "length"}


@pytest.mark.parametrize("beams, penalty", [(2, 1.0), (4, 2.0), (3, 0.0)])
def test_beams_equal_transformers(ended, beams, penalty):
    theirs, ours, end = ended
    found = ours.generate(TEXTS, Sampling(max_tokens=16), beams=Beams(count=beams, length_penalty=penalty))
    assert [one.ids for one in found] == expected(theirs, end, num_beams=beams, length_penalty=penalty)


def test_samples_do_not_depend_on_the_company(pair):
    _, ours, _ = pair
    settings = [Sampling(max_tokens=12, temperature=0.9, top_p=0.9, seed=i) for i in range(5)]
    together = ours.generate(TEXTS, settings, slots=3)
    alone = [ours.generate([row], one)[0] for row, one in zip(TEXTS, settings, strict=True)]
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert len({tuple(one.ids) for one in together}) > 3


# ------------------------------------------------------------------------------------- files
@torch.no_grad()
def test_what_is_written_opens_in_transformers(pair, tmp_path):
    theirs, ours, folder = pair
    ours.save_pretrained(tmp_path / "hf", layout="hf")
    again = type(theirs).from_pretrained(tmp_path / "hf").eval()
    source, target = ids(2, 30), ids(2, 12)
    close(again(input_ids=source, decoder_input_ids=target).logits,
          theirs(input_ids=source, decoder_input_ids=target).logits)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    ours.save_pretrained(tmp_path / "mm")
    assert Seq2Seq.from_pretrained(tmp_path / "mm").fingerprint() == ours.fingerprint()


def test_the_head_of_t5_is_read_off_its_files(pair, tmp_path):
    theirs, ours, folder = pair
    if theirs.config.model_type != "t5":
        pytest.skip("T5's files")
    config = json.loads((folder / "config.json").read_text())
    scaled = config.pop("scale_decoder_outputs")
    config["tie_word_embeddings"] = scaled  # as in files before transformers 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert Seq2Seq.from_pretrained(tmp_path).spec == ours.spec
    assert ours.spec.decoder.head.tied == scaled == (ours.spec.decoder.head.scale != 1)


def test_gradients_reach_both_sides(pair):
    _, ours, _ = pair
    ours(ids(2, 20), ids(2, 9)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ours.parameters())
    assert sum(p.grad.abs().sum() > 0 for p in ours.encoder.parameters()) > 10
    ours.zero_grad()


# ------------------------------------------------------------------------------------- bad input
def test_mistakes_are_named(pair, tmp_path):
    _, ours, folder = pair
    for rows, told in (([[]], "empty"), ([[1, 99]], "vocabulary"), (["a text"], "no tokenizer"), ([], "no prompts")):
        with pytest.raises(InputError, match=told):
            ours.generate(rows)
    with pytest.raises(InputError, match="beam search takes the likeliest"):
        ours.generate([[5]], Sampling(temperature=1.0), beams=Beams())
    with pytest.raises(InputError, match=r"mask \(1, 4\) does not fit ids \(1, 5\)"):
        ours.encode(ids(1, 5), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="integers"):
        ours.encode(torch.zeros(1, 5))
    with pytest.raises(InputError, match="cross-attention needs memory"):
        ours.decoder(ids(1, 5))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": -1}))
    with pytest.raises(InputError, match="d_model should be positive"):
        Seq2Seq.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "prefix_projection": True}))
    with pytest.raises(InputError, match="prefix_projection"):
        Seq2Seq.from_pretrained(tmp_path)


def test_more_tokens_than_positions(pair):
    theirs, ours, _ = pair
    if theirs.config.model_type == "t5":
        assert ours.encode(ids(1, 600)).shape == (1, 600, 32)  # distances have no end
        return
    with pytest.raises(InputError, match="81 tokens are more than the 80 positions"):
        ours.encode(ids(1, 81))
    with pytest.raises(InputError, match="81 tokens"):
        ours.generate([ids(81).tolist()])
