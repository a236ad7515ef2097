"""The report's charts: every function takes numbers and words, and gives a matplotlib figure."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from vitrail.anatomy import AttentionReach, PatchFilters
from vitrail.figures import BLUE, GREEN, INK, MUTED, ORANGE, Array, mosaic, show, show_heads, styled
from vitrail.metrics import wilson_interval
from vitrail.trust import Sensitivity, Trust
from vitrail.words import Words

METHOD_COLOURS = {"attention": BLUE, "rollout": ORANGE, "relevance": GREEN, "evidence": INK, "random": MUTED}


@styled
def draw_filters(filters: PatchFilters) -> Figure:
    """The principal components as tiles, each on its own scale, seven to a row."""
    tiles = [to_unit(component) for component in filters.components.numpy().transpose(0, 2, 3, 1)]
    columns = min(7, len(tiles))
    tiles += [np.ones_like(tiles[0])] * (-len(tiles) % columns)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    figure = Figure(figsize=(4.2, 4.2 * len(rows) / columns), layout="constrained")
    show(figure.subplots(), mosaic(rows))
    return figure


def to_unit(values: Array) -> Array:
    """A filter [P, P, C] around zero as RGB 0..1, zero at middle grey."""
    scaled = 0.5 + 0.42 * values / np.abs(values).max()  # no tile melts into a white or a black page
    return scaled if scaled.shape[2] == 3 else np.repeat(scaled[..., :1], 3, axis=2)


@styled
def draw_similarity(similarity: Tensor, words: Words) -> Figure:
    """A grid of grids: at each patch's place, its cosine to all patches."""
    side = len(similarity)
    figure = Figure(figsize=(4.2, 3.3), layout="constrained")
    axes = figure.subplots()
    image = show(axes, mosaic([[similarity[i, j].numpy() for j in range(side)] for i in range(side)]), vmin=-1, vmax=1)
    figure.colorbar(image, label=words("figure.cosine"), shrink=0.95)
    return figure


@styled
def draw_bias(shares: Tensor, words: Words) -> Figure:
    """How each head shares its look by offset; the patch that looks is in the middle."""
    num_blocks, num_heads = shares.shape[:2]
    figure = Figure(figsize=(4.8, 0.6 + 4.0 * num_blocks / num_heads), layout="constrained")
    axes = figure.subplots()
    tiles = [[head.numpy() for head in block] for block in shares]
    image = show_heads(axes, tiles, words, cmap="cividis", vmin=0, vmax=shares.max().item())
    figure.colorbar(image, label=words("figure.bias"), shrink=0.8)
    return figure


@styled
def draw_reach(reach: AttentionReach, kind: str, words: Words) -> Figure:
    """A dot per head over the blocks, and a line at what a head that looks everywhere alike would have."""
    values = reach.distance_px if kind == "distance" else reach.entropy_bits
    uniform = reach.uniform_distance_px if kind == "distance" else reach.uniform_entropy_bits
    figure = Figure(figsize=(4.2, 2.9), layout="constrained")
    axes, blocks = figure.subplots(), range(1, len(values) + 1)
    axes.plot(blocks, values.sort(1).values.numpy(), "o", color=BLUE, markersize=4, alpha=0.75)
    axes.plot(blocks, values.mean(1).numpy(), color=BLUE, linewidth=1.2)
    axes.axhline(uniform, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(1, uniform, words("figure.uniform"), color=MUTED, va="bottom", fontsize=8)
    axes.set(xlabel=words("figure.block"), ylabel=words(f"figure.{kind}"), ylim=(0, 1.15 * uniform), xticks=blocks)
    return figure


@styled
def draw_lines(
    x: Sequence[float], lines: Mapping[str, tuple[Sequence[float], str]], labels: tuple[str, str], percent: str = ""
) -> Figure:
    """Lines over a shared x: `lines` maps a name to (y, colour), `labels` name x and y; `percent`: axes of shares."""
    figure = Figure(figsize=(4.2, 2.9), layout="constrained")
    axes = figure.subplots()
    # The names stand in the order in which the lines lie.
    for name, (y, colour) in sorted(lines.items(), key=lambda line: -sum(line[1][0])):
        style = (0, (4, 2)) if colour == MUTED else "-"
        marker = "o" if len(x) < 15 else ""
        axes.plot(x, y, color=colour, linestyle=style, marker=marker, markersize=3.5, clip_on=False, label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, 1) if "y" in percent else (0, None))
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name in percent:
            axis.set_major_formatter("{x:.0%}")
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor="linecolor", handlelength=1.5, fontsize=8)
    return figure


def draw_trust(trust: Trust, test: str, words: Words) -> Figure:
    """The predicted class's probability as patches are hidden, or shown, in the order of each method."""
    lines = {
        words(f"maps.short_{name}"): (getattr(method, test).probability, METHOD_COLOURS[name])
        for name, method in trust.methods.items()
    }
    return draw_lines(trust.shares, lines, (words(f"figure.{test}_share"), words("figure.probability")), percent="xy")


def draw_hidden(trust: Trust, words: Words) -> Figure:
    """Accuracy as the most, the least attended, or random patches are hidden."""
    attended, random = trust.methods["attention"], trust.methods["random"]
    lines = {
        words("figure.most_hidden"): (attended.deletion.accuracy, ORANGE),
        words("figure.least_hidden"): (attended.insertion.accuracy[::-1], BLUE),
        words("figure.random_hidden"): (random.deletion.accuracy, MUTED),
    }
    return draw_lines(trust.shares, lines, (words("figure.deletion_share"), words("figure.accuracy")), percent="xy")


@styled
def draw_sensitivity(found: Sensitivity, words: Words) -> Figure:
    """Accuracy on whole pictures, after a move by a pixel, and with the patches shuffled, as bars."""
    bars = {"shuffled": found.shuffled, "moved": found.moved, "whole": found.accuracy}
    figure = Figure(figsize=(4.2, 1.7), layout="constrained")
    axes = figure.subplots()
    names = [words(f"figure.{name}") for name in bars]
    drawn = axes.barh(names, list(bars.values()), color=[ORANGE, BLUE, BLUE], height=0.6)
    axes.bar_label(drawn, [f"{value:.1%}" for value in bars.values()], padding=3, fontsize=8)
    axes.set(xlabel=words("figure.accuracy"), xlim=(0, 1.12), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter("{x:.0%}")
    return figure


@styled
def draw_reliability(bins: Sequence[tuple[float, float, int]], words: Words) -> Figure:
    """How often the model is right (y) when it is so sure (x): `bins` of (confidence, accuracy, images).

    The whiskers are 95% Wilson intervals over the images of a bin.
    """
    figure = Figure(figsize=(4.2, 3.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    confidence, accuracy, count = (np.array(column) for column in zip(*bins, strict=True))
    ends = np.array([wilson_interval(round(a * n), n) for _, a, n in bins]).T
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    upper.vlines(confidence, *ends, color=BLUE, linewidth=1.2, clip_on=False)
    upper.plot(confidence, accuracy, "o", color=BLUE, markersize=4.5, clip_on=False)
    upper.set(ylabel=words("figure.right"), ylim=(0, 1), xlim=(0, 1))
    lower.bar(confidence, count, width=0.03, color=BLUE)
    lower.set(xlabel=words("figure.sure"), ylabel=words("figure.images"))
    for axis in (upper.yaxis, lower.xaxis):
        axis.set_major_formatter("{x:.0%}")
    return figure
