"""The learning rate and the size of the images over a run, and how a budget becomes steps. No torch here."""

import math
import re
from dataclasses import dataclass
from typing import Literal, Self

from vitrail.errors import VitrailError


@dataclass(frozen=True)
class Budget:
    """A length of training: a number of passes over the data, of steps, or of seconds."""

    amount: float
    unit: Literal["epochs", "steps", "s"]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `20epochs`, `800steps`, `30min`, `90s` or `2h`. Raises VitrailError for anything else."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?|s|sec|min|h)\s*", text)
        if match is None or float(match[1]) == 0:
            raise VitrailError(f"budget '{text}' is not understood; write for example 30min, 90s or 20epochs")
        amount, unit = float(match[1]), match[2]
        if unit[:4] in ("epoc", "step"):
            return cls(amount, "epochs" if unit[0] == "e" else "steps")
        return cls(amount * {"s": 1, "sec": 1, "min": 60, "h": 3600}[unit], "s")


def lr_factor(step: int, num_steps: int, warmup_fraction: float, decay: Literal["linear", "cosine"]) -> float:
    """The share of the peak learning rate to use at `step`, counted from 0: always in 0..1, never 0.

    Rises linearly over the first `warmup_fraction` of the steps, then falls towards 0, which it
    would reach at `num_steps`, one past the last step.
    """
    warmup_steps = int(warmup_fraction * num_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = (num_steps - step) / (num_steps - warmup_steps)
    return left if decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def _phases(coarse_fraction: float) -> tuple[tuple[float, float], ...]:
    """(the share of the steps up to which a phase lasts, the side of its images as a share of the whole)."""
    return (coarse_fraction / 2, 0.5), (coarse_fraction, 0.75), (1.0, 1.0)


def image_side(step: int, num_steps: int, coarse_fraction: float, image_size: int, patch_size: int) -> int:
    """The side in pixels of the images to train on at `step`, counted from 0: half, then three quarters, then all.

    The first half of `coarse_fraction` of the steps is taken at half the side, the second at three
    quarters, each brought to a multiple of the patch size.
    """
    scale = next((scale for end, scale in _phases(coarse_fraction) if step / num_steps < end), 1.0)
    if scale == 1:
        return image_size
    return max(1, round(scale * image_size / patch_size)) * patch_size


def time_share(step: int, num_steps: int, coarse_fraction: float) -> float:
    """The share of a run's time, 0 to 1, that its first `step` steps take, if a step's time goes with the side of its
    images to the power of 1.5: seen were 0.7 (64 wide) and 1.2 (128) in bf16, and 1.7 (128) in fp32."""

    def time(share: float) -> float:
        total, begin = 0.0, 0.0
        for end, scale in _phases(coarse_fraction):
            total += scale**1.5 * max(0.0, min(share, end) - begin)
            begin = end
        return total

    return time(step / num_steps) / time(1)


def plan_steps(budget: Budget, epoch_images: int, batch_size: int, step_s: float, val_s: float) -> int:
    """How many steps a budget pays for: at least one.

    Args:
        budget: passes over the data, steps, or the seconds that are left.
        epoch_images: images in one pass.
        batch_size: images in one step.
        step_s: seconds a training step takes, from a probe.
        val_s: seconds one look at the validation images takes; there is one at the end of each pass.
    """
    if budget.unit != "s":
        num_steps = budget.amount if budget.unit == "steps" else budget.amount * epoch_images / batch_size
        return max(1, math.ceil(num_steps))
    seconds_per_step = step_s + val_s * batch_size / epoch_images
    # The last pass, though usually cut short, is validated too.
    return max(1, int((budget.amount - val_s) / seconds_per_step))
