"""Data that mean harm, or are merely broken: archives, pictures, tables, names. None gets through."""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import struct
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vitrail.data.cifar as cifar_room
from conftest import colour_config, make_config, save_image
from vitrail.cli import main
from vitrail.config import InputConfig
from vitrail.data import BadImageError, load_training_data, open_image, split_records, to_pixels
from vitrail.data.cifar import FOLDER, parse_archive, read_members, unpickle
from vitrail.data.decode import FORMATS
from vitrail.errors import VitrailError, ignore_events, printable
from vitrail.train import train


class Canary:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


# ── CIFAR-10's archive ───────────────────────────────────────────────────────────────────────


def batch(seed: int, count: int = 4) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)
    return {"data": pixels, "labels": [i % 2 for i in range(count)], "filenames": ["a"] * count}


def batches() -> dict[str, Any]:
    meta = {"batches.meta": {"label_names": ["cat", "dog"], "num_vis": 3072}}
    return meta | {f"data_batch_{i}": batch(i) for i in range(1, 6)} | {"test_batch": batch(6)}


def pack(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for entry in others:
            tar.addfile(entry, io.BytesIO(bytes(entry.size)) if entry.isreg() else None)
    return buffer.getvalue()


def pickled(values: dict[str, Any]) -> dict[str, bytes]:
    return {name: pickle.dumps(value, protocol=4) for name, value in values.items()}


def test_a_sound_archive_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels row by row and colour by colour, as CIFAR-10 stores them; other files are passed over."""
    content = pack(pickled(batches()) | {"readme.html": b"<p>"})
    splits = parse_archive(content)
    assert {split: len(records.labels) for split, records in splits.items()} == {"train": 20, "test": 4}
    assert splits["train"].class_names == ("cat", "dog")
    stored = batch(2)["data"][1].reshape(3, 32, 32)
    assert np.array_equal(splits["train"].items[5], np.moveaxis(stored, 0, 2))
    archive = tmp_path / "cache" / "cifar10" / "cifar-10-python.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(content)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(VitrailError, match=r"is not CIFAR-10's archive \(SHA-256 .*remove it"):
        load_training_data(make_config(data="cifar10"), ignore_events)
    monkeypatch.setattr(cifar_room, "HOME_SHA256", hashlib.sha256(content).hexdigest())
    train, val, _ = load_training_data(make_config(data="cifar10"), ignore_events)
    assert len(train) + len(val) == 20


def test_python_2_pickles_are_read() -> None:
    """The real batches were written by Python 2: byte strings where Python 3 has text, arrays by protocol 2."""
    raw = bytes(range(256)) * 12
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x01M\x00\x0ct"
        + dtype + b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
    )  # fmt: skip
    old = b"\x80\x02}(U\x04data" + array + b"U\x06labels]K\x01aU\x0bbatch_labelU\x01xu."
    pixels, labels = cifar_room._read_batch("data_batch_1", old, num_classes=2)
    assert labels == [1]
    assert pixels.transpose(0, 3, 1, 2).tobytes() == raw


def test_cifar_evil(tmp_path: Path) -> None:
    """Batches that ask for anything but arrays, or hold other values than CIFAR-10's, are refused; nothing is run."""
    canary = tmp_path / "canary"
    evil: list[Any] = [
        Canary(canary),
        {"data": Canary(canary), "labels": [0, 1]},
        batch(0) | {"labels": [0, 1, 0, 2]},
        batch(0) | {"labels": [0, 1, 0, True]},
        batch(0) | {"labels": [0, 1, 0]},
        batch(0) | {"labels": None},
        batch(0) | {"data": batch(0)["data"][:, :100]},
        batch(0) | {"data": batch(0)["data"].astype(np.int16)},
        batch(0) | {"data": [1, 2, 3]},
        {"labels": [0, 1]},
        [1, 2, 3],
        7,
    ]
    for value in evil:
        with pytest.raises(VitrailError, match=r"test_batch (is not what|holds other).*get another copy"):
            parse_archive(pack(pickled(batches() | {"test_batch": value})))
    for broken in (b"", b"\x80\x04.", b"cos\nsystem\n(S'touch /tmp/x'\ntR.", pickle.dumps(batch(0))[:-50]):
        with pytest.raises(VitrailError, match="is not what CIFAR-10 holds"):
            unpickle("data_batch_1", broken)
    for meta in ({"label_names": "cats"}, {"label_names": [1]}, {}):
        with pytest.raises(VitrailError, match=r"batches\.meta holds other label_names"):
            parse_archive(pack(pickled(batches() | {"batches.meta": meta})))
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # so that the test could have failed


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def test_tar_evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"test_batch": b"content"}
    outside = [
        entry("../escaped", size=3),
        entry(f"{FOLDER}/../../escaped", size=3),
        entry(str(tmp_path / "absolute"), size=3),
        entry(f"{FOLDER}/unknown", size=3),
        entry("link", tarfile.SYMTYPE, link="/etc/passwd"),
    ]
    assert read_members(pack(files, *outside), ["test_batch"]) == files
    assert list(tmp_path.iterdir()) == []
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    for kind in kinds:
        member = entry(f"{FOLDER}/test_batch", kind, link="/etc/passwd")
        with pytest.raises(VitrailError, match=r"test_batch' in the archive is no plain file of CIFAR-10's"):
            read_members(pack({}, member), ["test_batch"])
    with pytest.raises(VitrailError, match="no plain file of CIFAR-10's"):
        read_members(pack(files, entry(f"{FOLDER}/test_batch", size=7)), ["test_batch"])  # a second one
    with pytest.raises(VitrailError, match="lacks data_batch_1"):
        read_members(pack(files), ["test_batch", "data_batch_1"])
    for broken in (b"", b"no archive", pack(files)[:-20], gzip.compress(b"x" * 2000), gzip.compress(b"")):
        with pytest.raises(VitrailError, match="archive"):
            read_members(broken, ["test_batch"])


