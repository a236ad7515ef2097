"""The sources: `digits`, `cifar10`, a folder of images by class, a folder of Hugging Face parquet."""

import hashlib
import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrail.data.records import Records, check_splits, labels_of
from vitrail.errors import VitrailError

CIFAR10_HUB = "https://huggingface.co/{kind}datasets/uoft-cs/cifar10/{verb}/main/plain_text"
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


def read_source(source: str) -> dict[str, Records]:
    """The splits of a source by name: `train`, and `val` and `test` where it has them.

    Args:
        source: `digits`, `cifar10`, or a path to a folder of images or of parquet files.

    Raises:
        VitrailError: if there is no such source, or it cannot train a classifier.
    """
    if source == "digits":
        splits = _read_digits()
    elif source == "cifar10":
        splits = _read_cifar10()
    elif not Path(source).is_dir():
        raise VitrailError(f"no data source '{source}'; give digits, cifar10, or the path of an existing folder")
    elif any(Path(source).glob("*.parquet")):
        splits = _read_parquet(Path(source))
    else:
        splits = _read_folder(Path(source))
    check_splits(splits, source)
    return splits


def cache_dir() -> Path:
    """Where downloads are kept: `VITRAIL_CACHE`, else `vitrail` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VITRAIL_CACHE") or Path(base) / "vitrail")


def _read_digits() -> dict[str, Records]:
    """Scikit-learn's 1,797 handwritten digits, 8×8 grey: real, small, and part of the package."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # they come as 0..16
    names = [f"digits[{i}]" for i in range(len(pixels))]
    return {"train": Records(list(pixels), names, labels_of(bunch.target), tuple(map(str, bunch.target_names)))}


def _read_folder(folder: Path) -> dict[str, Records]:
    """`folder/train/<class>/*`, with `val` and `test` beside it if there are any; or `folder/<class>/*`."""
    split_dirs = {SPLIT_NAMES[d.name]: d for d in sorted(folder.iterdir()) if d.is_dir() and d.name in SPLIT_NAMES}
    if "train" not in split_dirs:
        split_dirs = {"train": folder}
    suffixes = set(Image.registered_extensions())
    files = {
        split: {d.name: _image_files(d, suffixes) for d in sorted(root.iterdir()) if _is_visible_dir(d)}
        for split, root in split_dirs.items()
    }
    class_names = tuple(sorted({name for by_class in files.values() for name, found in by_class.items() if found}))
    if not class_names:
        raise VitrailError(f"{folder} holds no images; expected {folder}/train/<class>/*.png or {folder}/<class>/*.png")
    index = {name: i for i, name in enumerate(class_names)}
    splits: dict[str, Records] = {}
    for split, by_class in files.items():
        paths = [path for found in by_class.values() for path in found]
        labels = [index[name] for name, found in by_class.items() for _ in found]
        splits[split] = Records(paths, [str(p) for p in paths], labels_of(labels), class_names)
    return splits


def _is_visible_dir(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _image_files(folder: Path, suffixes: set[str]) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith("."))


def _read_parquet(folder: Path) -> dict[str, Records]:
    """Hugging Face's layout: `<split>-*.parquet`, an image column, and `label` with its names in the metadata."""
    splits: dict[str, Records] = {}
    for name, split in SPLIT_NAMES.items():
        files = sorted(folder.glob(f"{name}-*.parquet")) + sorted(folder.glob(f"{name}.parquet"))
        if files:
            splits[split] = _read_parquet_split(files)
    return splits


def _read_parquet_split(files: list[Path]) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.concat_tables(pq.read_table(file) for file in files)
    except (pa.ArrowInvalid, OSError) as error:
        raise VitrailError(f"cannot read {files[0].parent}/*.parquet: {error}") from error
    image_column = next((c for c in ("img", "image") if c in table.column_names), None)
    if image_column is None or "label" not in table.column_names:
        raise VitrailError(f"{files[0]} needs the columns img (or image) and label; it has {table.column_names}")
    metadata: dict[bytes, bytes] = table.schema.metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    class_names = features.get("label", {}).get("names")
    if not class_names:
        raise VitrailError(f"{files[0]} names no classes; expected a ClassLabel in its huggingface metadata")
    items: list[bytes] = table.column(image_column).combine_chunks().field("bytes").to_pylist()
    labels = labels_of(table.column("label"))
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise VitrailError(f"{files[0]} has labels {labels.min()} to {labels.max()} but {len(class_names)} class names")
    names = [f"{files[0].parent}/{files[0].name.split('-')[0]} row {i}" for i in range(len(items))]
    return Records([item or b"" for item in items], names, labels, tuple(class_names))


def _read_cifar10() -> dict[str, Records]:
    """CIFAR-10 from the cache, else from its home, else the parquet copy on the Hugging Face hub."""
    folder = cache_dir() / "cifar10"
    parquet = folder / "hub"
    if any(parquet.glob("test-*.parquet")):
        return _read_parquet(parquet)
    from torchvision.datasets import CIFAR10

    try:
        sets = {
            "train": CIFAR10(str(folder), train=True, download=True),
            "test": CIFAR10(str(folder), False, None, None, True),
        }
    except (OSError, RuntimeError) as first:  # torchvision raises RuntimeError where the MD5 differs
        try:
            _download_hub_copy(parquet)
        except (OSError, ValueError) as second:
            raise VitrailError(
                f"cifar10 is not in {folder} and cannot be downloaded: tried cs.toronto.edu ({first}) and "
                f"huggingface.co ({second}); pass --data FOLDER with the images or parquet files instead"
            ) from second
        return _read_parquet(parquet)
    return {
        split: Records(
            list(data.data),
            [f"cifar10 {split}[{i}]" for i in range(len(data.data))],
            labels_of(data.targets),
            tuple(data.classes),
        )
        for split, data in sets.items()
    }


def _download_hub_copy(folder: Path) -> None:
    """Fetch the two parquet files, each checked against the SHA-256 that the hub lists for it."""
    with urllib.request.urlopen(CIFAR10_HUB.format(kind="api/", verb="tree"), timeout=30) as response:
        listing = {Path(entry["path"]).name: entry["lfs"]["oid"] for entry in json.load(response) if "lfs" in entry}
    folder.mkdir(parents=True, exist_ok=True)
    # The test file comes last: its presence means that the copy is whole.
    for name, sha256 in sorted(listing.items(), reverse=True):
        url = f"{CIFAR10_HUB.format(kind='', verb='resolve')}/{name}"
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{name} arrived damaged")
        partial = folder / f"{name}.part"
        partial.write_bytes(content)
        partial.rename(folder / name)
