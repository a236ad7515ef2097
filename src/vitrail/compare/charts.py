"""A comparison as a picture: accuracy with its intervals, a line for each arm."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitrail.compare.questions import get_question
from vitrail.compare.statistics import Interval, PowerLaw
from vitrail.compare.summary import label
from vitrail.figures import BLUE, GREEN, MUTED, ORANGE, styled

COLOURS = {
    "vit": BLUE,
    "vit-label-query": GREEN,
    "vit-conv-stem": MUTED,
    "vit-plain": GREEN,
    "vit-scratch": GREEN,
    "resnet": ORANGE,
    "resnet-scratch": MUTED,
}
MARKERS = {"": "o", "equal epochs": "o", "equal compute": "s"}
AXES = {"seconds": "seconds of training", "pflop": "PFLOP of training"}


@styled
def draw_results(results: Mapping[str, Any]) -> Figure:
    """The question's picture from what `results.json` holds: one panel, or two where there are two measures of cost."""
    name, summary = results["question"], results["summary"]
    panels = {"data": ["x"], "regularisation": ["x"], "transfer": ["seconds", "pflop"], "scale": ["pflop", "cost"]}[
        name
    ]
    figure = Figure(figsize=(5.6 * len(panels), 3.8), dpi=120, layout="constrained")
    figure.suptitle(get_question(name).title, fontsize=9)
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        if panel == "cost":
            _draw_cost(axes, summary["cost"])
            continue
        _draw_means(axes, summary["means"], panel)
        _draw_fits(axes, summary.get("fits", []), summary["means"])
        _label_x(axes, name, panel, summary["means"])
        axes.set_ylabel("test accuracy, 95% interval over seeds")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_means(axes: Axes, means: Sequence[Mapping[str, Any]], key: str) -> None:
    for regime, arm in dict.fromkeys((mean["regime"], mean["arm"]) for mean in means):
        rows = [mean for mean in means if (mean["regime"], mean["arm"]) == (regime, arm)]
        y = np.array([row["test_accuracy"] for row in rows])
        ends = [[row["low"] for row in rows], [row["high"] for row in rows]]
        spread = None if None in ends[0] else np.abs(np.array(ends) - y)
        name = label(arm) + (f", {regime}" if regime else "")
        axes.errorbar(
            [row[key] for row in rows],
            y,
            spread,
            color=COLOURS[arm],
            marker=MARKERS[regime],
            linestyle="none" if regime else "-",
            markersize=4,
            capsize=3,
            linewidth=1.4,
            label=name,
        )


def _label_x(axes: Axes, name: str, key: str, means: Sequence[Mapping[str, Any]]) -> None:
    axes.set_xlabel(AXES.get(key) or get_question(name).x_label)
    if name == "regularisation":
        return
    axes.set_xscale("log")
    if key == "x":
        ticks = sorted({mean["x"] for mean in means})
        axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axes.minorticks_off()


def _draw_fits(axes: Axes, fits: Sequence[Mapping[str, Any]], means: Sequence[Mapping[str, Any]]) -> None:
    """The fitted power laws of the error, over the operations that were fitted."""
    for fit in fits:
        law = PowerLaw(fit["factor"], Interval(**fit["exponent"]))
        places = [mean["pflop"] for mean in means if mean["arm"] == fit["arm"] and mean["regime"] == "equal epochs"]
        x = np.geomspace(min(places), max(places), 50)
        axes.plot(x, [1 - law.at(place) for place in x], color=COLOURS[fit["arm"]], linewidth=1, linestyle=(0, (4, 2)))


def _draw_cost(axes: Axes, cost: Sequence[Mapping[str, Any]]) -> None:
    """Seconds of a step over its counted operations, each varied thing a line, its values beside the points."""
    for varied, colour in (("patches", BLUE), ("width", ORANGE)):
        rows = [row for row in cost if row["varies"] == varied]
        axes.loglog(
            [row["gflop"] for row in rows],
            [row["step_s"] for row in rows],
            "o-",
            color=colour,
            markersize=4,
            label=varied,
        )
        for row in rows:
            axes.annotate(
                str(row[varied]), (row["gflop"], row["step_s"]), (4, -9), textcoords="offset points", fontsize=7
            )
    axes.set(xlabel="GFLOP of a training step, counted", ylabel="seconds of a step, measured")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
