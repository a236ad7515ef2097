"""What every source is turned into before a single pixel is decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.errors import VitrailError

Item = Path | bytes | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Records:
    """The images of one split, still encoded, with their labels.

    `items[i]` is a file, the bytes of one, or pixels [S, S] or [S, S, C] as uint8. `names[i]` is what
    to call it in a message. `labels` are int64 indices into `class_names`.
    """

    items: Sequence[Item]
    names: Sequence[str]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]

    def take(self, indices: npt.NDArray[np.intp]) -> "Records":
        """The records at `indices`, in that order."""
        kept: list[int] = indices.tolist()
        return Records(
            [self.items[i] for i in kept], [self.names[i] for i in kept], self.labels[indices], self.class_names
        )

    def keep_classes(self, names: tuple[str, ...]) -> "Records":
        """The records of some of the classes, numbered anew in their old order."""
        old = np.array([i for i, name in enumerate(self.class_names) if name in names])
        kept = self.take(np.flatnonzero(np.isin(self.labels, old)))
        class_names = tuple(self.class_names[i] for i in old)
        return Records(kept.items, kept.names, np.searchsorted(old, kept.labels), class_names)


def check_splits(splits: dict[str, Records], source: str) -> None:
    """Raise VitrailError unless there is a train split with two classes that covers the other splits' classes."""
    if "train" not in splits or len(splits["train"].labels) == 0:
        raise VitrailError(f"{source} holds no training images; see `vitrail train --help` for the layouts")
    train = splits["train"]
    in_train = set(np.unique(train.labels).tolist())
    if len(in_train) < 2:
        only = train.class_names[next(iter(in_train))]
        raise VitrailError(f"{source} has one class only, '{only}'; a classifier needs at least two")
    for name, split in splits.items():
        missing = sorted(set(np.unique(split.labels).tolist()) - in_train)
        if missing:
            which = ", ".join(f"'{split.class_names[i]}'" for i in missing[:5])
            raise VitrailError(f"{source}: the {name} split has class {which}, of which train has no image")


def labels_of(values: Any) -> npt.NDArray[np.int64]:
    """Labels as the int64 array `Records` wants."""
    return np.asarray(values, dtype=np.int64)
