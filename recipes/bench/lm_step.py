"""`mm bench lm`: a training step of a 30M Llama-shaped model on a CPU in float32, against transformers' with AdamW."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from mm.errors import InputError
from mm.text.decoder import TextDecoder

from ..common.machine import cores
from ..lm.loss import decoder_loss
from .loss import peak
from .report import Bench, Case, interleave, report

PACKAGES = ("torch", "transformers")
VOCAB, ROWS, LENGTH = 32000, 8, 512
SHAPE = {"vocab_size": VOCAB, "hidden_size": 384, "num_hidden_layers": 11, "num_attention_heads": 6,
         "num_key_value_heads": 2, "intermediate_size": 1024, "max_position_embeddings": LENGTH,
         "tie_word_embeddings": True}
Step = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Lm(Bench):
    """A training step of a 30M Llama-shaped model on a CPU in float32, against transformers' with AdamW.

    Args:
        threads: CPU threads.
        repeats: timed steps of each.
    """

    threads: PositiveInt = cores()
    repeats: PositiveInt = 5

    def run(self) -> int:
        return lm(self)


def lm(args: Lm) -> int:
    torch.set_num_threads(args.threads)
    return report("lm", measure(args.repeats), packages=PACKAGES, json_file=args.json)


def measure(repeats: int) -> list[Case]:
    ours, peer = pair()
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    mine, theirs = our_step(ours, ids), peer_step(peer, ids)
    gap = max(abs(mine().item() - theirs().item()) for _ in range(2))  # the second one after an update
    if gap > 1e-3:
        raise InputError(f"our loss is {gap:.1e} from transformers', so that a timing would mean nothing")
    name = f"{sum(p.numel() for p in ours.parameters()) / 1e6:.0f}M, {ROWS} x {LENGTH} tokens"
    most, least = ((kept(model) + peak(step)) / 2**20 for model, step in ((peer, theirs), (ours, mine)))
    timing = interleave(mine, theirs, repeats)
    return [Case.timed(f"{name}, a training step", timing, at_least=1.1),
            Case(case=f"{name}, peak memory", ours=least, peer=most, ratio=most / least, at_least=1.25, unit="MiB")]


def kept(model: nn.Module) -> int:
    """Bytes of weights and of AdamW's two moments, which outlast a step."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters())


def pair() -> tuple[TextDecoder, nn.Module]:
    """Our model and transformers', with one set of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    peer = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        ours = TextDecoder.from_pretrained(folder)
    return ours.train(), peer.train()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def our_step(model: TextDecoder, ids: Tensor) -> Step:
    optimizer = adamw(model)
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss, _ = decoder_loss(model, model.hidden(ids), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def peer_step(model: nn.Module, ids: Tensor) -> Step:
    optimizer = adamw(model)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
