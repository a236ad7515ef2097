"""A trained model on a whole split: every figure, and its picture."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.batch import normalize
from vitrail.checkpoint import write_text
from vitrail.config import Preprocessing
from vitrail.data import ImageSet, load_split
from vitrail.distributed import World, join_world
from vitrail.errors import Event, Listener, VitrailError, ignore_events, printable
from vitrail.metrics import Metrics, compute_metrics
from vitrail.run import Run

# Few enough on a CPU that what a layer leaves behind stays in a core's cache.
CPU_BATCH_SIZE, GPU_BATCH_SIZE = 32, 256
# With more classes than this the confusion picture has numbers beside it instead of names, and grows no more.
MAX_NAMED = 60


def compute_logits(
    model: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    listener: Listener = ignore_events,
    world: World | None = None,
) -> Tensor:
    """The logits [N, K] in fp32, on the CPU, of a model in eval mode; computed in the model's own dtype and device.

    On a CPU each thread takes batches of its own, which is faster than to share each operation
    (docs/benchmarks.md). Each process of a `world` computes its share, once, and all get the whole.
    """
    world = world or World()
    mine = images.images[world.share(len(images))] if world.size > 1 else images.images
    parameter = next(model.parameters())
    on_cpu = parameter.device.type == "cpu"
    batch_size = CPU_BATCH_SIZE if on_cpu else GPU_BATCH_SIZE

    @torch.inference_mode()
    def compute(start: int) -> Tensor:
        pixels = mine[start : start + batch_size].to(parameter.device)
        return model(normalize(pixels, preprocessing).to(parameter.dtype)).float().cpu()

    parts: list[Tensor] = []
    with ThreadPoolExecutor(torch.get_num_threads() if on_cpu else 1, "evaluate", torch.set_num_threads, (1,)) as pool:
        # More processes than images leave some with an empty batch.
        for logits in pool.map(compute, range(0, max(1, len(mine)), batch_size)):
            parts.append(logits)
            listener(Event(task="evaluating", done=min(len(mine), len(parts) * batch_size), total=len(mine)))
    computed = torch.cat(parts)
    whole = torch.zeros(len(images), computed.shape[1])
    whole[world.share(len(images))] = computed
    return world.sum(whole)


def evaluate(
    run: Run,
    data: str | None = None,
    split: Literal["train", "val", "test"] = "test",
    listener: Listener = ignore_events,
) -> Metrics:
    """Measure a run's model, in fp32, on a split of `data` (the run's own source if None).

    Raises:
        VitrailError: if the data or its classes do not fit the model, or its answers are not finite.
    """
    model = run.load_model()
    config = run.config
    images = load_split(config, data or config.data, split, listener)
    with join_world() as world:
        logits = compute_logits(model, images, config.preprocessing, listener, world)
    if not logits.isfinite().all():
        raise VitrailError(f"{run.weights} answers with NaN or infinity; there is nothing to measure: train again")
    return compute_metrics(logits, images.labels, config.classes)


def save_evaluation(metrics: Metrics, split: str, folder: Path) -> tuple[Path, Path]:
    """Write `evaluation-<split>.json` and the confusion matrix as `confusion-<split>.png` into `folder`.

    Raises:
        VitrailError: if the folder cannot be written.
    """
    figures, picture = folder / f"evaluation-{split}.json", folder / f"confusion-{split}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(figures, json.dumps({"split": split, **asdict(metrics)}, indent=1))
        _draw_confusion(metrics).savefig(picture)
    except OSError as error:
        raise VitrailError(f"cannot write to {folder}: {error.strerror}; give another --out") from error
    return figures, picture


def _draw_confusion(metrics: Metrics) -> Any:
    """The confusion matrix, rows normalised to shares of the true class, counts written in the cells."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [printable(name) for name in metrics.per_class]
    counts = torch.tensor(metrics.confusion)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    side = max(4.5, 0.55 * min(len(names), MAX_NAMED) + 2)
    figure = Figure(figsize=(side, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= MAX_NAMED:
        with mpl.rc_context({"text.parse_math": False}):
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
            axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"accuracy {metrics.accuracy:.1%} on {metrics.count} images")
    if len(names) <= 30:
        for row, column in torch.nonzero(counts).tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=8)
    return figure
