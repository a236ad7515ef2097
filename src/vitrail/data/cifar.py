"""CIFAR-10, wherever it is to be had: its archive, from the cache or its home, else the copy on the Hugging Face hub.

What was downloaded is untrusted. Its hash is compared before anything in it is opened; the archive is then unpacked in
memory, by a list of the names it may hold; and its batches, which are pickles, are read by an unpickler that knows
arrays and nothing else. The hash alone would do. The rest is for the day it does not.
"""

import gzip
import hashlib
import http.client
import io
import json
import pickle
import tarfile
import urllib.request
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from vitrail.data.records import Records, labels_of
from vitrail.errors import Event, Listener, VitrailError

Pixels = npt.NDArray[np.uint8]

HOME = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
HOME_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
HUB = "https://huggingface.co/{kind}datasets/uoft-cs/cifar10/{verb}/main/plain_text"
# The archive has 170,498,071 bytes and 186 MB unpacked, each of its batches 31 MB; the hub's larger file has 120 MB.
MAX_DOWNLOAD_BYTES, MAX_UNPACKED_BYTES, MAX_MEMBER_BYTES = 180_000_000, 200_000_000, 32_000_000
CHUNK_BYTES = 2**20
FOLDER = "cifar-10-batches-py"
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
NAMES = "batches.meta"


def find_cifar10(folder: Path, listener: Listener) -> Path:
    """The hub's parquet folder or the archive in the cache `folder`, downloaded if neither is there.

    Raises:
        VitrailError: if neither home nor hub gives it.
    """
    hub, archive = folder / "hub", folder / Path(HOME).name
    if any(hub.glob("test-*.parquet")):
        return hub
    if archive.exists():
        return archive
    try:
        download(HOME, HOME_SHA256, archive, listener)
        return archive
    except (OSError, ValueError, http.client.HTTPException) as first:
        try:
            _download_hub_copy(hub, listener)
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as second:
            raise VitrailError(
                f"cifar10 is not in {folder} and cannot be downloaded: tried cs.toronto.edu ({first}) and "
                f"huggingface.co ({second}); pass --data FOLDER with the images or parquet files instead"
            ) from second
        return hub


def _download_hub_copy(folder: Path, listener: Listener) -> None:
    """Fetch the two parquet files, each checked against the SHA-256 that the hub lists for it."""
    with urllib.request.urlopen(HUB.format(kind="api/", verb="tree"), timeout=30) as response:
        listing = json.loads(response.read(CHUNK_BYTES))
    sums = {Path(entry["path"]).name: str(entry["lfs"]["oid"]) for entry in listing if "lfs" in entry}
    # The test file comes last: its presence means that the copy is whole.
    for name, sha256 in sorted(sums.items(), reverse=True):
        download(f"{HUB.format(kind='', verb='resolve')}/{name}", sha256, folder / name, listener)


def download(url: str, sha256: str, to: Path, listener: Listener) -> None:
    """Fetch `url` to the file `to`, which is there only once its hash is right.

    Raises:
        OSError: if it cannot be fetched or written.
        ValueError: if it is too large or its hash is another.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    partial, digest, size = to.with_name(f".{to.name}.partial"), hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=60) as response, partial.open("wb") as file:
            total = int(response.headers.get("Content-Length") or MAX_DOWNLOAD_BYTES)
            while chunk := response.read(CHUNK_BYTES):
                size += len(chunk)
                if size > MAX_DOWNLOAD_BYTES:
                    raise ValueError(f"{to.name} is larger than {MAX_DOWNLOAD_BYTES} bytes")
                digest.update(chunk)
                file.write(chunk)
                listener(Event(task=f"downloading {to.name}", done=size, total=max(size, total)))
        if digest.hexdigest() != sha256:
            raise ValueError(f"{to.name} arrived damaged: SHA-256 {digest.hexdigest()[:12]}…, expected {sha256[:12]}…")
        partial.rename(to)
    finally:
        partial.unlink(missing_ok=True)


def read_archive(path: Path) -> dict[str, Records]:
    """The splits of cifar-10-python.tar.gz. Raises VitrailError if the file is any other."""
    if path.stat().st_size > MAX_DOWNLOAD_BYTES:
        raise VitrailError(f"{path} is larger than CIFAR-10's archive ever was; remove it")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != HOME_SHA256:
        raise VitrailError(
            f"{path} is not CIFAR-10's archive (SHA-256 {found[:12]}…, expected {HOME_SHA256[:12]}…); "
            "remove it, and it is downloaded again"
        )
    return parse_archive(content)


def parse_archive(content: bytes) -> dict[str, Records]:
    """The splits in a gzipped tar laid out as CIFAR-10's. Raises VitrailError at anything that one does not hold."""
    members = read_members(content, [NAMES, *BATCHES["train"], *BATCHES["test"]])
    class_names = _read_class_names(members[NAMES])
    splits: dict[str, Records] = {}
    for split, batches in BATCHES.items():
        parts = [_read_batch(name, members[name], len(class_names)) for name in batches]
        images = np.concatenate([pixels for pixels, _ in parts])
        names = [f"cifar10 {split}[{i}]" for i in range(len(images))]
        labels = [label for _, part in parts for label in part]
        splits[split] = Records(list(images), names, labels_of(labels), class_names)
    return splits


