"""The sources: `digits`, `cifar10`, a folder of images by class, a folder of Hugging Face parquet."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrail.data.cifar import find_cifar10, read_archive
from vitrail.data.decode import FORMATS
from vitrail.data.records import Records, check_splits, labels_of
from vitrail.errors import Listener, VitrailError

IMAGE_COLUMNS = ("img", "image")
# More than this is not read into memory.
MAX_PARQUET_BYTES = 16 * 2**30
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


def read_source(source: str, listener: Listener) -> dict[str, Records]:
    """The splits of a source by name: `train`, and `val` and `test` where it has them.

    Args:
        source: `digits`, `cifar10`, or a path to a folder of images or of parquet files.
        listener: told of a download.

    Raises:
        VitrailError: if there is no such source, or it cannot train a classifier.
    """
    if source == "digits":
        splits = _read_digits()
    elif source == "cifar10":
        found = find_cifar10(cache_dir() / "cifar10", listener)
        splits = _read_parquet(found) if found.is_dir() else read_archive(found)
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
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
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
        for file in files:
            _check_parquet(file, pq.ParquetFile(file))
        table = pa.concat_tables(pq.read_table(file) for file in files)
    except (pa.ArrowException, OSError) as error:
        raise VitrailError(f"cannot read {files[0].parent}/*.parquet: {error}") from error
    class_names = _parquet_class_names(files[0], table.schema.metadata or {})
    image_column = next(c for c in IMAGE_COLUMNS if c in table.column_names)
    items: list[bytes | None] = table.column(image_column).combine_chunks().field("bytes").to_pylist()
    if None in (numbers := table.column("label").to_pylist()):
        raise VitrailError(f"{files[0]} has rows without a label; every image needs one")
    labels = labels_of(numbers)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise VitrailError(f"{files[0]} has labels {labels.min()} to {labels.max()} but {len(class_names)} class names")
    names = [f"{files[0].parent}/{files[0].name.split('-')[0]} row {i}" for i in range(len(items))]
    return Records([item or b"" for item in items], names, labels, class_names)


def _check_parquet(file: Path, opened: Any) -> None:
    """Raise VitrailError, before any column is read, unless they are there, of their types, and fit in memory."""
    import pyarrow as pa

    kinds = {field.name: field.type for field in opened.schema_arrow}
    image_column = next((c for c in IMAGE_COLUMNS if c in kinds), None)
    if image_column is None or "label" not in kinds:
        raise VitrailError(f"{file} needs the columns img (or image) and label; it has {list(kinds)}")
    image = kinds[image_column]
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0 or not _is_binary(image.field("bytes").type):
        raise VitrailError(f"{file} has {image_column} as {image}; expected a struct with binary bytes")
    if not pa.types.is_integer(kinds["label"]):
        raise VitrailError(f"{file} has label as {kinds['label']}; expected whole numbers")
    groups = range(opened.metadata.num_row_groups)
    size = sum(opened.metadata.row_group(i).total_byte_size for i in groups)
    if size > MAX_PARQUET_BYTES:
        raise VitrailError(f"{file} unpacks to {size / 2**30:.0f} GiB; at most {MAX_PARQUET_BYTES // 2**30} are read")


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _parquet_class_names(file: Path, metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """The names in the `ClassLabel` of the hub's metadata. Raises VitrailError if they are not there."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise VitrailError(f"{file} names no classes; expected a ClassLabel in its huggingface metadata")
    if len(set(names)) < len(names):
        raise VitrailError(f"{file} gives two classes one name among {names[:5]}; names must differ")
    return tuple(names)
