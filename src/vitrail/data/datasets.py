"""The decoded splits, and the batches cut from them."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitrail.batch import Batch
from vitrail.config import InputConfig, Preprocessing, ResolvedConfig, RunConfig
from vitrail.data.decode import decode, infer_format, measure_preprocessing
from vitrail.data.order import TEST_FRACTION, cut_split, take_fraction
from vitrail.data.records import Records
from vitrail.data.sources import read_source
from vitrail.errors import Listener, VitrailError, ignore_events


@dataclass(frozen=True)
class ImageSet:
    """One decoded split: uint8 `images` [N, C, S, S], int64 `labels` [N] into `class_names`."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    num_skipped: int

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Batch:
        """The images at `indices`, as a batch of weight one."""
        return Batch(self.images[indices], self.labels[indices], torch.ones(len(indices)))


def split_records(
    source: str, config: InputConfig, seed: int, listener: Listener = ignore_events
) -> dict[str, Records]:
    """The `train`, `val` and `test` records of a source, cutting those it does not have from train.

    Where there is no `test`, the same fifth of every class is cut whatever the seed; `val` is then cut
    from what is left (`InputConfig.val_cut`). Both are stratified, and the same whatever share of the rest is
    trained on.

    Raises:
        VitrailError: if there is no such source or class, or a class would be left without an image to train on.
    """
    splits = read_source(source, listener)
    for name, fraction, split_seed in (("test", TEST_FRACTION, 0), ("val", *config.val_cut(seed))):
        if name not in splits:
            train = splits["train"]
            kept, held_out = cut_split(train.labels, fraction, split_seed)
            splits |= {"train": train.take(kept), name: train.take(held_out)}
            if len(held_out) == 0:
                raise VitrailError(f"{source} has too few images to hold any out for {name}; two of a class at least")
    if config.classes:
        splits = _keep_classes(splits, config.classes, source)
    if config.train_fraction < 1:
        splits["train"] = _take_fraction(splits["train"], config.train_fraction, seed)
    return splits


def _keep_classes(splits: dict[str, Records], names: tuple[str, ...], source: str) -> dict[str, Records]:
    """The splits with the classes `names` alone, each of which must have images to train on."""
    train = splits["train"]
    there = [name for i, name in enumerate(train.class_names) if i in train.labels]
    if unknown := [name for name in names if name not in there]:
        raise VitrailError(f"{source} has no class '{unknown[0]}'; its classes are {', '.join(there)}")
    kept = {split: records.keep_classes(names) for split, records in splits.items()}
    for split, records in kept.items():
        if len(records.labels) == 0:
            raise VitrailError(f"{source}: the {split} split has no image of {', '.join(names)}; name other classes")
    return kept


def _take_fraction(train: Records, fraction: float, seed: int) -> Records:
    """A share of every class, which must leave each with an image."""
    taken = train.take(take_fraction(train.labels, fraction, seed))
    for label, count in zip(*np.unique(train.labels, return_counts=True), strict=True):
        if label not in taken.labels:
            raise VitrailError(
                f"train_fraction {fraction} leaves class '{train.class_names[label]}' with its {count} training images "
                f"without one; give --input.train-fraction {math.ceil(1000 / count) / 1000} or more"
            )
    return taken


def load_training_data(config: RunConfig, listener: Listener) -> tuple[ImageSet, ImageSet, Preprocessing]:
    """Decode `train` and `val` of `config.data`, and measure the preprocessing on `train`. Never decodes `test`."""
    splits = split_records(config.data, config.input, config.seed, listener)
    size, channels = infer_format(splits["train"], config.input.image_size)
    skip_bad = config.input.skip_bad
    train, val = (_decode_split(splits[name], size, channels, skip_bad, listener) for name in ("train", "val"))
    return train, val, measure_preprocessing(train.images)


def load_split(config: ResolvedConfig, source: str, split: str, listener: Listener) -> ImageSet:
    """Decode one split of `source` for a trained model. Raises VitrailError if its classes are not the model's."""
    splits = split_records(source, config.input, config.seed, listener)
    if split not in splits:
        raise VitrailError(f"no split '{split}'; give one of {', '.join(splits)}")
    found = splits[split].class_names
    if found != config.classes:
        raise VitrailError(
            f"{source} has the classes {_first(found)}, the model was trained on {_first(config.classes)}; "
            "give the data it was trained for"
        )
    size, channels = config.preprocessing.image_size, config.preprocessing.num_channels
    return _decode_split(splits[split], size, channels, config.input.skip_bad, listener)


def _first(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" … ({len(names)})" if len(names) > 4 else "")


def _decode_split(records: Records, size: int, channels: int, skip_bad: bool, listener: Listener) -> ImageSet:
    images, labels, num_skipped = decode(records, size, channels, skip_bad, listener)
    return ImageSet(images, labels, records.class_names, num_skipped)


def fingerprint(*sets: ImageSet) -> str:
    """SHA-256 over the pixels, labels and class names of the sets: what a resumed run must find again."""
    digest = hashlib.sha256()
    for images in sets:
        digest.update(repr(images.class_names).encode())
        for tensor in (images.images, images.labels):
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
