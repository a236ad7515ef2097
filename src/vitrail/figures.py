"""How results look: every function takes numbers and words, and gives a matplotlib figure.

Heat is drawn by patch, unsmoothed, in colours whose lightness alone tells the order, so that they also
read in grey. Lines carry their names beside them. `to_svg` makes the colours follow the page's own theme.
"""

import dataclasses
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from vitrail.anatomy import AttentionReach, PatchFilters
from vitrail.errors import VitrailError
from vitrail.explain import ExplainedPicture
from vitrail.metrics import wilson_interval
from vitrail.trust import Sensitivity, Trust
from vitrail.words import Words

P = ParamSpec("P")
Array = npt.NDArray[Any]

INK, MUTED, BLUE, ORANGE, GREEN = "#24292f", "#6a737d", "#0a5fb4", "#b35300", "#1a7f37"
THEME = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
}
METHOD_COLOURS = {"attention": BLUE, "rollout": ORANGE, "relevance": GREEN, "random": MUTED}
HEAT = "magma"
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8, "image.interpolation": "none",
    "svg.fonttype": "none", "svg.hashsalt": "vitrail", "axes.unicode_minus": False,
}  # fmt: skip
# Whichever of these is installed writes class names that DejaVu has no letters for.
CJK_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Apple SD Gothic Neo", "Malgun Gothic")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        installed = {font.name for font in font_manager.fontManager.ttflist}
        family = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
        with mpl.rc_context({**STYLE, "font.family": family}):
            return draw(*args, **kwargs)

    return styled


