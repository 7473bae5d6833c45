"""What every encoder of pictures or sounds shares: its families and its preprocessing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mm.checkpoint import pretrained

from .families import FAMILIES
from .flex import Flex, FlexPreprocess
from .image import Preprocess, Source


class Pretrained(pretrained.Pretrained):
    """An encoder whose `preprocessing` makes its input."""

    families = FAMILIES

    def preprocess(self, image: Source | Sequence[Source]) -> Tensor:
        """A picture (PIL, array, path, bytes) -> (3, h, w); several -> (B, 3, h, w)."""
        if self.preprocessing is None:
            self.preprocessing = Preprocess(size=self.spec.image)
        return self.preprocessing.batch(image) if isinstance(image, list | tuple) else self.preprocessing(image)

    def collate(self, pictures: Sequence[Tensor]) -> Tensor | Flex:
        """Pictures (3, h, w), each as `preprocess` makes it -> one batch."""
        flex = isinstance(self.preprocessing, FlexPreprocess)
        return self.preprocessing.collate(pictures) if flex else torch.stack(list(pictures))
