"""A corpus as training batches: tokenised once, the same batches after a restart, what was wrong with it told."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from mm.errors import InputError
from mm.recipes.data.corpus import open_corpus
from mm.recipes.lm import token_file as encoding
from mm.recipes.lm.data import LmModule
from mm.recipes.lm.objectives import NONE
from mm.recipes.lm.settings import LmData
from mm.recipes.lm.tokenizer import train_tokenizer

TALK = [{"role": "user", "content": "How are you, cat?"}, {"role": "assistant", "content": "I am a cat."},
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Still a cat."}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"Story {i}. " + "The cat sat on the mat and saw a dog. " * (i + 1))
    (folder / "bad.txt").write_bytes(b"bad \xff byte")
    (folder / "talk.jsonl").write_text("\n".join([json.dumps({"messages": TALK}), json.dumps({"messages": TALK[:1]})]))
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(open_corpus(str(corpus)), 300)


def module_of(corpus, tokenizer, cache, rank=0, world=1, start=0, workers=0, **changes):
    data = LmData(**{"path": str(corpus), "length": 16, "batch_size": 4, "workers": workers, **changes})
    made = LmModule(data, tokenizer, 5, cache)
    made.prepare_data()
    made.setup()
    made.trainer = SimpleNamespace(global_step=start, max_steps=start + 3,
                                   distributed_sampler_kwargs={"rank": rank, "num_replicas": world},
                                   strategy=SimpleNamespace(root_device=torch.device("cpu")))
    return made


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_batches_are_those_of_the_step_whatever_the_workers_and_processes(corpus, tokenizer, tmp_path):
    plain = list(module_of(corpus, tokenizer, tmp_path).train_dataloader())
    later = list(module_of(corpus, tokenizer, tmp_path, start=2, workers=1).train_dataloader())
    assert len(plain) == len(later) == 3 and same(plain[2], later[0])
    halves = [list(module_of(corpus, tokenizer, tmp_path, rank=rank, world=2).train_dataloader()) for rank in (0, 1)]
    assert all(torch.equal(plain[1][i], torch.cat([half[1][i] for half in halves])) for i in range(3))


def test_a_corpus_is_tokenised_once(corpus, tokenizer, tmp_path, monkeypatch):
    first = module_of(corpus, tokenizer, tmp_path)
    monkeypatch.setattr(encoding, "encoded", lambda *_: pytest.fail("tokenised again"))
    assert module_of(corpus, tokenizer, tmp_path).notes == first.notes
    assert [path.suffixes for path in tmp_path.iterdir()] == [[".tokens", ".safetensors"]]


def test_evaluation_has_every_held_out_token_and_training_none(corpus, tokenizer, tmp_path):
    made = module_of(corpus, tokenizer, tmp_path, holdout=0.2)
    total = made.training.spans.file.size
    assert made.training.spans.size + made.validation.spans.size == total
    assert 0.2 * total <= made.validation.spans.size <= 0.35 * total
    batches = list(made.evaluation(3))
    assert len(batches) == len(made.evaluation(3)) and same(batches[0], made.evaluation(3)[0])
    counted = sum(int((batch.targets != NONE).sum()) for batch in batches)
    assert 0 < counted <= made.validation.spans.size - len(made.validation.spans.starts)
    other = module_of(corpus, tokenizer, tmp_path, val=str(corpus / "00.txt"))
    assert other.training.spans.size == total and other.validation.spans.size < 60
    with pytest.raises(InputError, match="nothing to evaluate on"):
        module_of(corpus, tokenizer, tmp_path, holdout=0.0).evaluation()


def test_only_answers_of_conversations_are_learned(corpus, tokenizer, tmp_path):
    made = module_of(corpus / "talk.jsonl", tokenizer, tmp_path, holdout=0.0, length=256)
    batch = next(iter(made.train_dataloader()))
    learned = tokenizer.pieces._tokenizer.decode(batch.targets[0][batch.targets[0] != NONE].tolist(),
                                                 skip_special_tokens=False)
    assert learned == "I am a cat.<|im_end|>Still a cat.<|im_end|>"
    assert made.notes[0] == "1 conversations that cannot be used:"
    assert "talk.jsonl, line 2: the assistant says nothing" in made.notes[1]
    everything = module_of(corpus / "talk.jsonl", tokenizer, tmp_path, holdout=0.0, length=256, answers=False)
    batch = next(iter(everything.train_dataloader()))
    assert int((batch.targets[0] != NONE).sum()) == everything.training.spans.size - 2


def test_texts_begin_and_end_as_the_tokenizer_says(corpus, tokenizer, tmp_path):
    made = module_of(corpus / "03.txt", tokenizer, tmp_path, holdout=0.0)
    tokens = made.training.spans.file.tokens[: made.training.spans.size].tolist()
    assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
    assert tokens[1:-1] == tokenizer.encode((corpus / "03.txt").read_text())


def test_what_was_wrong_is_told_and_where_documents_come_from(corpus, tokenizer, tmp_path):
    made = module_of(corpus, tokenizer, tmp_path)
    assert any("bad.txt, line 1: the byte 0xff" in note for note in made.notes)
    told = made.told(torch.tensor([[0, 0, -1], [3, 3, 3]]))
    assert len(told) == 2 and all(".txt, line 1" in sentence for sentence in told)


def test_a_corpus_that_changed_cannot_go_on(corpus, tokenizer, tmp_path):
    state = module_of(corpus / "03.txt", tokenizer, tmp_path).state_dict()
    module_of(corpus / "03.txt", tokenizer, tmp_path / "other").load_state_dict(state)
    with pytest.raises(InputError, match="04.txt is not the corpus that this run began with"):
        module_of(corpus / "04.txt", tokenizer, tmp_path).load_state_dict(state)


def test_conversations_need_a_template_and_an_answer(corpus, tmp_path):
    plain = train_tokenizer(open_corpus(str(corpus)), 300, chat=False)
    with pytest.raises(InputError, match="no chat template"):
        module_of(corpus / "talk.jsonl", plain, tmp_path)
    (tmp_path / "mute.jsonl").write_text(json.dumps({"messages": TALK[:1]}))
    chat = train_tokenizer(open_corpus(str(corpus)), 300)
    with pytest.raises(InputError, match="holds nothing to learn from.*mute.jsonl, line 1"):
        module_of(tmp_path / "mute.jsonl", chat, tmp_path)
    assert not list(tmp_path.glob("*tokens*"))
