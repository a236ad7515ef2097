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
MAX_PARQUET_BYTES, MAX_ROWS = 16 * 2**30, 20_000_000
ROWS_AT_ONCE = 64
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
    """The rows of all files. Equal images are held once: a table of a few bytes can repeat a large one without end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    held, items, labels, class_names = dict[bytes, bytes](), list[bytes](), list[int](), tuple[str, ...]()
    num_bytes = 0
    for file in files:
        try:
            opened = pq.ParquetFile(file)
            image_column = _check_parquet(file, opened)
            found = _parquet_class_names(file, opened.schema_arrow.metadata or {})
            if class_names not in ((), found):
                raise VitrailError(f"{file} names other classes than {files[0].name}; the files of a split must agree")
            class_names = found
            for rows in opened.iter_batches(ROWS_AT_ONCE, columns=[f"{image_column}.bytes", "label"]):
                for value in rows.column(image_column).field("bytes").to_pylist():
                    item = value or b""
                    num_bytes += 0 if item in held else len(item)
                    items.append(held.setdefault(item, item))
                _check_size(file, num_bytes, len(items))
                labels += _parquet_labels(file, rows.column("label"), len(class_names))
        except (pa.ArrowException, OSError) as error:
            raise VitrailError(f"cannot read {file}: {error}") from error
    names = [f"{files[0].parent}/{files[0].name.split('-')[0]} row {i}" for i in range(len(items))]
    return Records(items, names, labels_of(labels), class_names)


def _check_parquet(file: Path, opened: Any) -> str:
    """The name of the image column. Raises VitrailError, before any column is read, unless it and the label are there,
    of their types, and fit in memory by what the file says."""
    import pyarrow as pa

    schema = opened.schema_arrow
    image_column = next((name for name in IMAGE_COLUMNS if schema.names.count(name) == 1), None)
    if image_column is None or schema.names.count("label") != 1:
        raise VitrailError(f"{file} needs the columns img (or image) and label, each once; it has {schema.names}")
    image, label = schema.field(image_column).type, schema.field("label").type
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0 or not _is_binary(image.field("bytes").type):
        raise VitrailError(f"{file} has {image_column} as {image}; expected a struct with binary bytes")
    if not pa.types.is_integer(label):
        raise VitrailError(f"{file} has label as {label}; expected whole numbers")
    groups = range(opened.metadata.num_row_groups)
    _check_size(file, sum(opened.metadata.row_group(i).total_byte_size for i in groups), opened.metadata.num_rows)
    return image_column


def _check_size(file: Path, num_bytes: int, num_rows: int) -> None:
    if num_bytes > MAX_PARQUET_BYTES or num_rows > MAX_ROWS:
        raise VitrailError(
            f"{file} unpacks to {num_bytes / 2**30:.1f} GiB in {num_rows} rows; "
            f"at most {MAX_PARQUET_BYTES / 2**30:g} GiB in {MAX_ROWS} rows are read"
        )


def _parquet_labels(file: Path, column: Any, num_classes: int) -> list[int]:
    if column.null_count:
        raise VitrailError(f"{file} has rows without a label; every image needs one")
    labels: list[int] = column.to_pylist()
    if labels and not 0 <= min(labels) <= max(labels) < num_classes:
        raise VitrailError(f"{file} has labels {min(labels)} to {max(labels)} but {num_classes} class names")
    return labels


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
