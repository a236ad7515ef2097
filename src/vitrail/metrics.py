"""What is counted on a whole split: accuracy and its interval, loss, confusion, calibration."""

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

NUM_CALIBRATION_BINS = 15


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The figures of one model on one split.

    `accuracy_low` and `accuracy_high` bound the 95% Wilson interval. `loss` is the mean cross-entropy
    in nats. `ece` is the expected calibration error in 15 bins. `per_class` has each class's accuracy,
    None where the split has no image of it. `confusion[i][j]` counts images of class i called j.
    """

    count: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    ece: float
    per_class: dict[str, float | None]
    confusion: list[list[int]]


def compute_metrics(logits: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> Metrics:
    """Every figure from the logits [N, K] and labels int64 [N] of a whole split, N at least 1."""
    # torchmetrics takes a second to import and nothing before the end of an evaluation needs it
    from torchmetrics.functional.classification import (
        multiclass_calibration_error,
        multiclass_confusion_matrix,
    )

    logits = logits.double()
    matrix: Any = multiclass_confusion_matrix(logits.argmax(1), labels, num_classes=len(class_names))
    support, hits = matrix.sum(1).tolist(), matrix.diagonal().tolist()
    accuracy = sum(hits) / len(labels)
    low, high = wilson_interval(sum(hits), len(labels))
    # A confidence of exactly 1 in fp32 would be put in a bin of its own (torchmetrics issue 3510).
    probabilities = logits.softmax(1).clamp_max(1 - 1e-6)
    ece = multiclass_calibration_error(probabilities, labels, len(class_names), n_bins=NUM_CALIBRATION_BINS)
    return Metrics(
        count=len(labels),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        loss=F.cross_entropy(logits, labels).item(),
        ece=ece.item(),
        per_class={name: h / n if n else None for name, h, n in zip(class_names, hits, support, strict=True)},
        confusion=matrix.tolist(),
    )


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95% by default (Wilson 1927): never outside 0..1."""
    p = hits / count
    centre = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)
