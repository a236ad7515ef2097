"""Sources, splits, the order of samples, decoding: everything between a folder and a batch."""

import hashlib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vitrail.data.cifar as cifar_room
import vitrail.data.decode as decode_room
from conftest import COLOURS, save_image
from vitrail.batch import normalize
from vitrail.config import InputConfig, RunConfig
from vitrail.data import (
    ImageSet,
    SampleStream,
    fingerprint,
    load_training_data,
    open_image,
    split_records,
    to_pixels,
)
from vitrail.data.order import cut_split, take_fraction
from vitrail.errors import VitrailError, ignore_events


def load(source: str | Path, **input_fields: object):
    return load_training_data(RunConfig(data=str(source), input=InputConfig(**input_fields)), ignore_events)


def encode(colour: tuple[int, int, int], size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, images: list[bytes], labels: list[int], split: str = "train") -> None:
    folder.mkdir(exist_ok=True)
    table = pa.table({"image": [{"bytes": b, "path": None} for b in images], "label": labels})
    features = {"label": {"names": list(COLOURS), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), folder / f"{split}-00000-of-00001.parquet")


# ── sources ──────────────────────────────────────────────────────────────────────────────────


def test_digits_are_real_and_split_into_three() -> None:
    splits = split_records("digits", InputConfig(), seed=0)
    sizes = {name: len(split.labels) for name, split in splits.items()}
    assert sum(sizes.values()) == 1797
    assert sizes["test"] == pytest.approx(0.2 * 1797, abs=5)
    assert sizes["val"] == pytest.approx(0.1 * 0.8 * 1797, abs=5)
    train, val, preprocessing = load("digits")
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.max() == 255
    assert train.class_names == tuple("0123456789")
    assert preprocessing.num_channels == 1
    assert len(val) == sizes["val"]


def test_an_image_folder_gives_names_splits_and_pixels(colour_folder: Path) -> None:
    train, val, preprocessing = load(colour_folder, val_fraction=0.25)
    assert train.class_names == ("blue", "green", "red")
    assert (len(train), len(val)) == (27, 9)
    assert preprocessing.image_size == 16
    brightest_channel = train.images.float().mean((2, 3)).argmax(1)
    assert torch.equal(brightest_channel, 2 - train.labels)  # blue is channel 2 and class 0


def test_a_folder_without_train_is_one_split_of_classes(colour_folder: Path) -> None:
    splits = split_records(str(colour_folder / "train"), InputConfig(), seed=0)
    assert {name: len(split.labels) for name, split in splits.items()} == {"train": 27, "test": 6, "val": 3}


def test_a_folders_own_val_is_used(colour_folder: Path) -> None:
    for name, colour in COLOURS.items():
        save_image(colour_folder / "val" / name / "only.png", colour)
    train, val, _ = load(colour_folder)
    assert (len(train), len(val)) == (36, 3)


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    images = [encode(colour) for colour in COLOURS.values()] * 4
    write_parquet(tmp_path / "hub", images, [0, 1, 2] * 4)
    write_parquet(tmp_path / "hub", images[:3], [0, 1, 2], "test")
    train, val, _ = load(tmp_path / "hub")
    assert train.class_names == tuple(COLOURS)
    assert (len(train), len(val)) == (9, 3)
    assert torch.equal(train.images.float().mean((2, 3)).argmax(1), 2 - train.labels)


