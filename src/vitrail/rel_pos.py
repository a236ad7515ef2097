"""Where a head looks before it has learned to: a bias by the offset between two patches."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The four sides, then the four corners.
NEIGHBOURS = [(-1, 0), (0, -1), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]


def first_looks(block: int, depth: int, num_heads: int) -> list[tuple[int, int]]:
    """Where the heads of a block, counted from 0, look first, as (dy, dx) in patches: the eight neighbours are dealt
    out in turn, on from block to block, and lie twice as far in the last third of the blocks. Both are ours."""
    reach = 2 if 3 * block >= 2 * depth else 1
    dealt = (NEIGHBOURS[(block * num_heads + head) % len(NEIGHBOURS)] for head in range(num_heads))
    return [(reach * dy, reach * dx) for dy, dx in dealt]


class RelPosBias(nn.Module):
    """A learned number per head for each offset between two patches, added to the attention logits.

    The class token, which has no place in the picture, gets 0 towards and from every token. Begun with
    `looks`, each head looks around the patch at its offset: its bias is minus the squared distance from
    there, in patches. So a block starts as something like a 3×3 convolution; training may undo it.

    Source: the bias of Shaw et al. 2018 (arXiv 1803.02155) as used in Swin (arXiv 2103.14030,
    equation 4); the start is ConViT's (arXiv 2103.10697, equation 6, with locality strength 1), without its gate.
    """

    index: Tensor

    def __init__(self, grid_size: int, num_heads: int, looks: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__()
        span = 2 * grid_size - 1
        table, offset = torch.zeros(num_heads, span, span), torch.arange(span) - (grid_size - 1)
        if looks:
            dy, dx = torch.tensor(looks).T[:, :, None, None]
            table -= (offset[:, None] - dy) ** 2 + (offset - dx) ** 2
        self.relative_position_bias_table = nn.Parameter(table.flatten(1))
        y, x = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
        y, x = y.flatten(), x.flatten()
        row, column = y[None] - y[:, None] + grid_size - 1, x[None] - x[:, None] + grid_size - 1
        index = (row * span + column).reshape((grid_size,) * 4)
        self.register_buffer("index", index, persistent=False)

    def forward(self, grid_size: int) -> Tensor:
        """The bias [H, T, T] in a grid no larger than its own: row = the patch that looks, column = that looked at."""
        index = self.index[:grid_size, :grid_size, :grid_size, :grid_size]
        bias = self.relative_position_bias_table.index_select(1, index.flatten())
        return F.pad(bias.unflatten(1, (grid_size**2, grid_size**2)), (1, 0, 1, 0))
