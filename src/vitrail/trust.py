"""How far a map may be trusted, and what changes a model's answer.

A map claims which patches the answer rests on. To test it, patches are hidden in the order it gives:
if it is right, the answer goes at once when the first ones go (deletion), and comes at once when they
are the first to be shown (insertion). A random order is the yardstick.

Source: deletion and insertion of RISE (Petsiuk et al. 2018, arXiv 1806.07421), section 3.2, by patch instead
of by pixel; what is hidden is the mean colour of the training images, in both.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.config import Preprocessing
from vitrail.errors import Event, Listener, ignore_events
from vitrail.explain import check_model, explain, map_batches
from vitrail.stem import patchify, unpatchify
from vitrail.vit import VisionTransformer

NUM_STEPS = 10
RANDOM = "random"


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its 95% interval over the images (normal approximation)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """What becomes of the answer while patches are hidden (deletion) or shown (insertion) in a map's order.

    `probability` of the class predicted on the whole image, and `accuracy`, both [NUM_STEPS + 1].
    `area`: under the probability, 0..1. `gain`: how much better the area is than under a random order,
    image by image: smaller in deletion, larger in insertion.
    """

    probability: list[float]
    accuracy: list[float]
    area: Interval
    gain: Interval


@dataclass(frozen=True)
class MethodTrust:
    """Both curves of one method."""

    deletion: Curve
    insertion: Curve

    @property
    def beats_random(self) -> bool:
        """Whether both intervals of the gain lie above 0."""
        return self.deletion.gain.low > 0 and self.insertion.gain.low > 0


@dataclass(frozen=True)
class Trust:
    """Every method's test on the same images; `shares` (0..1) of the patches are the curves' first axis."""

    num_images: int
    shares: list[float]
    methods: dict[str, MethodTrust]


@dataclass(frozen=True)
class Sensitivity:
    """Accuracy on whole images, with the patches shuffled, and moved by one pixel (mean of four ways).

    `moved_changes` is the share of images to which at least one of the four moves gives another answer.
    """

    num_images: int
    accuracy: float
    shuffled: float
    moved: float
    moved_changes: float


def measure_trust(
    model: VisionTransformer,
    images: Tensor,
    labels: Tensor,
    preprocessing: Preprocessing,
    listener: Listener = ignore_events,
    *,
    seed: int = 0,
) -> Trust:
    """Test every method, and a random order, on uint8 images [N, C, S, S] with int64 labels [N], N at least 2.

    Raises:
        VitrailError: if the model has no attention or is not finite.
    """
    check_model(model)
    generator = torch.Generator().manual_seed(seed)
    shares = torch.linspace(0, 1, NUM_STEPS + 1)
    found: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, 2, len(images), len(shares)))
    for place, batch in map_batches(model, images, preprocessing):
        explanation = explain(model, batch)
        random = torch.rand(explanation.maps["rollout"].shape, generator=generator)
        for name, scores in (*explanation.maps.items(), (RANDOM, random)):
            for step, share in enumerate(shares.tolist()):
                for test, logits in enumerate(_logits_without(model, batch, scores.flatten(1), share)):
                    chosen = logits.softmax(1).gather(1, explanation.labels[:, None])[:, 0]
                    hits = (logits.argmax(1) == labels[place]).float()
                    found[name][test, :, place, step] = torch.stack([chosen, hits])
        listener(Event(task="testing the maps", done=place.stop, total=len(images)))
    methods = {name: MethodTrust(*_curves(values, found[RANDOM], shares)) for name, values in found.items()}
    return Trust(len(images), shares.tolist(), methods)


def _logits_without(model: VisionTransformer, images: Tensor, scores: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The logits [B, K] with the share of the patches that score highest hidden, and with only those shown."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1).to(images.device)
    first, patch_size = rank < round(share * rank.shape[1]), model.patch_embed.patch_size
    return (
        _look(model, hide_patches(images, first, patch_size)),
        _look(model, hide_patches(images, ~first, patch_size)),
    )


def _curves(values: Tensor, random: Tensor, shares: Tensor) -> tuple[Curve, Curve]:
    """Both curves of what was found in a map's order and in a random one, [2 tests, probability and hit, N, steps]."""
    areas = torch.trapezoid(values[:, 0], shares)  # [2, N]
    gains = torch.tensor([[-1.0], [1.0]]) * (areas - torch.trapezoid(random[:, 0], shares))
    deletion, insertion = (
        Curve(probability.mean(0).tolist(), hits.mean(0).tolist(), _interval(area), _interval(gain))
        for (probability, hits), area, gain in zip(values, areas, gains, strict=True)
    )
    return deletion, insertion


def measure_sensitivity(
    model: VisionTransformer, images: Tensor, labels: Tensor, preprocessing: Preprocessing, seed: int = 0
) -> Sensitivity:
    """Shuffle the patches of uint8 images [N, C, S, S], and move the images by a pixel, repeating the edge."""
    check_model(model)
    generator = torch.Generator().manual_seed(seed)
    answers = torch.zeros(6, len(images), dtype=torch.int64)
    for place, batch in map_batches(model, images, preprocessing):
        padded = F.pad(batch, (1, 1, 1, 1), mode="replicate")
        side = batch.shape[-1]
        moved = [padded[..., y : y + side, x : x + side] for y, x in ((0, 1), (2, 1), (1, 0), (1, 2))]
        patches = patchify(batch, model.patch_embed.patch_size)
        order = torch.rand(patches.shape[:2], generator=generator).argsort(1).to(batch.device)
        shuffled = unpatchify(patches.take_along_dim(order[..., None], 1), model.patch_embed.patch_size)
        for i, changed in enumerate((batch, shuffled, *moved)):
            answers[i, place] = _look(model, changed).argmax(1)
    whole, shuffled, *moved = (answers == labels).double().mean(1).tolist()
    changes = (answers[2:] != answers[0]).any(0).double().mean().item()
    return Sensitivity(len(images), whole, shuffled, sum(moved) / len(moved), changes)


def hide_patches(images: Tensor, hidden: Tensor, patch_size: int) -> Tensor:
    """Normalised images [B, C, S, S] with the patches where bool `hidden` [B, N] is true at 0, the mean colour."""
    side = images.shape[-1] // patch_size
    mask = hidden.reshape(-1, 1, side, side).repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return images.masked_fill(mask, 0.0)


@torch.inference_mode()
def _look(model: VisionTransformer, images: Tensor) -> Tensor:
    return model(images).float().cpu()


def _interval(values: Tensor) -> Interval:
    mean, half = values.mean().item(), 1.959964 * values.std().item() / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)