def test_tar_evil_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member past its cap, and an archive that unpacks to past its own, are refused before they fill the memory."""
    monkeypatch.setattr(cifar_room, "MAX_MEMBER_BYTES", 1000)
    with pytest.raises(VitrailError, match="no plain file of CIFAR-10's"):
        read_members(pack({}, entry(f"{FOLDER}/test_batch", size=1001)), ["test_batch"])
    monkeypatch.setattr(cifar_room, "MAX_UNPACKED_BYTES", 10_000_000)
    bomb = gzip.compress(bytes(300_000_000), 1)
    tracemalloc.start()
    with pytest.raises(VitrailError, match="unpacks to more than 10000000 bytes"):
        read_members(bomb, ["test_batch"])
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


# ── pictures ─────────────────────────────────────────────────────────────────────────────────


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(size: int = 24) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(noise)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def test_image_evil_bomb(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """Too many pixels are refused by what the header says, in no time and memory; the limit can be moved."""
    tracemalloc.start()
    for width, height in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (4001, 4000)):
        began = time.monotonic()
        with pytest.raises(BadImageError, match=r"pixels|too large|bomb"):
            open_image(png_that_claims(width, height))
        assert time.monotonic() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()
    with pytest.raises(BadImageError, match=r"4001×4000 is 16\.0 million pixels, at most 16 are read; VITRAIL"):
        open_image(png_that_claims(4001, 4000))
    content = encode(Image.new("L", (100, 80)), "PNG")
    assert open_image(content).size == (100, 80)
    monkeypatch.setenv("VITRAIL_MAX_PIXELS", "7999")
    with pytest.raises(BadImageError, match=r"at most 0\.007999 are read"):
        open_image(content)
    assert [str(w.message) for w in recwarn if "Decompression" not in str(w.category)] == []


def test_image_evil_many_frames() -> None:
    """Of an animation the first frame is read, and the others are not."""
    frames = [Image.new("RGB", (64, 64), (i % 256, 0, 0)) for i in range(500)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        content = encode(Image.new("RGB", (64, 64), "blue"), kind, save_all=True, append_images=frames)
        began = time.monotonic()
        red, _, blue = np.asarray(open_image(content).convert("RGB")).mean((0, 1))
        assert blue > 250
        assert red < 5
        assert time.monotonic() - began < 0.5


def test_image_evil_wrong_names_and_kinds(tmp_path: Path) -> None:
    """What a file is called does not matter; what it is does."""
    (tmp_path / "photo.jpg").write_bytes(encode(picture(), "PNG"))
    assert open_image(tmp_path / "photo.jpg").size == (24, 24)
    for kind in ("PPM", "ICO", "TGA", "PCX", "EPS", "JPEG2000"):
        with pytest.raises(BadImageError, match="not an image"):
            open_image(encode(picture(), kind))
    (tmp_path / "empty.png").write_bytes(b"")
    for empty in (tmp_path / "empty.png", b""):
        with pytest.raises(BadImageError, match="not an image; it is empty"):
            open_image(empty)
    with pytest.raises(BadImageError):
        open_image(tmp_path)


def test_image_evil_pipes_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no plain file is not waited for, and what no image is as large as is not read."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadImageError, match="not a file"):
        open_image(tmp_path / "pipe.png")
    with (tmp_path / "huge.webp").open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(BadImageError, match="17180 MB are too many for an image"):
        open_image(tmp_path / "huge.webp")
    monkeypatch.setenv("VITRAIL_MAX_PIXELS", "many")
    with pytest.raises(VitrailError, match="VITRAIL_MAX_PIXELS is 'many'; give a whole number"):
        open_image(encode(picture(), "PNG"))


@pytest.mark.parametrize("kind", FORMATS)
def test_image_evil_truncated_and_changed(kind: str) -> None:
    """Cut anywhere, or with any bytes changed: an image within the limits, or refused, and never another error."""
    sound, draw = encode(picture(), kind), random.Random(kind)
    assert to_pixels(open_image(sound), 24, 3).shape == (3, 24, 24)
    for cut in range(0, len(sound) // 2, 7):
        with pytest.raises(BadImageError):
            open_image(sound[:cut])
    refused = 0
    for _ in range(300):
        changed = bytearray(sound)
        for _ in range(draw.choice([1, 3, 30])):
            changed[draw.randrange(draw.choice([60, len(changed)]))] = draw.randrange(256)
        try:
            image = open_image(bytes(changed))
            assert image.width * image.height <= 16_000_000
            assert image.mode in ("L", "RGB")
        except BadImageError:
            refused += 1
    assert refused > 20


def test_image_evil_cmyk_16_bit_and_rotated() -> None:
    cmyk = open_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(np.asarray(cmyk, int) - (255, 0, 0)).max() < 12
    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    assert np.asarray(open_image(encode(deep, "PNG"))).tolist() == [[round(40_000 * 255 / 65_535)] * 8] * 8
    wide = Image.new("L", (16, 8))
    wide.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turned to the right: the first pixel goes to the top right
    upright = open_image(encode(wide, "PNG", exif=exif))
    assert upright.size == (8, 16)
    assert upright.getpixel((7, 0)) == 255


# ── tables ───────────────────────────────────────────────────────────────────────────────────


def write_table(folder: Path, image: Any, label: Any, metadata: str | None) -> None:
    table = pa.table({"image": image, "label": label})
    extra = {} if metadata is None else {"huggingface": metadata}
    pq.write_table(table.replace_schema_metadata(extra), folder / "train-0.parquet")


def test_parquet_evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of other types, metadata that name no classes, missing labels, sizes past the cap: all refused."""
    images = [{"bytes": encode(picture(i), "PNG"), "path": None} for i in range(8, 16)]

    def names(*values: object) -> str:
        return json.dumps({"info": {"features": {"label": {"names": values}}}})

    def load() -> None:
        load_training_data(make_config(data=str(tmp_path)), ignore_events)

    good = names("a", "b")
    cases: list[tuple[Any, Any, str | None, str]] = [
        ([b"x"] * 8, [0, 1] * 4, good, "expected a struct with binary bytes"),
        ([{"bytes": "x"}] * 8, [0, 1] * 4, good, "expected a struct with binary bytes"),
        ([{"path": "x"}] * 8, [0, 1] * 4, good, "expected a struct with binary bytes"),
        (images, ["a"] * 8, good, "expected whole numbers"),
        (images, [0.5] * 8, good, "expected whole numbers"),
        (images, [0, 1, None, 1] * 2, good, "rows without a label"),
        (images, [0, 1, 0, 2] * 2, good, "labels 0 to 2 but 2 class names"),
        (images, [0, 1, 0, -1] * 2, good, "labels -1 to 1 but 2 class names"),
        (images, [0, 1] * 4, None, "names no classes"),
        (images, [0, 1] * 4, "{no json", "names no classes"),
        (images, [0, 1] * 4, "[" * 100_000, "names no classes"),
        (images, [0, 1] * 4, "[1]", "names no classes"),
        (images, [0, 1] * 4, names("a", 1), "names no classes"),
        (images, [0, 1] * 4, names("a", "a"), "gives two classes one name"),
        ([None] * 8, [0, 1] * 4, good, "expected a struct"),
        ([{"bytes": None, "path": None}, *images[:7]], [0, 1] * 4, good, "images cannot be read"),
    ]
    for image, label, metadata, message in cases:
        write_table(tmp_path, image, label, metadata)
        with pytest.raises(VitrailError, match=message):
            load()
    write_table(tmp_path, images, [0, 1] * 4, good)
    load()
    monkeypatch.setattr("vitrail.data.sources.MAX_PARQUET_BYTES", 1000)
    with pytest.raises(VitrailError, match="unpacks to"):
        load()
    (tmp_path / "train-0.parquet").write_bytes((tmp_path / "train-0.parquet").read_bytes()[:-30])
    with pytest.raises(VitrailError, match="cannot read"):
        load()


