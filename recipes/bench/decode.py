"""`mm bench decode`: 128 tokens written after 128 by a model of SmolLM2-135M's shape on a CPU, against transformers'
`generate` with the same random weights, and against the speed at which memory is read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from mm.decode.sampling import Sampling
from mm.errors import InputError
from mm.lowbit import arrange, arrange_for_rows, quantize
from mm.text.decoder import TextDecoder

from ..common.machine import cores
from .report import Bench, Case, in_turns, report

PACKAGES = ("torch", "transformers")
VOCAB, PROMPT, NEW, LONG, ROWS = 49152, 128, 128, 1024, 8
SHAPE = {"vocab_size": VOCAB, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 2048, "rope_theta": 1e5,
         "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Write = Callable[[Tensor, int], list[list[int]]]  # prompts (B, T), how many tokens -> the tokens


@dataclass(frozen=True, kw_only=True)
class Decode(Bench):
    """128 tokens written after 128 by a model of SmolLM2-135M's shape on a CPU, against transformers' `generate`
    with the same random weights, and against the speed at which memory is read.

    Args:
        threads: CPU threads.
        repeats: timed calls of each.
    """

    threads: PositiveInt = cores()
    repeats: PositiveInt = 3

    def run(self) -> int:
        return decode(self)


def decode(args: Decode) -> int:
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        return report("decode", measure(args.repeats), packages=PACKAGES, json_file=args.json)


def measure(repeats: int) -> list[Case]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs, halves = peers(folder)
        models = [TextDecoder.from_pretrained(folder) for _ in range(4)]
    plain, int8 = arrange(models[0]), quantize(models[1])
    single, several, eight = map(writer, (plain, arrange_for_rows(models[2]), int8))
    compiled, eight_compiled = writer(models[3], compiled=True), writer(int8, compiled=True)
    one, many, long = (torch.randint(VOCAB, shape) for shape in ((1, PROMPT), (ROWS, PROMPT), (1, LONG)))
    for ours, ids in ((single, one), (compiled, one), (several, many)):
        if ours(ids, NEW // 4) != theirs(ids, NEW // 4):
            raise InputError("our greedy tokens are not transformers', so that a timing would mean nothing")
    eight_compiled(one, 2)
    best = fastest(everyone := {"fp32": theirs, **halves}, one)
    return [*race({"fp32": single, "fp32, compiled step": compiled}, "fp32", theirs, one, NEW, repeats, 1.5),
            *race({"int8 weights": eight, "int8 weights, compiled step": eight_compiled}, best, everyone[best], one,
                  NEW, repeats, 3.0),
            bandwidth(plain, compiled, one, repeats),
            *race({f"fp32, {ROWS} rows": several}, "fp32", theirs, many, NEW, repeats, 1.3),
            *race({f"fp32, a prompt of {LONG} read": single}, "fp32", theirs, long, 1, repeats, 1.0)]


def race(writers: dict[str, Write], kind: str, peer: Write, ids: Tensor, new: int, repeats: int, at_least: float
         ) -> list[Case]:
    """Tokens per second of each: those written, or those read where one is written. The peer is never compiled."""
    calls = {name: partial(write, ids, new) for name, write in {**writers, "peer": peer}.items()}
    seconds, count = in_turns(calls, repeats, warmup=0), ids.shape[0] * new if new > 1 else ids.numel()
    return [Case(case=f"{name}; peer {kind}, as it is", ours=count / seconds[name], peer=count / seconds["peer"],
                 ratio=seconds["peer"] / seconds[name], at_least=at_least, unit="tokens/s") for name in writers]


def bandwidth(model: nn.Module, write: Write, ids: Tensor, repeats: int) -> Case:
    """Bytes of weights that decoding reads per second, beside a plain sum over a gigabyte."""
    block = torch.ones(1 << 28)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    seconds = in_turns({"whole": partial(write, ids, NEW), "first": partial(write, ids, 1), "sum": block.sum}, repeats)
    ours, peer = size * (NEW - 1) / (seconds["whole"] - seconds["first"]) / 1e9, 4e-9 * len(block) / seconds["sum"]
    return Case(case="fp32, compiled step, weights read, beside memory", ours=ours, peer=peer, ratio=ours / peer,
                at_least=0.6, unit="GB/s")


def fastest(writers: dict[str, Write], ids: Tensor) -> str:
    seconds = in_turns({name: partial(write, ids, NEW) for name, write in writers.items()}, 1, warmup=0)
    return min(seconds, key=seconds.get)


def writer(model: TextDecoder, compiled: bool = False) -> Write:
    return lambda ids, new: [out.ids for out in model.generate(ids, Sampling(max_tokens=new), compiled=compiled)]


def peers(folder: str) -> tuple[Write, dict[str, Write]]:
    """transformers' model in float32, written to the folder, and in shorter types."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def write_by(model: LlamaForCausalLM) -> Write:
        return lambda ids, new: model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0,
        )[:, ids.shape[1]:].tolist()
    whole = LlamaForCausalLM(LlamaConfig(**SHAPE))
    whole.save_pretrained(folder)
    return write_by(whole), {name: write_by(LlamaForCausalLM.from_pretrained(folder, dtype=dtype))
                             for name, dtype in HALVES.items()}