def to_svg(figure: Figure) -> str:
    """A figure as an SVG element for a page: its text is text, its colours are the page's, no size of its own."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the letters
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|PathCollection|FillBetween)[^"]*"', "", svg
    )
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, name in THEME.items():
        svg = svg.replace(colour, name)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def to_picture(pixels: Tensor) -> Array:
    """uint8 [C, S, S] as RGB uint8 [S, S, 3]."""
    rgb = pixels.numpy().transpose(1, 2, 0)
    return rgb if rgb.shape[2] == 3 else np.repeat(rgb[..., :1], 3, axis=2)


def overlay(pixels: Tensor, weights: Tensor) -> Array:
    """A map [G, G] laid over a picture uint8 [C, S, S], the map's largest weight the brightest: RGB 0..1 [S, S, 3]."""
    grey = to_picture(pixels).mean(2, keepdims=True) / 255
    share = (weights / weights.max().clamp_min(1e-12)).numpy()
    heat = mpl.colormaps[HEAT](np.kron(share, np.ones([pixels.shape[-1] // len(weights)] * 2)))[..., :3]
    return 0.35 * grey + 0.65 * heat


def mosaic(tiles: Sequence[Sequence[Array]], gap: int = 1) -> Array:
    """Rows of tiles [S, S] or [S, S, 3] as one picture, RGBA 0..1 or NaN between: one image draws fast."""
    size, channels = tiles[0][0].shape[0], tiles[0][0].shape[2:]
    step = size + gap
    shape = (len(tiles) * step - gap, len(tiles[0]) * step - gap)
    whole = np.full((*shape, 4), 0.0) if channels else np.full(shape, np.nan)
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            place = slice(i * step, i * step + size), slice(j * step, j * step + size)
            whole[place] = np.concatenate([tile, np.ones((size, size, 1))], axis=2) if channels else tile
    return whole


def cut(pixels: Tensor, patch_size: int) -> Array:
    """A picture uint8 [C, S, S] pulled apart into its patches, the gaps transparent: RGBA 0..1."""
    side, picture = pixels.shape[-1] // patch_size, to_picture(pixels) / 255
    rows = [np.split(row, side, axis=1) for row in np.split(picture, side)]
    return mosaic([[np.kron(tile, np.ones((4, 4, 1))) for tile in row] for row in rows], gap=3)


def _show(axes: Axes, image: Array, title: str = "", **options: Any) -> Any:
    axes.set_axis_off()
    axes.set_title(title)
    return axes.imshow(image, **options)


def _show_heads(axes: Axes, tiles: Sequence[Sequence[Array]], words: Words, **options: Any) -> Any:
    """A tile per block (row, the first on top) and head (column), numbered from 1."""
    size = len(tiles[0][0])
    gap = max(1, size // 12)
    image = axes.imshow(mosaic(tiles, gap), **options)
    for set_ticks, count in ((axes.set_xticks, len(tiles[0])), (axes.set_yticks, len(tiles))):
        set_ticks([(size + gap) * i + (size - 1) / 2 for i in range(count)], [str(i + 1) for i in range(count)])
    axes.set(xlabel=words("figure.head"), ylabel=words("figure.block"))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


@_styled
def draw_explanation(found: ExplainedPicture, words: Words) -> Figure:
    """The picture, its map by each method, and below them every head of every block."""
    explanation, label = found.explanation, found.classes[int(found.explanation.labels[0])]
    num_blocks, _, num_heads = explanation.attention.shape[:3]
    tall = min(14.0, 7.0 * num_blocks / num_heads)
    figure = Figure(figsize=(7.6, 2.2 + tall), dpi=130, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(2.2, tall))
    top, bottom = parts
    panels = top.subplots(1, 1 + len(explanation.maps))
    _show(panels[0], to_picture(found.pixels), top_guess(found, words))
    for axes, (method, maps) in zip(panels[1:], explanation.maps.items(), strict=True):
        _show(axes, overlay(found.pixels, maps[0]), words(f"maps.{method}", label=label))
    _show_heads(bottom.subplots(), head_tiles(found), words)
    return figure


@_styled
def draw_map(found: ExplainedPicture, weights: Tensor, title: str, words: Words) -> Figure:
    """The picture beside one map [G, G] of it."""
    figure = Figure(figsize=(6.4, 3.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    _show(left, to_picture(found.pixels), top_guess(found, words))
    _show(right, overlay(found.pixels, weights), title)
    return figure


@_styled
def draw_methods(found: ExplainedPicture, words: Words) -> Figure:
    """One picture and its map by each method, two by two."""
    figure = Figure(figsize=(4.2, 4.6), layout="constrained")
    first, *others = figure.subplots(2, 2).flat
    _show(first, to_picture(found.pixels), top_guess(found, words))
    for axes, (method, maps) in zip(others, found.explanation.maps.items(), strict=True):
        title = words(f"maps.{method}", label=found.classes[int(found.explanation.labels[0])])
        _show(axes, overlay(found.pixels, maps[0]), title)
    return figure


@_styled
def draw_heads(found: ExplainedPicture, words: Words) -> Figure:
    """Every head of every block over one picture."""
    num_blocks, _, num_heads = found.explanation.attention.shape[:3]
    figure = Figure(figsize=(5.2, 0.5 + 4.8 * num_blocks / num_heads), dpi=130, layout="constrained")
    _show_heads(figure.subplots(), head_tiles(found), words)
    return figure


def head_tiles(found: ExplainedPicture) -> list[list[Array]]:
    """Each head's look over the picture, [L][H]."""
    return [[overlay(found.pixels, weights) for weights in block[0]] for block in found.explanation.attention]


def top_guess(found: ExplainedPicture, words: Words) -> str:
    """The likeliest class and its probability."""
    probability, best = found.explanation.logits[0].softmax(0).max(0)
    return words("maps.guess", label=found.classes[int(best)], probability=probability.item())


@_styled
def draw_filters(filters: PatchFilters) -> Figure:
    """The principal components as tiles, each on its own scale, seven to a row."""
    tiles = [to_unit(component) for component in filters.components.numpy().transpose(0, 2, 3, 1)]
    columns = min(7, len(tiles))
    tiles += [np.ones_like(tiles[0])] * (-len(tiles) % columns)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    figure = Figure(figsize=(4.2, 4.2 * len(rows) / columns), layout="constrained")
    _show(figure.subplots(), mosaic(rows))
    return figure


def to_unit(values: Array) -> Array:
    """A filter [P, P, C] around zero as RGB 0..1, zero at middle grey."""
    scaled = 0.5 + 0.42 * values / np.abs(values).max()  # no tile melts into a white or a black page
    return scaled if scaled.shape[2] == 3 else np.repeat(scaled[..., :1], 3, axis=2)


@_styled
def draw_similarity(similarity: Tensor, words: Words) -> Figure:
    """A grid of grids: at each patch's place, its cosine to all patches."""
    side = len(similarity)
    figure = Figure(figsize=(4.2, 3.3), layout="constrained")
    axes = figure.subplots()
    image = _show(axes, mosaic([[similarity[i, j].numpy() for j in range(side)] for i in range(side)]), vmin=-1, vmax=1)
    figure.colorbar(image, label=words("figure.cosine"), shrink=0.95)
    return figure


@_styled
def draw_bias(tables: Tensor, words: Words) -> Figure:
    """The relative position bias of each head by offset; the patch that looks is in the middle."""
    num_blocks, num_heads = tables.shape[:2]
    figure = Figure(figsize=(4.8, 0.6 + 4.0 * num_blocks / num_heads), layout="constrained")
    axes, largest = figure.subplots(), tables.abs().max().item() or 1.0
    tiles = [[table.numpy() for table in block] for block in tables]
    image = _show_heads(axes, tiles, words, cmap="cividis", vmin=-largest, vmax=largest)
    figure.colorbar(image, label=words("figure.bias"), shrink=0.8)
    return figure


@_styled
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


@_styled
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


@_styled
def draw_sensitivity(found: Sensitivity, words: Words) -> Figure:
    """Accuracy on whole pictures, after a move by a pixel, and with the patches shuffled, as bars with their numbers."""
    bars = {"shuffled": found.shuffled, "moved": found.moved, "whole": found.accuracy}
    figure = Figure(figsize=(4.2, 1.7), layout="constrained")
    axes = figure.subplots()
    names = [words(f"figure.{name}") for name in bars]
    drawn = axes.barh(names, list(bars.values()), color=[ORANGE, BLUE, BLUE], height=0.6)
    axes.bar_label(drawn, [f"{value:.1%}" for value in bars.values()], padding=3, fontsize=8)
    axes.set(xlabel=words("figure.accuracy"), xlim=(0, 1.12), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter("{x:.0%}")
    return figure


@_styled
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


def save_figure(figure: Figure, path: Path, numbers: Any) -> Path:
    """Write a figure, and the numbers behind it beside it as JSON; returns the JSON's path.

    Raises:
        VitrailError: if the folder cannot be written, or the ending is not that of a picture.
    """
    beside = path.with_suffix(".json")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise VitrailError(f"--out is {path}; give a picture's name ending in .png, .svg or .pdf")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"svg.fonttype": "none"}):
            figure.savefig(path)
        beside.write_text(json.dumps(to_values(numbers)))
    except OSError as error:
        raise VitrailError(f"cannot write {path}: {error.strerror}; give another --out") from error
    return beside


def to_values(numbers: Any) -> Any:
    """Results as plain JSON values: dataclasses as objects, tensors as lists, floats to six digits."""
    if isinstance(numbers, Tensor):
        return to_values(numbers.tolist())
    if dataclasses.is_dataclass(numbers):
        return {field.name: to_values(getattr(numbers, field.name)) for field in dataclasses.fields(numbers)}
    if isinstance(numbers, Mapping):
        return {str(key): to_values(value) for key, value in numbers.items()}
    if isinstance(numbers, list | tuple):
        return [to_values(value) for value in numbers]
    if isinstance(numbers, float):
        return float(f"{numbers:.6g}") if math.isfinite(numbers) else None
    return numbers
