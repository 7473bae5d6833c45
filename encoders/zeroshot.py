"""Labels as classifiers: each becomes the mean of its prompts' embeddings (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import InputError

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": (
        "a photo of a {}.",
        "a photograph that shows the {}.",
        "a {} in plain daylight.",
        "a phone snapshot of some {}.",
        "a {} in the middle of the picture.",
        "the {}, seen from nearby.",
    ),
    "broad": (
        "{}",
        "an image of a {}.",
        "a photo of a {}.",
        "a photo of {} and nothing else.",
        "a photo of several {}.",
        "a crisp photo of the {}.",
        "a dim photo of a {}.",
        "an overexposed photo of a {}.",
        "a grainy old photo of the {}.",
        "a grey photo without colours of a {}.",
        "a tiny thumbnail of the {}.",
        "a phone snapshot of a {}.",
        "a studio shot of the {} before a plain backdrop.",
        "a {} that fills the whole frame.",
        "a {} far away in a landscape.",
        "a {} partly hidden behind something.",
        "the {}, seen from above.",
        "the {}, seen from behind.",
        "a {} indoors.",
        "a {} out in the open.",
        "a detail of the {}.",
        "an unusually small {}.",
        "an unusually big {}.",
        "a drawn {}.",
        "a painted {}.",
        "a pencil outline of a {}.",
        "a {} from a cartoon.",
        "an icon of a {}.",
        "an emoji of a {}.",
        "a computer-made picture of a {}.",
        "a toy in the shape of a {}.",
        "a printed sticker of the {}.",
    ),
}


class TextModel(Protocol):
    """What is asked of a model: `mm.encoders.CLIP` has it."""

    def tokenize(self, texts: Sequence[str]) -> Tensor: ...
    def encode_text(self, ids: Tensor) -> Tensor: ...
    def parameters(self) -> object: ...


@torch.no_grad()
def zeroshot_classifier(clip: TextModel, labels: Sequence[str], templates: Sequence[str] = TEMPLATES["plain"],
                        batch: int = 256) -> Tensor:
    """n labels -> (E, n) float32, columns of length 1: the mean over templates of normalised text embeddings.

    In every template `{}` stands for the label. At most `batch` texts (or one label's) are encoded at once.
    """
    check_prompts(labels, templates)
    device = next(iter(clip.parameters())).device
    step, columns = max(1, batch // len(templates)), []
    for start in range(0, len(labels), step):
        some = labels[start : start + step]
        texts = [template.replace("{}", label) for label in some for template in templates]
        features = F.normalize(clip.encode_text(clip.tokenize(texts).to(device)).float(), dim=-1)
        columns.append(F.normalize(features.unflatten(0, (len(some), len(templates))).mean(1), dim=-1))
    return torch.cat(columns).T


def check_prompts(labels: Sequence[str], templates: Sequence[str]) -> None:
    """Raises InputError for labels or templates from which no classifier can be made."""
    if isinstance(labels, str) or isinstance(templates, str):
        raise InputError("zero-shot: labels and templates are lists of strings, not one string")
    if not labels or not templates:
        raise InputError(f"zero-shot: at least one label and one template are needed, got {len(labels)} and "
                         f"{len(templates)}")
    for number, label in enumerate(labels, 1):
        if not label.strip():
            raise InputError(f"zero-shot: label {number} of {len(labels)} is blank")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"zero-shot: template {template!r} has no {{}} for the label")


def classify(image_features: Tensor, classifier: Tensor, logit_scale: Tensor | float) -> Tensor:
    """image_features: (B, E), classifier: (E, n) -> (B, n) probabilities; `logit_scale` is the logarithm, as CLIP's."""
    cosines = F.normalize(image_features.float(), dim=-1) @ classifier
    return (cosines * torch.as_tensor(logit_scale, dtype=torch.float32, device=cosines.device).exp()).softmax(-1)
