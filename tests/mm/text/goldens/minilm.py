"""Writes minilm.json beside it: `python tests/mm/text/goldens/minilm.py DIR`, DIR being all-MiniLM-L6-v2 on disk.

The first 8 numbers of transformers' BertModel, mean pooling, normalised, one sentence at a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

SENTENCES = [
    "A man is playing a guitar.", "Someone plays an instrument.", "The cat sleeps on the warm windowsill.",
    "Two dogs run across a field of snow.", "How do I reset my password?",
    "The meeting was moved to Thursday at 10:30.",
    "Paris is the capital of France.", "What is the largest city in Brazil?", "x", "",
    "Déjà vu: café, naïve, Zürich, Ångström!", "北京是中国的首都。", "E = mc^2 and pi is about 3.14159.",
    "antidisestablishmentarianism and pneumonoultramicroscopicsilicovolcanoconiosis",
    "def add(a, b):\n    return a + b", "I can't believe it's not butter -- really?!", "😀 emoji and [MASK] tokens",
    "The quick brown fox jumps over the lazy dog.", "Ships sailed past the lighthouse in heavy rain. " * 3,
    "This text is much longer than the model reads. " * 60]


def main(folder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    first = []
    for sentence in SENTENCES:
        with torch.no_grad():
            hidden = model(**tokenizer(sentence, truncation=True, max_length=256, return_tensors="pt"))[0]
        vector = torch.nn.functional.normalize(hidden.mean(1), dim=-1)[0]
        first.append([round(float(x), 8) for x in vector[:8]])
    text = json.dumps({"sentences": SENTENCES, "first": first}, indent=1, ensure_ascii=False)
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
