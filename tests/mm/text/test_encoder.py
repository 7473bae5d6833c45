"""Text encoders against transformers, with re-drawn weights, in both directions; sentence vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from installed import minilm
from support import close, redraw

from mm.errors import InputError
from mm.spec import SentencePooling
from mm.text.encoder import TextEncoder, collate

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

GOLDEN = Path(__file__).parent / "goldens" / "minilm.json"
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
         "intermediate_size": 48, "attn_implementation": "eager"}
CASES = {
    "bert": ("Bert", {"max_position_embeddings": 40, "pad_token_id": 0}),
    "roberta": ("Roberta", {"max_position_embeddings": 42, "pad_token_id": 1, "type_vocab_size": 1}),
    "modernbert": ("ModernBert", {"local_attention": 8, "pad_token_id": 0, "layer_types": [
        "full_attention", "sliding_attention", "sliding_attention", "full_attention"]}),
    "modernbert_biased": ("ModernBert", {"local_attention": 6, "pad_token_id": 0, "attention_bias": True,
                                         "mlp_bias": True, "norm_bias": True, "classifier_bias": True})}


def reference(case: str, head: str = "ForMaskedLM"):
    name, settings = CASES[case]
    config = getattr(transformers, f"{name}Config")(**SMALL, **settings)
    return redraw(getattr(transformers, f"{name}{head}")(config))


def batch(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """ids without the padding ids (3, 33), with rows of 33, 20 and 7 tokens."""
    ids, mask = torch.randint(5, 61, (3, 33)), torch.zeros(3, 33, dtype=torch.bool)
    for row, count in zip(mask, (33, 20, 7), strict=True):
        row[33 - count :] = left
        row[: 33 - count if left else count] = not left
    return ids, mask


def ask(theirs, case: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """BERT alone counts padding as positions, unless told."""
    pad = theirs.config.pad_token_id or 0
    more = {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)} if case == "bert" else {}
    with torch.no_grad():
        return theirs(ids.masked_fill(~mask, pad), attention_mask=mask.long(), **more)[0]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_in_both_directions(case, left, tmp_path):
    torch.manual_seed(0)
    theirs = reference(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = TextEncoder.from_pretrained(tmp_path / "theirs")
    ids, mask = batch(left)
    with torch.no_grad():
        logits = ours.logits(ours(ids, mask))
    close(logits[mask], ask(theirs, case, ids, mask)[mask])
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    close(ask(again, case, ids, mask)[mask], logits[mask])


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_without_a_head(case, tmp_path):
    torch.manual_seed(1)
    theirs = reference(case, "Model")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = TextEncoder.from_pretrained(tmp_path / "theirs")
    ids, mask = batch(left=False)
    hidden = ours(ids, mask)
    close(hidden[mask], ask(theirs, case, ids, mask)[mask])
    with pytest.raises(InputError, match="no head"):
        ours.logits(hidden)
    ours.save_pretrained(tmp_path / "mm")
    assert TextEncoder.from_pretrained(tmp_path / "mm").fingerprint() == ours.fingerprint()


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_do_not_see_each_other(case, tmp_path):
    torch.manual_seed(2)
    reference(case).save_pretrained(tmp_path)
    ours = TextEncoder.from_pretrained(tmp_path)
    ids = torch.randint(5, 61, (1, 30))
    documents = torch.tensor([[0] * 12 + [1] * 15 + [-1] * 3])
    packed = ours(ids, documents=documents)
    close(packed[:, :12], ours(ids[:, :12]))
    close(packed[:, 12:27], ours(ids[:, 12:27]))


# ------------------------------------------------------------------------------------- sentence vectors
def sentence_folder(folder: Path, **flags: bool) -> Path:
    torch.manual_seed(3)
    reference("bert", "Model").save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    (folder / "modules.json").write_text(json.dumps(
        [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    return folder


@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token", "max_tokens"])
def test_pooling_is_read_from_the_directory_and_written_back(mode, tmp_path):
    ours = TextEncoder.from_pretrained(sentence_folder(tmp_path / "a", **{f"pooling_mode_{mode}": True}))
    assert ours.spec.pooling == SentencePooling(over=mode.split("_")[0], normalise=True, length=24)
    ids, mask = batch(left=False)
    hidden = ours(ids, mask)
    row = hidden[1, :20]
    pooled = {"mean_tokens": row.mean(0), "cls_token": row[0], "max_tokens": row.amax(0)}[mode]
    close(ours.pool(hidden, mask)[1], pooled / pooled.norm())
    ours.save_pretrained(tmp_path / "b", layout="hf")
    assert TextEncoder.from_pretrained(tmp_path / "b").spec == ours.spec


def test_unknown_poolings_and_lengths_are_refused(tmp_path):
    with pytest.raises(InputError, match="the pooling lasttoken is not known"):
        TextEncoder.from_pretrained(sentence_folder(tmp_path / "a", pooling_mode_lasttoken=True))
    reference("bert", "Model").save_pretrained(tmp_path / "b")
    plain = TextEncoder.from_pretrained(tmp_path / "b")
    with pytest.raises(InputError, match=r"modules\.json"):
        plain.pool(torch.zeros(1, 2, 32), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="41 tokens are more than the 40 positions"):
        plain(torch.zeros(1, 41, dtype=torch.long))


# ------------------------------------------------------------------------------------- the real model
def test_minilm_gives_the_committed_numbers():
    golden = json.loads(GOLDEN.read_text())
    vectors = TextEncoder.from_pretrained(minilm()).encode(golden["sentences"], batch=7)
    close(vectors[:, :8], torch.tensor(golden["first"]))
    close(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_minilm_equals_transformers_also_where_texts_are_cut():
    folder, sentences = minilm(), json.loads(GOLDEN.read_text())["sentences"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = TextEncoder.from_pretrained(folder)
    given = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    ids, mask = collate(ours.tokenize(sentences), ours.tokenizer.pad_id)
    assert ids.shape[1] == 256
    torch.testing.assert_close(ids, given["input_ids"])
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(**given)[0]
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    close(ours.encode(sentences, batch=7), mean / mean.norm(dim=1, keepdim=True))
