"""Which images come when: pure functions of the seed and of a position in the stream of samples.

Training reads one endless stream: position p is image `p % n` of pass `p // n`. Nothing is dropped at
the end of a pass, every pass holds every image once, and to resume is to know p.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TEST_FRACTION = 0.2


def cut_split(
    labels: npt.NDArray[np.int64], fraction: float, seed: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices (kept, held out), each sorted: `fraction` of every class is held out, drawn by `seed`.

    A class of n images gives up round(fraction·n), at least one if it has two and never its last.
    """
    rng = np.random.default_rng(seed)
    held_out: list[npt.NDArray[np.intp]] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.append(rng.permutation(members)[:count])
    held = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held), held


def take_fraction(labels: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.intp]:
    """Sorted indices of a `fraction` of every class, rounded down, drawn by `seed`.

    Each class is put in an order by `seed` alone and its first images are taken: a smaller fraction is part of
    every larger one.
    """
    rng = np.random.default_rng((seed, 1))  # another stream than that of the cut
    shuffled = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    # 0.07 of 100 images are seven, though 0.07 · 100 is a little more and 0.29 · 100 a little less than it should be.
    return np.sort(np.concatenate([members[: int(fraction * len(members) + 1e-9)] for members in shuffled]))


class SampleStream:
    """The order of the training images.

    Args:
        labels: int64 [N], needed to balance.
        seed: with the number of the pass, fixes its order.
        balanced: go round the classes, one image of each in turn, so that any stretch of the stream
            holds all classes equally often give or take one; a pass is as long as the number of classes
            times the size of the largest, and rarer classes repeat.
    """

    def __init__(self, labels: Tensor, seed: int, balanced: bool) -> None:
        self._seed = seed
        self._num_images = len(labels)
        self._members = [torch.nonzero(labels == k).flatten() for k in labels.unique()] if balanced else []
        self.epoch_images = len(self._members) * max(map(len, self._members)) if balanced else len(labels)
        self._cached: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    def indices(self, start: int, count: int) -> Tensor:
        """The image at each of the positions `start` to `start + count`: int64 [count]."""
        pieces: list[Tensor] = []
        while count > 0:
            epoch, offset = divmod(start, self.epoch_images)
            piece = self._order(epoch)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.cat(pieces)

    def _order(self, epoch: int) -> Tensor:
        if self._cached[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._cached = (
                epoch,
                self._balanced_order(generator) if self._members else self._plain(generator),
            )
        return self._cached[1]

    def _plain(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self._num_images, generator=generator)

    def _balanced_order(self, generator: torch.Generator) -> Tensor:
        rounds = max(map(len, self._members))
        columns: list[Tensor] = []
        for members in self._members:
            laps = -(-rounds // len(members))
            shuffled = [members[torch.randperm(len(members), generator=generator)] for _ in range(laps)]
            columns.append(torch.cat(shuffled)[:rounds])
        return torch.stack(columns, dim=1).flatten()
