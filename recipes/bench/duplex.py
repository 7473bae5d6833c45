"""`mm bench duplex`: a 33M duplex model against the official moshi package with the same weights on a CPU: a step of
one session on one thread, and a training step, time and memory; and a step of 8 sessions with the models that ship."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from mm.errors import InputError
from mm.lowbit import arrange
from mm.speech.duplex import DuplexLM

from ..commands.talk import MODEL
from ..common.machine import cores
from ..duplex.loss import losses
from ..duplex.settings import DuplexLoss
from ..talk.capacity import step_seconds
from ..talk.partner import Partner
from .loss import peak
from .report import Bench, Case, interleave, report

PACKAGES = ("torch", "moshi")
CONTEXT, FRAMES, ROWS, LENGTH = 250, 20, 4, 125
SESSIONS, MOST = 8, 80  # ms of a step of so many
CONFIG: dict[str, Any] = {
    "dim": 320, "text_card": 2000, "existing_text_padding_id": 3, "n_q": 16, "dep_q": 8, "card": 2048, "num_heads": 5,
    "num_layers": 6, "hidden_scale": 4.125, "causal": True, "layer_scale": None, "context": CONTEXT,
    "max_period": 10000, "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope",
    "depformer_dim": 192, "depformer_dim_feedforward": 792, "depformer_num_heads": 3, "depformer_num_layers": 2,
    "depformer_layer_scale": None, "depformer_multi_linear": True, "depformer_context": 8,
    "depformer_max_period": 10000, "depformer_gating": "silu", "depformer_pos_emb": "none",
    "depformer_weights_per_step": True, "delays": [0, 0, *[1] * 7, 0, *[1] * 7]}
SETTINGS = DuplexLoss()


@dataclass(frozen=True, kw_only=True)
class Duplex(Bench):
    """A 33M duplex model against the official moshi package with the same weights on a CPU: a step of one session
    on one thread, and a training step, time and memory; and a step of 8 sessions with the models that ship.

    Args:
        threads: CPU threads of the training step.
        repeats: timed calls of each.
    """

    threads: PositiveInt = cores()
    repeats: PositiveInt = 9

    def run(self) -> int:
        return duplex(self)


def duplex(args: Duplex) -> int:
    os.environ["NO_TORCH_COMPILE"] = "1"  # the official package would compile for a while, or fail without a compiler
    cases = streaming(args.repeats) + sessions(args.repeats)
    torch.set_num_threads(args.threads)
    return report("duplex", [*cases, *training(args.repeats)], packages=PACKAGES, json_file=args.json)


def pair() -> tuple[DuplexLM, nn.Module]:
    """Our model and the official one, with one set of random weights."""
    from moshi.models import loaders
    from safetensors.torch import save_file

    torch.manual_seed(0)
    peer = loaders.get_moshi_lm(None, CONFIG, device="cpu", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        save_file(peer.state_dict(), Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        return DuplexLM.from_pretrained(folder), peer


def size(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M"


def streaming(repeats: int) -> list[Case]:
    """A session that has a full context, `FRAMES` steps at a time; both say the same."""
    from moshi.models.lm import LMGen

    torch.set_num_threads(1)
    ours, peer = pair()
    arrange(ours)
    heard = torch.randint(CONFIG["card"], (1, 8, FRAMES))
    gen = LMGen(peer, use_sampling=False, support_out_of_sync=True)
    with torch.no_grad(), gen.streaming(1):
        state = ours.init_state(1)

        def mine() -> Tensor:
            return torch.stack([ours.step(heard[..., t], state).tokens for t in range(FRAMES)], 2)

        def theirs() -> Tensor:
            return torch.cat([gen.step(heard[..., t:t + 1]) for t in range(FRAMES)], 2)
        same = torch.equal(torch.cat([mine() for _ in range(2)], 2), torch.cat([theirs() for _ in range(2)], 2))
        if not same:
            raise InputError("our session says other things than the official package's: a timing would mean nothing")
        for _ in range(CONTEXT // FRAMES):
            mine(), theirs()
        timing = interleave(mine, theirs, repeats)
    case = Case.timed(f"{size(ours)}, {FRAMES} steps of a session, one thread", timing, at_least=1.5)
    return [case]


def sessions(repeats: int) -> list[Case]:
    """The shipped models, from the frames that all sessions hear to those that they say."""
    torch.set_num_threads(1)
    partner = Partner.open(MODEL, device="cpu")
    partner.arrange(SESSIONS)
    ms = 1000 * step_seconds(partner, SESSIONS, FRAMES * repeats)
    return [Case.limited(f"{MODEL}, {SESSIONS} sessions in one step, one thread", ms, MOST)]


def training(repeats: int) -> list[Case]:
    ours, peer = pair()
    codes = torch.randint(CONFIG["card"], (ROWS, 17, LENGTH))
    codes[:, 0] %= CONFIG["text_card"]
    mine, theirs = (step(model.train(), codes, loss) for model, loss in ((ours, our_loss), (peer, peer_loss)))
    gap = max(abs(mine().item() - theirs().item()) for _ in range(2))  # the second one after an update
    if gap > 1e-3:
        raise InputError(f"our loss is {gap:.1e} from the official one's, so that a timing would mean nothing")
    name = f"{size(ours)}, {ROWS} x {LENGTH} frames"
    most, least = (peak(one) / 2**20 for one in (theirs, mine))
    timing = interleave(mine, theirs, repeats)
    return [Case.timed(f"{name}, a training step", timing, at_least=1.5),
            Case(case=f"{name}, peak memory beside weights and AdamW", ours=least, peer=most, ratio=most / least,
                 at_least=1 / 0.7, unit="MiB")]


def step(model: nn.Module, codes: Tensor, loss: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> Tensor:
        value = loss(model, codes)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()  # so that a step begins without gradients, whose memory would hide that of others
        return value.detach()
    return run


def our_loss(model: DuplexLM, codes: Tensor) -> Tensor:
    made = losses(model, codes, SETTINGS)
    return made.text / made.weight[0] + made.audio / made.weight[1]


def peer_loss(model: nn.Module, codes: Tensor) -> Tensor:
    """Weighted means as moshi-finetune takes them."""
    made = model(codes)
    words, said = codes[:, :1], codes[:, 1:1 + model.dep_q]
    idle = (words == model.text_padding_token_id) | (words == model.end_of_text_padding_id)
    worth = torch.where(idle, SETTINGS.text_padding, 1.0)
    first = torch.ones_like(said, dtype=torch.float32)
    first[:, 0] = SETTINGS.first_codebook
    return (weighted(made.text_logits, words, worth * made.text_mask) + weighted(made.logits, said, first * made.mask))


def weighted(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    entropy = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    weight = weight.flatten()
    return torch.where(weight > 0, entropy * weight, 0).sum() / weight.sum()
