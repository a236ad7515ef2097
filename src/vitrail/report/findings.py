"""Everything a report tells, as numbers: measured once, then written down and drawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitrail.anatomy import (
    AttentionReach,
    PatchFilters,
    attention_reach,
    patch_filters,
    position_similarity,
    position_vectors,
    relative_bias,
)
from vitrail.batch import normalize
from vitrail.data import ImageSet, load_split
from vitrail.errors import Listener, VitrailError
from vitrail.evaluate import compute_logits
from vitrail.explain import ExplainedPicture, Explanation, check_model, explain, has_attention
from vitrail.metrics import NUM_CALIBRATION_BINS, Metrics, compute_metrics
from vitrail.plain import to_dict
from vitrail.run import Run
from vitrail.trust import Sensitivity, Trust, measure_sensitivity, measure_trust
from vitrail.vit import VisionTransformer

NUM_CASES = 6
NUM_REACH_IMAGES, NUM_TRUST_IMAGES = 1000, 200
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Case:
    """One image worth a look: `picture` holds what the model saw and, if it has attention, its maps."""

    index: int
    true: str
    called: str
    probability: float
    pixels: Tensor
    picture: ExplainedPicture | None


@dataclass(frozen=True)
class Sight:
    """What only a model with attention has."""

    patch_size: int
    filters: PatchFilters
    similarity: dict[str, Tensor]
    bias: Tensor | None
    reach: AttentionReach
    trust: Trust
    sensitivity: Sensitivity


@dataclass(frozen=True)
class Findings:
    """A run, as numbers. `reliability` has (confidence, accuracy, images) for each bin that holds any."""

    name: str
    kind: str
    num_parameters: int
    split: Split
    config: dict[str, Any]
    environment: dict[str, Any]
    history: list[dict[str, float]]
    metrics: Metrics
    confidence: float
    reliability: list[tuple[float, float, int]]
    mistakes: list[Case]
    unsure: list[Case]
    example: Case
    sight: Sight | None


def measure(run: Run, data: str | None, split: Split, listener: Listener) -> Findings:
    """Measure all of it on a split of `data` (the run's own source if None).

    Raises:
        VitrailError: if the weights are not finite, or the data do not fit the model.
    """
    model = run.load_model()
    vit = model if has_attention(model) else None
    if vit is not None:
        check_model(vit)
    images = load_split(run.config, data or run.config.data, split, listener)
    if len(images) < 2:
        raise VitrailError(f"the {split} split has {len(images)} image; a report needs at least 2")
    logits = compute_logits(model, images, run.config.preprocessing, listener)
    if not logits.isfinite().all():
        raise VitrailError(f"{run.weights} answers with NaN or infinity; there is nothing to report: train again")
    sure, called = logits.softmax(1).max(1)
    right = called == images.labels
    order = sure.argsort(descending=True)
    wrong, hits = order[~right[order]][:NUM_CASES], order[right[order]].flip(0)
    # A hit as sure as most: neither the easiest picture nor a lucky one.
    example = hits[len(hits) // 3 :][:1] if len(hits) else order[:1]
    *cases, shown = _cases(run, vit, images, torch.cat([wrong, hits[:NUM_CASES], example]), logits)
    return Findings(
        name=run.folder.resolve().name,
        kind=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        split=split,
        config=to_dict(run.config),
        environment=_environment(run),
        history=run.read_metrics(),
        metrics=compute_metrics(logits, images.labels, run.config.classes),
        confidence=sure.mean().item(),
        reliability=_reliability(sure, right),
        mistakes=cases[: len(wrong)],
        unsure=cases[len(wrong) :],
        example=shown,
        sight=None if vit is None else _see(run, vit, images, listener),
    )


def _environment(run: Run) -> dict[str, Any]:
    """What the run was made with; without the place of the program and the name of the system's build."""
    found = run.read_environment()
    if found.get("command"):
        found["command"][0] = Path(found["command"][0]).name
    return found | {"platform": str(found.get("platform", "")).split("-")[0]}


def _reliability(sure: Tensor, right: Tensor) -> list[tuple[float, float, int]]:
    bins = (sure * NUM_CALIBRATION_BINS).long().clamp_max(NUM_CALIBRATION_BINS - 1)
    members = [bins == k for k in range(NUM_CALIBRATION_BINS)]
    return [(sure[m].mean().item(), right[m].float().mean().item(), int(m.sum())) for m in members if m.any()]


def _cases(run: Run, vit: VisionTransformer | None, images: ImageSet, chosen: Tensor, logits: Tensor) -> list[Case]:
    """The images at `chosen`, each explained for the class it was given."""
    names, cases = run.config.classes, list[Case]()
    for index in chosen.tolist():
        pixels, probabilities = images.images[index], logits[index].softmax(0)
        called, picture = int(probabilities.argmax()), None
        if vit is not None:
            found: Explanation = explain(vit, normalize(pixels[None], run.config.preprocessing))
            size = (pixels.shape[-1], pixels.shape[-1])
            picture = ExplainedPicture(f"image {index}", size, pixels, names, found)
        true = names[int(images.labels[index])]
        cases.append(Case(index, true, names[called], probabilities[called].item(), pixels, picture))
    return cases


def _see(run: Run, vit: VisionTransformer, images: ImageSet, listener: Listener) -> Sight:
    pre = run.config.preprocessing
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    many, some = order[:NUM_REACH_IMAGES], order[:NUM_TRUST_IMAGES]
    return Sight(
        patch_size=vit.patch_embed.patch_size,
        filters=patch_filters(vit),
        similarity={name: position_similarity(vectors) for name, vectors in position_vectors(vit).items()},
        bias=relative_bias(vit),
        reach=attention_reach(vit, images.images[many], pre, listener),
        trust=measure_trust(vit, images.images[some], images.labels[some], pre, listener),
        sensitivity=measure_sensitivity(vit, images.images[many], images.labels[many], pre),
    )
