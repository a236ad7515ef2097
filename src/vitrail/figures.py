"""How maps look, and what all figures share: style, the page's colours, files.

Heat is drawn by patch, unsmoothed, in colours whose lightness alone tells the order, so that they also
read in grey. `to_svg` makes the colours follow the page's own theme.
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

from vitrail.errors import VitrailError
from vitrail.explain import METHODS, ExplainedPicture, Method
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
HEAT = "magma"
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8, "image.interpolation": "none",
    "svg.fonttype": "none", "svg.hashsalt": "vitrail", "axes.unicode_minus": False,
    "text.parse_math": False,  # a class called $x$ is called so
}  # fmt: skip
# Whichever of these is installed writes class names that DejaVu has no letters for.
CJK_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Apple SD Gothic Neo", "Malgun Gothic")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the house style, with fonts that have letters for every class name."""

    @wraps(draw)
    def draw_styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        installed = {font.name for font in font_manager.fontManager.ttflist}
        family = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
        with mpl.rc_context({**STYLE, "font.family": family}):
            return draw(*args, **kwargs)

    return draw_styled


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


def show(axes: Axes, image: Array, title: str = "", **options: Any) -> Any:
    """An image under its title, with no axes; returns what a colour bar wants."""
    axes.set_axis_off()
    axes.set_title(title)
    return axes.imshow(image, **options)


def show_heads(axes: Axes, tiles: Sequence[Sequence[Array]], words: Words, **options: Any) -> Any:
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


@styled
def draw_explanation(found: ExplainedPicture, words: Words) -> Figure:
    """The picture, its map by each method, and below them every head of every block."""
    num_blocks, _, num_heads = found.explanation.attention.shape[:3]
    tall = min(14.0, 7.0 * num_blocks / num_heads)
    shown = map_tiles(found, words)
    rows, columns = (1, 4) if len(shown) == 4 else (2, 3)
    high = 2.2 if rows == 1 else 5.2
    figure = Figure(figsize=(7.6, high + tall), dpi=130, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(high, tall))
    top, bottom = parts
    for axes, (picture, title) in zip(top.subplots(rows, columns).flat, shown, strict=True):
        show(axes, picture, title)
    show_heads(bottom.subplots(), head_tiles(found), words)
    return figure


@styled
def draw_map(found: ExplainedPicture, weights: Tensor, title: str, words: Words) -> Figure:
    """The picture beside one map [G, G] of it."""
    figure = Figure(figsize=(6.4, 3.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    show(left, to_picture(found.pixels), top_guess(found, words))
    show(right, overlay(found.pixels, weights), title)
    return figure


@styled
def draw_methods(found: ExplainedPicture, words: Words) -> Figure:
    """One picture and its map by each method, two by two, or by threes."""
    shown = map_tiles(found, words)
    columns = len(shown) // 2
    figure = Figure(figsize=(2.1 * columns, 4.6), layout="constrained")
    for axes, (picture, title) in zip(figure.subplots(2, columns).flat, shown, strict=True):
        show(axes, picture, title)
    return figure


@styled
def draw_heads(found: ExplainedPicture, words: Words) -> Figure:
    """Every head of every block over one picture."""
    num_blocks, _, num_heads = found.explanation.attention.shape[:3]
    figure = Figure(figsize=(5.2, 0.5 + 4.8 * num_blocks / num_heads), dpi=130, layout="constrained")
    show_heads(figure.subplots(), head_tiles(found), words)
    return figure


def map_tiles(found: ExplainedPicture, words: Words) -> list[tuple[Array, str]]:
    """The picture and its map by each method, with titles: four, or six with the evidence for two labels."""
    explanation = found.explanation
    label, rival = explanation.rivals()
    tiles = [(to_picture(found.pixels), top_guess(found, words))]
    if explanation.evidence is not None:
        for k in (label, rival):
            tiles.append((overlay(found.pixels, explanation.evidence[0, k]), map_title(found, "evidence", k, words)))
    for method in METHODS:
        tiles.append((overlay(found.pixels, explanation.maps[method][0]), map_title(found, method, label, words)))
    return tiles


def map_title(found: ExplainedPicture, method: Method, label: int, words: Words) -> str:
    """What a map is called, with the class it speaks for and the probability that the model gives it."""
    probability = found.explanation.logits[0].softmax(0)[label].item()
    return words(f"maps.{method}", label=found.classes[label], probability=probability)


def head_tiles(found: ExplainedPicture) -> list[list[Array]]:
    """Each head's look over the picture, [L][H]."""
    return [[overlay(found.pixels, weights) for weights in block[0]] for block in found.explanation.attention]


def top_guess(found: ExplainedPicture, words: Words) -> str:
    """The likeliest class and its probability."""
    probability, best = found.explanation.logits[0].softmax(0).max(0)
    return words("maps.guess", label=found.classes[int(best)], probability=probability.item())


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
