"""What the model is given at once, and the one step from stored pixels to its input."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.config import Preprocessing


@dataclass(frozen=True)
class Batch:
    """Images with their labels.

    `images` [B, C, S, S]: uint8 as stored, or float as the model wants them. `labels`: int64 [B], or
    after mixing float [B, K] whose rows sum to one. `weight` float [B]: 0 marks padding.
    """

    images: Tensor
    labels: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> "Batch":
        return Batch(self.images[part], self.labels[part], self.weight[part])

    def split(self, count: int) -> list["Batch"]:
        """The batch in `count` parts of nearly equal size, in order; the last are empty if it has fewer images."""
        columns = (t.tensor_split(count) for t in (self.images, self.labels, self.weight))
        return [Batch(*part) for part in zip(*columns, strict=True)]


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixel values 0..255 (uint8, or float) [B, C, S, S] to the model's float input, mean 0 and std 1 by channel."""
    mean = torch.tensor(preprocessing.mean, device=images.device).view(-1, 1, 1) * 255
    std = torch.tensor(preprocessing.std, device=images.device).view(-1, 1, 1) * 255
    return (images - mean) / std
