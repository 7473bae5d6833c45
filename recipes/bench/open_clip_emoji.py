"""`mm bench open_clip_emoji`: open_clip's own CLIP and loss, trained on EmojiCross with our recipe's settings (size,
pictures and captions in the same order, augmentation, batch, steps, optimizer, averaged weights), measured alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from ...encoders.clip import CLIP
from ..clip.data import PairsModule
from ..clip.evaluation import Meter, open_source
from ..clip.fit import model_input, starting_model
from ..clip.module import ClipRecipe
from ..clip.pairs import read_pairs
from ..clip.settings import ClipJob, Shape
from ..search.embed import Embedder
from ..train.launch import lightning_trainer, quiet
from ..train.run import LAST
from ..train.watch import Watch
from .emojicross import TOLD, case
from .report import report


@dataclass(frozen=True, kw_only=True)
class OpenClipEmoji(ClipJob):
    """Train open_clip's model and loss by our emoji recipe and compare it with ours (half an hour). Further options are
    those of `mm train clip`.

    Args:
        out: directory of the peer's run, continued if it exists.
        ours: our model, trained by the same settings.
        json: write the figures to this file.
    """

    defaults: ClassVar[tuple[str, ...]] = ("--config", "clip_emoji")
    out: str
    ours: str = "emoji_clip"
    json: str | None = None

    def run(self) -> int:
        return open_clip_emoji(self)


def open_clip_emoji(job: OpenClipEmoji) -> int:
    source = open_source("emojicross", ())
    peer = Meter(clip=train_peer(job), templates=())(source)
    ours = Meter(clip=Embedder.load(job.ours).clip, templates=())(source)
    cases = [case(f"{split} {way} {k}", ours[split][way][k], peer[split][way][k])
             for split in ours for way in ours[split] for k in TOLD]
    return report("open_clip_emoji", cases, packages=("torch", "open_clip_torch"), json_file=job.json)


class Peer(nn.Module):
    """open_clip's CLIP of a shape, with our preprocessing and tokenizer, as `ClipRecipe` and `Meter` call a model."""

    def __init__(self, shape: Shape, ours: CLIP) -> None:
        super().__init__()
        from open_clip.model import CLIP as OpenCLIP

        image, text = shape.image, shape.text
        vision = {"image_size": image.size, "patch_size": image.patch, "width": image.width, "layers": image.depth,
                  "head_width": image.width // image.heads, "mlp_ratio": image.mlp, "ls_init_value": image.layer_scale,
                  "patch_dropout": image.patch_dropout}
        words = {"context_length": text.context, "vocab_size": ours.tokenizer.vocab_size, "width": text.width,
                 "heads": text.heads, "layers": text.depth, "mlp_ratio": text.mlp}
        self.model = OpenCLIP(embed_dim=shape.dim, vision_cfg=vision, text_cfg=words,
                              init_logit_scale=ours.spec.logit_scale)
        self.preprocessing, self.tokenizer, self.context = ours.preprocessing, ours.tokenizer, text.context
        self.logit_bias = None

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.model.logit_scale

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(pixels), self.encode_text(ids)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)

    def preprocess(self, image: object) -> Tensor:
        return self.preprocessing(image)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer(texts, self.context)


class PeerRecipe(ClipRecipe):
    """Our steps with open_clip's loss."""

    def objective(self, image: Tensor, text: Tensor, group: Tensor) -> Tensor:
        from open_clip.loss import ClipLoss

        image, text = (nn.functional.normalize(x, dim=-1) for x in (image, text))
        return ClipLoss()(image, text, self.clip.logit_scale.exp())


def train_peer(job: ClipJob) -> nn.Module:
    """The averaged weights at the end of the run."""
    quiet()
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    pairs = read_pairs(job.data.path)
    ours = starting_model(job, pairs)
    recipe = PeerRecipe(ours.spec, job.optim, job.loss, job.trainer.seed, Peer(job.shape, ours))
    module = PairsModule(pairs, replace(model_input(ours), trim=False), job.data, job.augment, job.trainer.seed)
    last = out / LAST if (out / LAST).exists() else None
    lightning_trainer(job.trainer, Watch(out, job.trainer, None)).fit(recipe, module, ckpt_path=last, weights_only=True)
    return recipe.average.eval()
