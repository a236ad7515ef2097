"""What each figure shows of this model, in one sentence made from its numbers."""

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from vitrail.report.findings import Findings, Sight
from vitrail.words import Words

# Differences smaller than these are not worth a word.
SURENESS_TOLERANCE = 0.02
PLACE_TOLERANCE = 0.15


def of_history(found: Findings, words: Words) -> dict[str, str]:
    """Sentences on loss, accuracy, lr and throughput; none if no pass was finished."""
    rows = found.history
    if not rows:
        return {}
    losses, last = [row["val_loss"] for row in rows], rows[-1]["val_accuracy"]
    best = min(rows, key=lambda row: row["val_loss"])
    rates, speeds = [row["lr"] for row in rows], [row["images_per_s"] for row in rows]
    before = rows[min(math.floor(0.8 * len(rows)), len(rows) - 2)] if len(rows) > 1 else rows[-1]
    gain = last - before["val_accuracy"]
    noise = 2 * math.sqrt(last * (1 - last) / found.config["num_val"])
    course = "once" if len(rows) == 1 else "rising" if gain > noise else "flat"
    return {
        "loss": words(
            "read.loss_here",
            first=losses[0],
            last=losses[-1],
            best=best["val_loss"],
            best_pass=best["epoch"],
            passes=rows[-1]["epoch"],
        ),
        "accuracy": words(
            f"read.accuracy_{course}", last=last, gain=100 * gain, since=before["epoch"], noise=100 * noise
        ),
        "lr": words("read.lr_here", peak=max(rates), last=rates[-1]),
        "throughput": words(
            "read.throughput_here", median=statistics.median(speeds), low=min(speeds), high=max(speeds)
        ),
    }


def of_results(found: Findings, words: Words) -> dict[str, str]:
    """Sentences on reliability, confusion and the classes."""
    metrics, names = found.metrics, list(found.metrics.per_class)
    gap = found.confidence - metrics.accuracy
    verdict = "fair" if abs(gap) < SURENESS_TOLERANCE else "over" if gap > 0 else "under"
    counts = torch.tensor(metrics.confusion)
    wrong = counts - counts.diag().diag()
    true, called = divmod(int(wrong.argmax()), len(names))
    rates = {name: rate for name, rate in metrics.per_class.items() if rate is not None}
    best, worst = max(rates, key=rates.__getitem__), min(rates, key=rates.__getitem__)
    return {
        "reliability": words(
            f"read.reliability_{verdict}", confidence=found.confidence, accuracy=metrics.accuracy, gap=100 * abs(gap)
        ),
        "confusion": words(
            "read.confusion_here" if wrong.any() else "read.confusion_perfect",
            true=names[true],
            called=names[called],
            count=int(wrong[true, called]),
            support=int(counts[true].sum()),
        ),
        "classes": words("read.classes_here", best=best, worst=worst, high=rates[best], low=rates[worst]),
    }


def of_sight(found: Findings, sight: Sight, words: Words) -> dict[str, str]:
    """Sentences on everything that takes attention."""
    reach, distances = sight.reach, sight.reach.distance_px
    near, far, picky = _where(-distances), _where(distances), _where(-reach.entropy_bits)
    lowest = reach.entropy_bits.min().item()
    sentences = {
        "filters": _of_filters(sight, words),
        "distance": words(
            "read.distance_here",
            near_block=near[0], near_head=near[1], near=distances.min().item(),
            near_patches=distances.min().item() / sight.patch_size,
            far_block=far[0], far_head=far[1], far=distances.max().item(),
            first=distances[0].mean().item(), last=distances[-1].mean().item(),
        ),
        "entropy": words(
            "read.entropy_here",
            block=picky[0], head=picky[1], low=lowest, choices=2**lowest,
            mean=reach.entropy_bits.mean().item(), uniform=reach.uniform_entropy_bits,
        ),
        "heads": _of_heads(found, words),
        "maps": _of_maps(found, words),
        "hidden": _of_hidden(sight, words),
        "sensitivity": _of_sensitivity(sight, words),
    }  # fmt: skip
    for test in ("deletion", "insertion"):
        sentences[test] = _of_trust(sight, test, words)
    for name, similarity in sight.similarity.items():
        sentences["bias_similarity" if name == "bias" else name] = _of_place(similarity, words)
    if sight.bias is not None:
        sentences["bias"] = _of_bias(sight.bias, words)
    return sentences


