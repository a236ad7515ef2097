"""What makes tokens of pixels: the paper's patches through one linear layer, or a few convolutions for those who ask.

Shapes are written with B images, C channels, N patches, P pixels a patch's side, D wide.
"""

from torch import Tensor, nn

from vitrail.linear import Linear


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches: [B, C, S, S] to [B, N, C·P·P].

    Patches go row by row from the top left; within one, values go by channel, row, column, which is
    the order in which a strided convolution's weight is flattened.
    """
    b, c, s, _ = images.shape
    p = patch_size
    grid = images.reshape(b, c, s // p, p, s // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, (s // p) ** 2, c * p * p)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Put patches together again: the inverse of `patchify`, for square images."""
    b, n, values = patches.shape
    p = patch_size
    g, c = round(n**0.5), values // p**2
    grid = patches.reshape(b, g, g, c, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, c, g * p, g * p)


class PatchEmbed(nn.Module):
    """Each patch, flattened, through one linear layer: [B, C, S, S] to [B, N, D] (equation 1)."""

    def __init__(self, patch_size: int, num_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(num_channels * patch_size**2, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(patchify(images, self.patch_size))


class ConvStem(nn.Module):
    """Convolutions in the place of the patch projection: [B, C, S, S] to [B, N, D].

    3×3 ones of stride 2 with batch norm and ReLU, whose channels double up to D, until each patch is one place;
    then a 1×1 one.

    Source: Xiao et al. 2021 (arXiv 2106.14881, section 3). They take away one block to pay for it; we leave the depth
    as asked.
    """

    def __init__(self, patch_size: int, num_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        layers, num_in = list[nn.Module](), num_channels
        for halvings_left in reversed(range(patch_size.bit_length() - 1)):
            num_out = max(1, embed_dim >> halvings_left)
            conv = nn.Conv2d(num_in, num_out, 3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(num_out), nn.ReLU()]
            num_in = num_out
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(num_in, embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.convs(images)).flatten(2).mT
