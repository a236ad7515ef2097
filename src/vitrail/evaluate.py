"""A trained model on a whole split: every figure, and its picture."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.batch import normalize
from vitrail.config import Preprocessing
from vitrail.data import ImageSet, load_split
from vitrail.errors import Event, Listener, VitrailError, ignore_events
from vitrail.metrics import Metrics, compute_metrics
from vitrail.run import Run

EVAL_BATCH_SIZE = 250


@torch.inference_mode()
def compute_logits(
    model: nn.Module, images: ImageSet, preprocessing: Preprocessing, listener: Listener = ignore_events
) -> Tensor:
    """The logits [N, K] in fp32, on the CPU, of a model in eval mode; computed in the model's own dtype and device."""
    parameter = next(model.parameters())
    parts: list[Tensor] = []
    done = 0
    for batch in images.batches(EVAL_BATCH_SIZE):
        pixels = normalize(batch.images.to(parameter.device), preprocessing).to(parameter.dtype)
        counted = int(batch.weight.sum())
        parts.append(model(pixels)[:counted].float().cpu())
        done += counted
        listener(Event(task="evaluating", done=done, total=len(images)))
    return torch.cat(parts)


def evaluate(
    run: Run,
    data: str | None = None,
    split: Literal["train", "val", "test"] = "test",
    listener: Listener = ignore_events,
) -> Metrics:
    """Measure a run's model, in fp32, on a split of `data` (the run's own source if None).

    Raises:
        VitrailError: if the data or its classes do not fit the model.
    """
    model = run.load_model()
    config = run.config
    images = load_split(config, data or config.data, split, listener)
    logits = compute_logits(model, images, config.preprocessing, listener)
    return compute_metrics(logits, images.labels, config.classes)


def save_evaluation(metrics: Metrics, split: str, folder: Path) -> tuple[Path, Path]:
    """Write `evaluation-<split>.json` and the confusion matrix as `confusion-<split>.png` into `folder`.

    Raises:
        VitrailError: if the folder cannot be written.
    """
    figures, picture = folder / f"evaluation-{split}.json", folder / f"confusion-{split}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps({"split": split, **asdict(metrics)}, indent=1))
        _draw_confusion(metrics).savefig(picture)
    except OSError as error:
        raise VitrailError(f"cannot write to {folder}: {error.strerror}; give another --out") from error
    return figures, picture


def _draw_confusion(metrics: Metrics) -> Any:
    """The confusion matrix, rows normalised to shares of the true class, counts written in the cells."""
    from matplotlib.figure import Figure

    names = list(metrics.per_class)
    counts = torch.tensor(metrics.confusion)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    side = max(4.5, 0.55 * len(names) + 2)
    figure = Figure(figsize=(side, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"accuracy {metrics.accuracy:.1%} on {metrics.count} images")
    if len(names) <= 30:
        for row, column in torch.nonzero(counts).tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=8)
    return figure