def test_cifar10_uses_the_hub_copy_where_its_home_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both downloads go to a server of our own: the first is refused, the second serves two parquet files."""
    served = tmp_path / "served"
    write_parquet(served, [encode(c) for c in COLOURS.values()] * 4, [0, 1, 2] * 4)
    write_parquet(served, [encode(c) for c in COLOURS.values()], [0, 1, 2], "test")
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in served.iterdir()}
    (served / "tree").write_text(json.dumps([{"path": f"x/{n}", "lfs": {"oid": s}} for n, s in sums.items()]))

    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cifar_room, "HOME", (served / "cifar-10-python.tar.gz").as_uri())
    monkeypatch.setattr(cifar_room, "HUB", served.as_uri() + "/{kind}{verb}")
    with pytest.raises(
        VitrailError, match=r"tried cs\.toronto\.edu \(.*No such file.*\) and huggingface\.co"
    ) as offline:
        load("cifar10")
    assert "pass --data FOLDER" in str(offline.value)
    (served / "api").mkdir()
    (served / "tree").rename(served / "api" / "tree")
    (served / "resolve").mkdir()
    for name in sums:
        (served / name).rename(served / "resolve" / name)
    train, _, _ = load("cifar10")
    assert train.class_names == tuple(COLOURS)
    monkeypatch.setattr(cifar_room, "HUB", "file:///nowhere/{kind}{verb}")
    assert len(load("cifar10")[0]) == len(train)  # from the cache now


def test_a_damaged_download_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "api").mkdir()
    (tmp_path / "resolve").mkdir()
    (tmp_path / "api" / "tree").write_text(json.dumps([{"path": "test-0.parquet", "lfs": {"oid": "0" * 64}}]))
    (tmp_path / "resolve" / "test-0.parquet").write_bytes(b"other bytes")
    monkeypatch.setattr(cifar_room, "HUB", tmp_path.as_uri() + "/{kind}{verb}")
    with pytest.raises(ValueError, match=r"test-0\.parquet arrived damaged"):
        cifar_room._download_hub_copy(tmp_path / "cache", ignore_events)
    assert not list((tmp_path / "cache").iterdir())


# ── bad input ────────────────────────────────────────────────────────────────────────────────


def test_unknown_source_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(VitrailError, match="no data source 'nowhere'; give digits, cifar10, or the path"):
        load("nowhere")
    with pytest.raises(VitrailError, match="holds no images"):
        load(tmp_path)


def test_one_class_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "red" / "1.png", COLOURS["red"])
    with pytest.raises(VitrailError, match="one class only, 'red'"):
        load(tmp_path)


def test_a_class_of_test_that_train_lacks_is_named(colour_folder: Path) -> None:
    save_image(colour_folder / "test" / "violet" / "1.png", (90, 0, 200))
    with pytest.raises(VitrailError, match="the test split has class 'violet', of which train has no image"):
        load(colour_folder)


def test_bad_images_are_named_counted_and_left_out_on_request(colour_folder: Path) -> None:
    (colour_folder / "train" / "red" / "text.png").write_text("no image")
    whole = (colour_folder / "train" / "red" / "0.png").read_bytes()
    (colour_folder / "train" / "red" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VitrailError, match=r"cannot be read: .*(cut|text)\.png .*--input.skip-bad"):
        load(colour_folder)
    train, val, _ = load(colour_folder, skip_bad=True)
    assert train.num_skipped + val.num_skipped == 2
    assert len(train) + len(val) == 36


def test_parquet_without_class_names_or_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [0]}), tmp_path / "train-0.parquet")
    with pytest.raises(VitrailError, match=r"needs the columns img \(or image\) and label"):
        load(tmp_path)
    images = [{"bytes": encode((1, 2, 3)), "path": None}]
    pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "train-0.parquet")
    with pytest.raises(VitrailError, match="names no classes"):
        load(tmp_path)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(VitrailError, match="cannot read"):
        load(tmp_path)


# ── pixels ───────────────────────────────────────────────────────────────────────────────────


def roundtrip(image: Image.Image, tmp_path: Path, suffix: str, **options: object) -> Image.Image:
    path = tmp_path / f"image{suffix}"
    image.save(path, **options)
    return open_image(path)


def test_every_mode_becomes_eight_bit_grey_or_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 4), (200, 30, 30))
    assert roundtrip(red, tmp_path, ".png").getpixel((0, 0)) == (200, 30, 30)
    assert roundtrip(red.convert("P"), tmp_path, ".gif").convert("RGB").getpixel((0, 0))[0] > 180
    assert roundtrip(red.convert("CMYK"), tmp_path, ".tif").getpixel((0, 0)) == (200, 30, 30)
    assert roundtrip(red.convert("L"), tmp_path, ".png").mode == "L"
    assert roundtrip(Image.new("1", (4, 4), 1), tmp_path, ".png").getpixel((0, 0)) == 255
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert roundtrip(half, tmp_path, ".png").getpixel((0, 0)) == (127, 127, 127)  # over white
    deep = Image.fromarray(np.full((4, 4), 0x8080, np.uint16))
    assert roundtrip(deep, tmp_path, ".png").getpixel((0, 0)) == 128


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("L", (6, 3))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    turned = roundtrip(image, tmp_path, ".png", exif=exif)
    assert turned.size == (3, 6)
    assert turned.getpixel((2, 0)) == 255


def test_to_pixels_keeps_the_middle_square() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert to_pixels(Image.fromarray(wide), 10, 3).min() == 255
    assert to_pixels(Image.fromarray(wide), 5, 1).shape == (1, 5, 5)


def test_normalised_training_images_have_mean_zero_and_std_one(colour_folder: Path) -> None:
    train, _, preprocessing = load(colour_folder)
    values = normalize(train.images, preprocessing).double()
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)


def test_what_does_not_fit_in_memory_is_mapped(colour_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory, _, _ = load(colour_folder)
    monkeypatch.setattr(decode_room, "MAX_IN_MEMORY_BYTES", 1000)
    assert isinstance(decode_room._allocate((2000,)), np.memmap)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped, _, _ = load(colour_folder)
    assert torch.equal(mapped.images, in_memory.images)


# ── splits, order, batches ───────────────────────────────────────────────────────────────────


@given(
    counts=st.lists(st.integers(2, 60), min_size=2, max_size=6), fraction=st.floats(0.02, 0.9), seed=st.integers(0, 99)
)
def test_splits_never_overlap_and_are_stratified(counts: list[int], fraction: float, seed: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    kept, held = cut_split(labels, fraction, seed)
    assert set(kept).isdisjoint(held)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        in_held = int((labels[held] == label).sum())
        assert 1 <= in_held <= count - 1
        assert abs(in_held - fraction * count) <= 1
    again = cut_split(labels, fraction, seed)
    assert np.array_equal(again[1], held)


def test_test_is_the_same_for_every_seed_and_val_is_not() -> None:
    a, b = (split_records("digits", InputConfig(), seed) for seed in (0, 1))
    assert a["test"].names == b["test"].names
    assert a["val"].names != b["val"].names
    kept = split_records("digits", InputConfig(val_seed=0), 1)
    assert kept["val"].names == a["val"].names


@given(
    counts=st.lists(st.integers(1, 80), min_size=2, max_size=5),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_a_smaller_share_is_part_of_a_larger_one(counts: list[int], shares: tuple[float, float]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    small, large = (take_fraction(labels, share, seed=3) for share in sorted(shares))
    assert set(small) <= set(large)
    assert large.tolist() == sorted(set(large))
    for label, count in enumerate(counts):
        assert (labels[large] == label).sum() == int(max(shares) * count + 1e-9)


def test_shares_that_floats_do_not_hit_are_still_rounded_as_written() -> None:
    labels = np.repeat([0, 1], 100)
    for percent in range(1, 101):
        assert len(take_fraction(labels, percent / 100, 0)) == 2 * percent


def test_a_share_of_train_leaves_val_and_test_as_they_are() -> None:
    whole, part = (split_records("digits", InputConfig(train_fraction=share), 0) for share in (1.0, 0.25))
    for split in ("val", "test"):
        assert part[split].names == whole[split].names
    assert set(part["train"].names) < set(whole["train"].names)
    counts = [np.bincount(splits["train"].labels) for splits in (part, whole)]
    assert counts[0].tolist() == [count // 4 for count in counts[1]]
    other_seed = split_records("digits", InputConfig(train_fraction=0.25), 1)
    assert set(other_seed["train"].names) != set(part["train"].names)


def test_a_share_that_leaves_a_class_empty_is_refused(colour_folder: Path) -> None:
    for i in (2, 3, 4, 5):
        (colour_folder / "train" / "green" / f"{i}.png").unlink()
    message = r"train_fraction 0\.1 leaves class 'green' with its 7 training images without one; .*-fraction 0\.143 or"
    with pytest.raises(VitrailError, match=message):
        load(colour_folder, train_fraction=0.1)
    assert len(load(colour_folder, train_fraction=0.143)[0]) == 3


def test_some_of_the_classes_keep_the_sources_order(colour_folder: Path) -> None:
    train, val, _ = load(colour_folder, classes=("red", "blue"))
    whole, whole_val, _ = load(colour_folder)
    assert train.class_names == val.class_names == ("blue", "red")
    for part, of_all in ((train, whole), (val, whole_val)):
        chosen = of_all.labels != 1
        assert torch.equal(part.images, of_all.images[chosen])
        assert torch.equal(part.labels, of_all.labels[chosen] // 2)


def test_classes_that_are_not_there_are_refused(colour_folder: Path) -> None:
    with pytest.raises(VitrailError, match="has no class 'violet'; its classes are blue, green, red"):
        load(colour_folder, classes=("red", "violet"))
    for file in (colour_folder / "test").glob("[!g]*/*"):
        file.unlink()
    with pytest.raises(VitrailError, match="the test split has no image of red, blue"):
        load(colour_folder, classes=("red", "blue"))
    for classes in (("red",), ("red", "red")):
        with pytest.raises(VitrailError, match=f"classes are {', '.join(classes)}; give at least two, each once"):
            InputConfig(classes=classes)


@settings(deadline=None)
@given(count=st.integers(1, 50), seed=st.integers(0, 2**31 - 1), chunk=st.integers(1, 70))
def test_a_pass_holds_every_image_once_however_it_is_read(count: int, seed: int, chunk: int) -> None:
    labels = torch.zeros(count, dtype=torch.int64)
    whole = SampleStream(labels, seed, balanced=False).indices(0, 3 * count)
    for epoch in range(3):
        assert sorted(whole[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    reader = SampleStream(labels, seed, balanced=False)
    pieces = [reader.indices(start, chunk) for start in range(0, 3 * count, chunk)]
    assert torch.equal(torch.cat(pieces)[: 3 * count], whole)


def test_order_differs_by_pass_and_by_seed() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    stream = SampleStream(labels, 0, balanced=False)
    assert not torch.equal(stream.indices(0, 100), stream.indices(100, 100))
    assert not torch.equal(stream.indices(0, 100), SampleStream(labels, 1, balanced=False).indices(0, 100))


@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=5), start=st.integers(0, 500), laps=st.integers(1, 4))
def test_balanced_batches_hold_the_classes_in_equal_share(counts: list[int], start: int, laps: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    stream = SampleStream(labels, 0, balanced=True)
    drawn = labels[stream.indices(start, laps * len(counts))].bincount(minlength=len(counts))
    assert drawn.tolist() == [laps] * len(counts)
    one_pass = stream.indices(0, stream.epoch_images)
    assert set(one_pass.tolist()) == set(range(len(labels)))
    assert stream.epoch_images == len(counts) * max(counts)


def test_the_fingerprint_sees_one_pixel_one_label_and_one_name() -> None:
    def digest(pixel: int = 0, label: int = 0, name: str = "a") -> str:
        images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
        images[1, 0, 1, 1] = pixel
        return fingerprint(ImageSet(images, torch.tensor([0, label]), (name, "b"), 0))

    assert len({digest(), digest(pixel=1), digest(label=1), digest(name="c")}) == 4
    assert digest() == digest()
