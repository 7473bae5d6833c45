"""The softmax contrastive loss of CLIP (Radford et al., 2021), with soft targets for items of the same group."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor, group: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean over both directions, in float32.

    image, text: (B, E), of any length. logit_scale: (), the logarithm. group: (B,), rows of one group are each
    other's positives and share the target evenly. smoothing: the share of the target spread over the whole batch.
    """
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    logits = logit_scale.float().exp() * image @ text.T
    same = (group[:, None] == group).float()
    target = (1 - smoothing) * same / same.sum(dim=1, keepdim=True) + smoothing / len(group)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
