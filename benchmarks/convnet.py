"""The yardstick: the `vitrail` command with a small ConvNet in the ViT's place, for the same minutes.

    python benchmarks/convnet.py train quick --data ../shared/cifar10 --optim.coarse-fraction 0 --out runs/convnet-10
    python benchmarks/convnet.py evaluate runs/convnet-10

Loop, data, augmentation and optimizers are vitrail's. The network is of airbench's kind (Jordan 2024, arXiv 2404.00498,
section 3): a first layer on patches of two pixels, then three groups of two 3×3 convolutions, each group pooled by
two, with batch norm and GELU after every convolution, and the maximum over the places that are left. It differs in that
the first layer is learned, not whitened, and in its widths, which make it as large as a ViT 128 wide and 6 deep.
"""

import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.cli import main
from vitrail.config import ModelConfig

WIDTHS = (64, 128, 192)


class ConvGroup(nn.Module):
    """[B, C, S, S] to [B, D, S/2, S/2]: convolution, maximum of every 2×2, convolution."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding="same", bias=False)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding="same", bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(num_out), nn.BatchNorm2d(num_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class ConvNet(nn.Module):
    """Images [B, C, S, S] to logits [B, K]. What lies in `blocks` is moved as a ViT's blocks are."""

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__()
        num_first = 2 * num_channels * 2**2
        self.embed = nn.Conv2d(num_channels, num_first, 2)
        ins = (num_first, *WIDTHS[:-1])
        self.blocks = nn.Sequential(*(ConvGroup(a, b) for a, b in zip(ins, WIDTHS, strict=True)))
        self.head = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(F.gelu(self.embed(images))).amax((2, 3)))


def build_convnet(config: ModelConfig, image_size: int, num_channels: int, num_classes: int) -> ConvNet:
    """In the place of `build_model`; all that the config says of a ViT has no meaning here."""
    return ConvNet(num_channels, num_classes)


@contextmanager
def in_place_of_the_vit() -> Generator[None]:
    """Let every room that builds a model build the ConvNet."""
    with ExitStack() as stack:
        for room in ("model", "learner", "run"):
            stack.enter_context(mock.patch(f"vitrail.{room}.build_model", build_convnet))
        yield


if __name__ == "__main__":
    with in_place_of_the_vit():
        sys.exit(main())
