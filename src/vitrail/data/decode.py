"""From an encoded image to pixels, the same way for training, evaluation and prediction."""

import io
import os
import stat
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vitrail.config import Preprocessing
from vitrail.data.records import Item, Records
from vitrail.errors import Event, Listener, VitrailError

Pixels = npt.NDArray[np.uint8]

DEFAULT_IMAGE_SIZE = 32
LARGEST_OWN_SIZE = 64
# Arrays larger than this are kept in a temporary file and mapped into memory.
MAX_IN_MEMORY_BYTES = 4 * 2**30


# What is read, by content and not by name, and the most pixels of one image, checked before they are decoded.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 16_000_000
# No image of so few pixels takes more bytes; some readers take in a whole file before they look at it.
MAX_FILE_BYTES = 2**28

# What Pillow's readers raise on a file that is not as its format says, beside OSError.
MALFORMED = (ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error,
             Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)  # fmt: skip


class BadImageError(VitrailError):
    """A file that is no image, or a damaged one."""


def open_image(item: Item) -> Image.Image:
    """Decode fully, upright by its EXIF orientation, to mode L or RGB with 8 bits a channel.

    Of an animation the first frame is taken. Transparency is laid over white; 16-bit grey is scaled to 8.

    Raises:
        BadImageError: if it is none of `FORMATS`, has more pixels than allowed, is cut short or damaged.
    """
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    _check_file(item)
    try:
        with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item, formats=FORMATS) as file:
            _check_pixels(*file.size)
            file.load()
            return _to_8_bits(ImageOps.exif_transpose(file))
    except UnidentifiedImageError as error:
        raise BadImageError("not an image") from error
    except (OSError, *MALFORMED) as error:
        raise BadImageError(str(error) or type(error).__name__) from error


def _check_file(item: Path | bytes) -> None:
    """Raise BadImageError, before a byte is read, if a file is none (a pipe would be waited for), empty or absurd."""
    if isinstance(item, bytes):
        size = len(item)
    else:
        try:
            found = item.stat()
        except (OSError, ValueError) as error:
            raise BadImageError(getattr(error, "strerror", None) or str(error)) from error
        if not stat.S_ISREG(found.st_mode):
            raise BadImageError("not a file")
        size = found.st_size
    if not size:
        raise BadImageError("not an image; it is empty")
    if size > MAX_FILE_BYTES:
        raise BadImageError(
            f"{size / 1e6:.0f} MB are too many for an image; at most {MAX_FILE_BYTES / 1e6:.0f} are read"
        )


def _check_pixels(width: int, height: int) -> None:
    asked = os.environ.get("VITRAIL_MAX_PIXELS") or str(MAX_PIXELS)
    if not asked.isdecimal():
        raise VitrailError(f"VITRAIL_MAX_PIXELS is '{asked}'; give a whole number of pixels")
    limit = int(asked)
    if width * height > limit:
        raise BadImageError(
            f"{width}×{height} is {width * height / 1e6:.1f} million pixels, at most {limit / 1e6:g} are read; "
            "VITRAIL_MAX_PIXELS sets another limit"
        )


def open_picture(image: str | Path | Image.Image) -> Image.Image:
    """A picture a person named, or one already open. Raises VitrailError naming a file that cannot be read."""
    if isinstance(image, Image.Image):
        return image
    try:
        return open_image(Path(image))
    except BadImageError as error:
        raise VitrailError(f"cannot read the image {image}: {error}") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        scale = 255 / 65535 if image.mode != "F" else 255  # floats are taken as 0..1
        return Image.fromarray(np.clip(np.nan_to_num(values * scale), 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def to_pixels(image: Image.Image, image_size: int, num_channels: int) -> Pixels:
    """Bring an upright image to [C, S, S]: the short side to S with bicubic, then the middle square."""
    image = image.convert("RGB" if num_channels == 3 else "L")
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if num_channels == 3 else pixels[None]


def decode(
    records: Records, image_size: int, num_channels: int, skip_bad: bool, listener: Listener
) -> tuple[Tensor, Tensor, int]:
    """Decode a split into uint8 images [N, C, S, S] and int64 labels [N]; also, how many were left out.

    Raises:
        VitrailError: naming the unreadable images, unless `skip_bad` leaves them out.
    """
    total = len(records.items)
    pixels = _allocate((total, num_channels, image_size, image_size))
    bad: dict[int, str] = {}
    for i, item in enumerate(records.items):
        try:
            pixels[i] = to_pixels(open_image(item), image_size, num_channels)
        except BadImageError as error:
            bad[i] = str(error)
        if i % 500 == 499 or i == total - 1:
            listener(Event(task="decoding images", done=i + 1, total=total))
    if bad and not skip_bad:
        first = "; ".join(f"{records.names[i]} ({reason})" for i, reason in list(bad.items())[:3])
        raise VitrailError(
            f"{len(bad)} of {total} images cannot be read: {first}; "
            "mend or remove them, or leave them out with --input.skip-bad"
        )
    kept = np.setdiff1d(np.arange(total), list(bad))
    if not len(kept):
        raise VitrailError(f"none of the {total} images can be read: {records.names[0]} ({bad[0]})")
    images = torch.from_numpy(pixels if not bad else pixels[kept])
    return images, torch.from_numpy(records.labels[kept]), len(bad)


def _allocate(shape: tuple[int, ...]) -> Any:
    """An uint8 array in memory, or for a large one in an unlinked temporary file mapped into it."""
    if np.prod(shape, dtype=np.int64) <= MAX_IN_MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


def infer_format(records: Records, image_size: int | None) -> tuple[int, int]:
    """The side and the number of channels for a data set, from up to 1,000 of its images, evenly spread.

    The side is `image_size` if given, else the images' own when all share one square size of at most
    64, else 32. One channel if all are grey, else three.
    """
    sizes: set[tuple[int, int]] = set()
    modes: set[str] = set()
    for i in np.linspace(0, len(records.items) - 1, num=min(1000, len(records.items)), dtype=int):
        try:
            image = open_image(records.items[i])
        except BadImageError:
            continue  # `decode` reports it with all the others
        sizes.add(image.size)
        modes.add(image.mode)
    if image_size is None:
        width, height = next(iter(sizes), (0, 1))
        own = len(sizes) == 1 and width == height <= LARGEST_OWN_SIZE
        image_size = width if own else DEFAULT_IMAGE_SIZE
    return image_size, 1 if modes == {"L"} else 3


def measure_preprocessing(images: Tensor) -> Preprocessing:
    """The mean and standard deviation of each channel over uint8 training images [N, C, S, S], in 0..1."""
    _, c, s, _ = images.shape
    counts = torch.stack(
        [sum(torch.bincount(part[:, k].flatten(), minlength=256) for part in images.split(4096)) for k in range(c)]  # type: ignore[misc]
    ).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = counts @ levels / counts.sum(1)
    std = (counts @ levels**2 / counts.sum(1) - mean**2).clamp_min(0).sqrt()
    # A constant channel carries nothing; dividing by 1 keeps it so.
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return Preprocessing(image_size=s, num_channels=c, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