# ── splits and names ─────────────────────────────────────────────────────────────────────────


def test_leakage(tmp_path: Path) -> None:
    """No picture stands in two splits, by the hash of its pixels, wherever the splits come from."""
    folder = tmp_path / "folder"
    for split, first in (("train", 0), ("test", 20)):
        for i in range(first, first + 20):
            save_image(folder / split / "ab"[i % 2] / f"{i}.png", (9, 9, 9), seed=i)
    rows = [{"bytes": encode(Image.new("RGB", (4, 4), (i, 0, 0)), "PNG"), "path": None} for i in range(40)]
    table = tmp_path / "table"
    table.mkdir()
    metadata = json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})
    write_table(table, rows, [i % 2 for i in range(40)], metadata)
    for source in ("digits", str(folder), str(table)):
        for seed in range(3):
            hashes = {
                split: [hashlib.sha256(open_image(item).tobytes()).digest() for item in records.items]
                for split, records in split_records(source, InputConfig(), seed).items()
            }
            assert set(hashes) == {"train", "val", "test"}
            for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
                assert set(hashes[one]).isdisjoint(hashes[other])


NASTY = "\x1b[31mred\x1b[0m [bold]$x_{\u202e"


def test_names_are_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escapes that colour or turn a terminal, rich's markup and TeX in a class's or file's name stay text."""
    assert printable("a\x1b[1m\u202e\x00\n한 글é") == r"a\x1b[1m\u202e\x00\n한 글é"
    root = tmp_path / "data"
    for name, colour in ((NASTY, (200, 0, 0)), ("blue", (0, 0, 200))):
        for i in range(12):
            save_image(root / name / f"{i}.png", colour, seed=i)
    run = train(colour_config(root), tmp_path / "run")
    evil = save_image(tmp_path / f"{NASTY}.png", (200, 0, 0))
    assert main(["evaluate", str(run.folder), "--quiet"]) == 0
    assert main(["predict", "--model", str(run.folder), str(evil)]) == 0
    assert main(["explain", str(run.folder), str(evil), "--out", str(tmp_path / "out.png")]) == 0
    (tmp_path / f"{NASTY}.txt").write_text("no image")
    assert main(["predict", "--model", str(run.folder), str(tmp_path / f"{NASTY}.txt")]) == 2
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "\x1b" not in text.replace(str(evil), "")
        assert "\u202e" not in text
        assert r"\x1b[31mred" in text.replace("\n", "")
    assert "[bold]$x_{" in shown.out.replace("\n", "")
