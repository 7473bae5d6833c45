"""Training of a neural codec as a LightningModule.

From the paper (Défossez et al., 2024, Moshi, section 3.3) and its published model: SEANet and transformers, causal,
with weight norm on the convolutions while they train; the split residual quantiser, codebooks as running averages
(decay 0.99), fewer codebooks at random, half of the sequences not quantised; hinge and feature losses from
discriminators over short-time Fourier transforms at several scales; the first codebook distilled from a speech encoder
by cosine distance to its pooled output; AdamW with weight decay for what is not a convolution; averaged weights.
`loss.mel: 0` trains by the discriminators alone, as the published model was.

Ours: the teacher may be Whisper's encoder in place of WavLM, and what it hears is standardised per channel, pooled over
windows of 160 ms every 80 ms and kept on disk; the mel term with the weights of DAC (Kumar et al., 2023); feature
distances relative to the size of the features; codec and discriminators take their steps together, in one backward
pass; how codebooks begin and drop out (`codecs.learning`); learning rates, schedules and the data.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.spec.schema import from_data, to_data

from ...codecs.learning import Learned, add_weight_norm, learn, perplexity, use
from ...codecs.mimi import Mimi
from ...codecs.quantizer import Codebook
from ...codecs.spec import Learning, MimiSpec
from ..data.sampler import torch_seed
from ..train.optim import adamw
from ..train.recipe import Recipe
from ..train.shard import mean_over_processes
from .data import SoundBatch
from .loss import Jury, MelDistance
from .settings import CodecLoss, CodecOptim, Critics

QUANTISING = 11  # the last number of the key of the generator that codebooks draw from, the same in all processes


def lock_codes(codec: Mimi) -> None:
    """Keeps all that makes codes from training."""
    for part in (codec.encoder, codec.encoder_stack, codec.downsample, codec.quantizer):
        part.requires_grad_(False)


class CodecRecipe(Recipe):
    """A Mimi in training and, in `average`, the moving average of its weights, both with split weights
    (`codecs.weight_norm.folded` joins them).

    The settings may be given as the dataclasses or as the plain data that a checkpoint holds, so that
    `CodecRecipe.load_from_checkpoint(path)` works. `codec` is a model of that spec to go on with, if not a new one;
    `heard` is the width of what a teacher says, if there is one. `decoder_only`: what makes codes stays as it is.
    """

    learner = "codec"

    def __init__(self, spec: MimiSpec | dict[str, Any], optim: CodecOptim | dict[str, Any],
                 loss: CodecLoss | dict[str, Any], books: Learning | dict[str, Any], critics: Critics | dict[str, Any],
                 seed: int = 0, heard: int | None = None, codec: Mimi | None = None,
                 decoder_only: bool = False) -> None:
        super().__init__(CodecOptim(**optim) if isinstance(optim, dict) else optim, seed)
        self.settings = from_data(spec) if isinstance(spec, dict) else spec
        self.loss = CodecLoss(**loss) if isinstance(loss, dict) else loss
        self.books = Learning(**books) if isinstance(books, dict) else books
        self.judges = Critics(**critics) if isinstance(critics, dict) else critics
        self.save_hyperparameters({"spec": to_data(self.settings), "optim": asdict(self.optim),
                                   "loss": asdict(self.loss), "books": asdict(self.books),
                                   "critics": asdict(self.judges), "seed": seed, "heard": heard,
                                   "decoder_only": decoder_only})
        self.decoder_only = decoder_only
        codec = codec or Mimi(self.settings)
        if decoder_only:
            lock_codes(codec)
        add_weight_norm(codec)
        self.hold(codec.train())
        self.jury = Jury(self.judges.windows, self.judges.filters) if self.loss.adversarial else None
        self.echo = nn.Linear(self.settings.encoder.dim, heard, bias=False) if heard else None
        self.distance = MelDistance(self.settings.rate)

    def optimizer(self) -> torch.optim.Optimizer:
        optimizer = adamw(self.codec, self.optim)
        if self.echo is not None:
            optimizer.add_param_group({"params": list(self.echo.parameters()), "weight_decay": 0.0})
        if self.jury is not None:
            optimizer.add_param_group({"params": list(self.jury.parameters()), "weight_decay": 0.0,
                                       "lr": self.optim.lr * self.judges.lr})
        return optimizer

    def training_step(self, batch: SoundBatch, batch_idx: int) -> Tensor:
        """The codec's loss and that of the discriminators, whose gradients do not meet."""
        device = batch.wave.device
        with torch.set_grad_enabled(not self.decoder_only):
            latents = self.codec.analyse(batch.wave.transpose(1, 2), None, None, None)
        with torch.autocast(device.type, enabled=False):
            made = self.quantised(latents.float())
        out = self.codec.synthesise(made.latents).transpose(1, 2)
        with torch.autocast(device.type, enabled=False):
            terms = self.terms(out.float(), batch, made)
        weights = {"mel": self.loss.mel, "commit": self.loss.commit, "semantic": self.loss.semantic,
                   "adversarial": self.loss.adversarial, "features": self.loss.features, "critics": 1.0}
        total = sum(weights[name] * term for name, term in terms.items())
        own = total - terms.get("critics", 0.0)
        told = {name: self.mean(term) for name, term in {"loss": own, **terms}.items()}
        self.last = {**dict.fromkeys(weights, 0.0), **told, **self.state_of_books(),
                     "lr": self.optimizers().param_groups[0]["lr"]}
        return total

    def quantised(self, latents: Tensor) -> Learned:
        """Moves the codebooks, but where the decoder alone learns, from all of them or at random fewer."""
        quantizer, step, count = self.codec.quantizer, self.global_step, self.settings.quantizer.codebooks
        generator = torch.Generator(latents.device).manual_seed(torch_seed(self.seed, step, QUANTISING))
        if not self.decoder_only:
            return learn(quantizer, latents, self.books, step, generator)
        drop, few = torch.rand(2, generator=generator, device=latents.device).tolist()
        with torch.no_grad():
            codes = quantizer.encode(latents, count if drop >= self.books.dropout else 1 + int(few * count))
            return Learned(quantizer.decode(codes), latents, codes, latents.new_zeros(()))

    def terms(self, out: Tensor, batch: SoundBatch, made: Any) -> dict[str, Tensor]:
        """By name, before their weights."""
        terms = {"commit": made.commitment}
        if self.loss.mel:
            terms["mel"] = self.distance(out, batch.wave)
        if self.echo is not None:
            terms["semantic"] = 1 - F.cosine_similarity(self.echo(made.semantic), batch.features, dim=-1).mean()
        if self.jury is not None and self.global_step >= self.loss.adversarial_from:
            terms["adversarial"], terms["features"], terms["critics"] = self.jury(out, batch.wave, self.mean)
        return terms

    def mean(self, x: Tensor) -> Tensor:
        """Over processes, without gradient."""
        return mean_over_processes(x) if self.trainer.world_size > 1 else x.detach()

    def state_of_books(self) -> dict[str, Tensor]:
        books = [part for part in self.codec.quantizer.modules() if isinstance(part, Codebook)]
        return {"perplexity": torch.stack([perplexity(book) for book in books]).mean(),
                "use": 100 * torch.stack([use(book, self.books.expire) for book in books]).mean()}

