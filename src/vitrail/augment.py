"""What is done to training images: on whole batches, with a draw of its own for every image.

All draws come from a hash of (seed, position in the stream of samples), so an image is augmented the
same way whatever the batch size, and nothing depends on the state of a generator. Only mixup and
cutmix, which pair the images of a batch, are drawn once a batch.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.batch import Batch, normalize
from vitrail.config import AugmentConfig, Preprocessing

GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number


def uniforms(seed: int, positions: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1), float [B, count]: a pure function of the seed and each of the int64 positions [B].

    Each position starts a SplitMix64 generator of its own (Steele et al. 2014, figure 12).
    """
    start = _mix(positions + _mix(torch.tensor([seed * GOLDEN_GAMMA % 2**63])))
    steps = torch.arange(1, count + 1) * GOLDEN_GAMMA
    bits = _mix(start[:, None] + steps) >> 40 & 0xFFFFFF
    return bits.float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function; int64 products wrap as its unsigned ones do."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """The logical right shift that int64 lacks."""
    return x >> bits & (1 << 64 - bits) - 1


class Augment:
    """Training batches, uint8, to model input: crop, flip, policy, normalise, erase, mix.

    Args:
        config: what to do.
        preprocessing: the normalisation to end with.
        num_classes: for the soft labels of mixup and cutmix.
        seed: of the run.
        mix_end: position in the stream of samples from which nothing is mixed any more.
    """

    def __init__(
        self,
        config: AugmentConfig,
        preprocessing: Preprocessing,
        num_classes: int,
        seed: int,
        mix_end: float = math.inf,
    ) -> None:
        self._config = config
        self._preprocessing = preprocessing
        self._seed = seed
        self._mix_end = mix_end
        self._mix = _build_mix(config, num_classes)

    @property
    def mixes(self) -> bool:
        """Whether each image is mixed with the one before it in the batch, the first with the last."""
        return self._mix is not None

    def __call__(self, batch: Batch, start: int, offsets: Tensor | None = None) -> Batch:
        """Augment a batch that begins at position `start` of the stream, or its images at `offsets`, int64 [B]."""
        config = self._config
        num_ops = {"none": 0, "trivialaugment": 1, "randaugment": config.num_ops}[config.policy]
        positions = start + (torch.arange(len(batch)) if offsets is None else offsets)
        draws = uniforms(self._seed, positions, 8 + 3 * num_ops)
        images = crop_and_flip(batch.images, draws[:, :3], config.crop_padding, config.flip)
        if num_ops:
            images = images.float()
        for i in range(num_ops):
            images = _apply_random_op(images, draws[:, 8 + 3 * i : 11 + 3 * i], config)
        images = normalize(images, self._preprocessing)
        if config.erasing:
            images = erase(images, draws[:, 3:8], config.erasing)
        labels = batch.labels
        if self._mix is not None and start < self._mix_end:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed * 1_000_003 + start)
                images, labels = self._mix(images, labels)
        return Batch(images, labels, batch.weight)


def _build_mix(config: AugmentConfig, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    if not (config.mixup or config.cutmix):
        return None
    from torchvision.transforms import v2

    mixes = [v2.MixUp(alpha=config.mixup, num_classes=num_classes)] if config.mixup else []
    mixes += [v2.CutMix(alpha=config.cutmix, num_classes=num_classes)] if config.cutmix else []
    return v2.RandomChoice(mixes)


def crop_and_flip(images: Tensor, draws: Tensor, padding: int, flip: bool) -> Tensor:
    """Shift each image by up to `padding` pixels, its edges mirrored, and mirror half of them.

    `images` [B, C, S, S] of any dtype; `draws` [B, 3]. One gather does both.
    """
    size = images.shape[-1]
    rows = _shifted(draws[:, 0], size, padding)
    columns = _shifted(draws[:, 1], size, padding)
    if flip:
        columns = torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
    index = (rows[:, :, None] * size + columns[:, None, :]).flatten(1)
    flat = images.flatten(2)
    return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).view_as(images)


def _shifted(draw: Tensor, size: int, padding: int) -> Tensor:
    """Source coordinates [B, S] along one side for a shift of -padding..padding, reflected at the edges."""
    padding = min(padding, size - 1)
    offset = (draw * (2 * padding + 1)).long() - padding
    wanted = (offset[:, None] + torch.arange(size)).abs()
    return (size - 1) - ((size - 1) - wanted).abs()


def erase(images: Tensor, draws: Tensor, chance: float) -> Tensor:
    """Random erasing (arXiv 1708.04896): blank a rectangle of 2% to 33% of the area, aspect 0.3 to 3.3.

    `images` [B, C, S, S] normalised, so that 0 is the mean colour; `draws` [B, 5].
    """
    size = images.shape[-1]
    area = (0.02 + 0.31 * draws[:, 1]) * size**2
    aspect = torch.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * draws[:, 2])
    height, width = ((area * r).sqrt().clamp(max=size).round() for r in (aspect, 1 / aspect))
    top, left = draws[:, 3] * (size - height + 1), draws[:, 4] * (size - width + 1)
    at = torch.arange(size)
    rows = (at >= top.floor()[:, None]) & (at < (top.floor() + height)[:, None])
    columns = (at >= left.floor()[:, None]) & (at < (left.floor() + width)[:, None])
    hit = (draws[:, 0] < chance)[:, None, None] & rows[:, :, None] & columns[:, None, :]
    return images.masked_fill(hit[:, None], 0)


# The operations: images float [B, C, S, S] in 0..255, strength [B] -> the same.


def _warp(images: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    """Sample each image at an affine map of its grid, black outside.

    `entries` replace those of the identity matrix [2, 3]; the grid's sides run from -1 to 1.
    """
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)
    for (row, column), values in entries.items():
        theta[:, row, column] = values
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def _shear_x(images: Tensor, s: Tensor) -> Tensor:
    return _warp(images, {(0, 1): s})


def _shear_y(images: Tensor, s: Tensor) -> Tensor:
    return _warp(images, {(1, 0): s})


def _translate_x(images: Tensor, s: Tensor) -> Tensor:
    return _warp(images, {(0, 2): 2 * s})


def _translate_y(images: Tensor, s: Tensor) -> Tensor:
    return _warp(images, {(1, 2): 2 * s})


def _rotate(images: Tensor, s: Tensor) -> Tensor:
    return _warp(images, {(0, 0): s.cos(), (0, 1): -s.sin(), (1, 0): s.sin(), (1, 1): s.cos()})


def _blend(images: Tensor, base: Tensor, s: Tensor) -> Tensor:
    """Away from `base` for s > 0, towards it for s < 0; s = -1 is `base` itself."""
    return (base + (images - base) * (1 + s).view(-1, 1, 1, 1)).clamp(0, 255)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images
    return (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _brightness(images: Tensor, s: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images), s)


def _color(images: Tensor, s: Tensor) -> Tensor:
    return _blend(images, _grey(images), s)


def _contrast(images: Tensor, s: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), s)


def _sharpness(images: Tensor, s: Tensor) -> Tensor:
    mean = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return _blend(images, (9 * mean + 4 * images) / 13, s)


def _posterize(images: Tensor, s: Tensor) -> Tensor:
    level = 2 ** s.round().view(-1, 1, 1, 1)
    return (images / level).floor() * level


def _solarize(images: Tensor, s: Tensor) -> Tensor:
    return torch.where(images > 255 * (1 - s.view(-1, 1, 1, 1)), 255 - images, images)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) * 255 / (high - low).clamp_min(1), images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    levels = images.round().clamp(0, 255).long().flatten(2)
    histogram = torch.zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones(levels.shape))
    rank = histogram.cumsum(2)
    lowest = rank.gather(2, levels.amin(2, keepdim=True))
    table = (rank - lowest) * 255 / (levels.shape[2] - lowest).clamp_min(1)
    return table.gather(2, levels).view_as(images)


# Name: (operation, strongest in TrivialAugment, strongest in RandAugment, whether the sign is drawn).
# Strengths are torchvision's; translations are shares of the side, rotations radians.
OPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float, bool]] = {
    "identity": (lambda images, _: images, 0, 0, False),
    "shear_x": (_shear_x, 0.99, 0.3, True),
    "shear_y": (_shear_y, 0.99, 0.3, True),
    "translate_x": (_translate_x, 1.0, 150 / 331, True),
    "translate_y": (_translate_y, 1.0, 150 / 331, True),
    "rotate": (_rotate, math.radians(135), math.radians(30), True),
    "brightness": (_brightness, 0.99, 0.9, True),
    "color": (_color, 0.99, 0.9, True),
    "contrast": (_contrast, 0.99, 0.9, True),
    "sharpness": (_sharpness, 0.99, 0.9, True),
    "posterize": (_posterize, 6, 4, False),
    "solarize": (_solarize, 1.0, 1.0, False),
    "autocontrast": (_autocontrast, 0, 0, False),
    "equalize": (_equalize, 0, 0, False),
}


def _apply_random_op(images: Tensor, draws: Tensor, config: AugmentConfig) -> Tensor:
    """One operation per image; `draws` [B, 3] choose it, its strength (TrivialAugment) and its sign."""
    trivial = config.policy == "trivialaugment"
    chosen = (draws[:, 0] * len(OPS)).long()
    share = draws[:, 1] if trivial else torch.full_like(draws[:, 1], config.magnitude / 30)
    sign = torch.where(draws[:, 2] < 0.5, -1.0, 1.0)
    out = images.clone()
    for k, (operation, widest, strongest, signed) in enumerate(OPS.values()):
        rows = torch.nonzero(chosen == k).flatten()
        if len(rows):
            strength = share[rows] * (widest if trivial else strongest) * (sign[rows] if signed else 1)
            out[rows] = operation(images[rows], strength)
    return out