def _where(values: Tensor) -> tuple[int, int]:
    """The block and head, counted from 1, of the largest of [L, H]."""
    block, head = divmod(int(values.argmax()), values.shape[1])
    return block + 1, head + 1


def _of_filters(sight: Sight, words: Words) -> str:
    components, share = sight.filters.components, sight.filters.variance_share
    fields: dict[str, Any] = {"count": len(components), "share": share.sum().item(), "first": share[0].item()}
    if components.shape[1] == 1:
        return words("read.filters_grey", **fields)
    # What all channels share is brightness; a component is one of brightness if that is most of it.
    brightness = components.mean(1).square().sum((1, 2)) * components.shape[1]
    grey = int((brightness > 0.5).sum())
    return words("read.filters_colour", grey=grey, colour=len(components) - grey, **fields)


def _of_place(similarity: Tensor, words: Words) -> str:
    side = len(similarity)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    apart, cosines = torch.cdist(places, places), similarity.reshape(side**2, side**2)
    near = cosines[(apart > 0) & (apart < 1.1)].mean().item()
    far = cosines[apart > side / 2].mean().item()
    return words("read.place_clear" if near - far > PLACE_TOLERANCE else "read.place_faint", near=near, far=far)


def _of_bias(shares: Tensor, words: Words) -> str:
    middle = shares.shape[-1] // 2
    rows = shares.flatten(-2).argmax(-1)
    near = ((rows // shares.shape[-1] - middle).abs() <= 1) & ((rows % shares.shape[-1] - middle).abs() <= 1)
    block, head = _where(shares.flatten(-2).amax(-1))
    return words(
        "read.bias_here", near=int(near.sum()), heads=near.numel(), value=shares.max().item(), block=block, head=head
    )


def _of_heads(found: Findings, words: Words) -> str:
    assert found.example.picture is not None
    looks = found.example.picture.explanation.attention[:, 0].flatten(-2)
    top = looks.amax(-1) / looks.sum(-1).clamp_min(1e-12)
    block, head = _where(top)
    wide_block, wide_head = _where(-top)
    return words(
        "read.heads_here",
        block=block, head=head, share=top.max().item(),
        wide_block=wide_block, wide_head=wide_head, wide_share=top.min().item(),
    )  # fmt: skip


def _of_maps(found: Findings, words: Words) -> str:
    """How few patches hold half of the relevance, and whether the methods agree on the first."""
    assert found.example.picture is not None
    maps = {name: values[0].flatten() for name, values in found.example.picture.explanation.maps.items()}
    held = maps["relevance"].sort(descending=True).values.cumsum(0) / maps["relevance"].sum().clamp_min(1e-12)
    agree = len({int(values.argmax()) for values in maps.values()})
    return words(
        "read.maps_agree" if agree == 1 else "read.maps_differ",
        few=int((held < 0.5).sum()) + 1, patches=len(held), places=agree,
    )  # fmt: skip


def _of_trust(sight: Sight, test: str, words: Words) -> str:
    curves = {name: getattr(method, test) for name, method in sight.trust.methods.items()}
    best = max(curves, key=lambda name: curves[name].gain.value)
    if curves[best].gain.low <= 0:
        return words("read.trust_none")
    method = words(f"maps.short_{best}")
    return words("read.trust_best", method=method, area=curves[best].area.value, random=curves["random"].area.value)


def _of_hidden(sight: Sight, words: Words) -> str:
    attended, random = sight.trust.methods["attention"], sight.trust.methods["random"]
    half = math.floor(len(sight.trust.shares) / 2)
    return words(
        "read.hidden_here",
        most=attended.deletion.accuracy[half],
        least=attended.insertion.accuracy[half],
        random=random.deletion.accuracy[half],
    )


def _of_sensitivity(sight: Sight, words: Words) -> str:
    found = sight.sensitivity
    return words(
        "read.sensitivity_here",
        count=found.num_images,
        whole=found.accuracy,
        shuffled=found.shuffled,
        moved=found.moved,
        changes=found.moved_changes,
    )