def read_members(content: bytes, names: list[str]) -> dict[str, bytes]:
    """The files `names` of the folder `FOLDER` in a gzipped tar; others are not looked into, nothing touches the disk.

    Raises:
        VitrailError: if one is missing, is there twice, is no plain file or too large, or the archive is too large.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
            unpacked = packed.read(MAX_UNPACKED_BYTES + 1)
        if len(unpacked) > MAX_UNPACKED_BYTES:
            raise VitrailError(f"the archive unpacks to more than {MAX_UNPACKED_BYTES} bytes; it is not CIFAR-10's")
        found: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
            for member in tar:
                name = member.name.removeprefix(f"{FOLDER}/")
                if member.name != f"{FOLDER}/{name}" or name not in names:
                    continue
                file = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if file is None or name in found or member.size > MAX_MEMBER_BYTES:
                    raise VitrailError(
                        f"{member.name!r} in the archive is no plain file of CIFAR-10's; get another copy"
                    )
                found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise VitrailError(f"the archive cannot be read ({error}); get another copy") from error
    if missing := sorted(set(names) - set(found)):
        raise VitrailError(f"the archive lacks {', '.join(missing)}; get another copy")
    return found


class _StandIn:
    """In the place of an array or its dtype: takes what the pickle would have built one from, and builds nothing."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _BatchUnpickler(pickle.Unpickler):
    """Knows what CIFAR-10's pickles of 2009 hold beside plain values: the three names that make an array."""

    def find_class(self, module: str, name: str) -> type[_StandIn]:
        known = {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _StandIn


def unpickle(name: str, content: bytes) -> dict[str, Any]:
    """The dictionary in a pickle of plain values and arrays. Raises VitrailError if there is anything else in it."""
    try:
        values = _BatchUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:
        # A pickle can be broken in any way; none of them is our bug.
        raise VitrailError(f"{name} is not what CIFAR-10 holds ({error}); get another copy") from error
    if not isinstance(values, dict):
        raise _other(name, "its dictionary")
    return cast(dict[str, Any], values)


def _read_class_names(content: bytes) -> tuple[str, ...]:
    names = cast(list[str], unpickle(NAMES, content).get("label_names"))
    if type(names) is not list or not all(type(name) is str for name in names):
        raise _other(NAMES, "label_names")
    return tuple(names)


def _read_batch(name: str, content: bytes, num_classes: int) -> tuple[Pixels, list[int]]:
    """Pixels [N, 32, 32, 3] and labels of one batch."""
    batch = unpickle(name, content)
    labels: Any = batch.get("labels")
    if not isinstance(labels, list) or not all(
        type(v) is int and 0 <= v < num_classes for v in cast(list[Any], labels)
    ):
        raise _other(name, "labels")
    count = len(cast(list[int], labels))
    match batch.get("data"):
        # An array's state: version, shape, dtype, whether columns come first, bytes.
        case _StandIn(state=(_, (rows, 3072), _, False, str() | bytes() as pixels)) if rows == count:
            # What is no byte is left out, and missed in the length.
            flat = pixels.encode("latin1", "ignore") if isinstance(pixels, str) else pixels
        case _:
            raise _other(name, "data")
    if len(flat) != 3072 * count:
        raise _other(name, "data")
    return np.frombuffer(flat, np.uint8).reshape(count, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _other(name: str, what: str) -> VitrailError:
    return VitrailError(f"{name} holds other {what} than CIFAR-10's; get another copy")
