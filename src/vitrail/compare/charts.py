"""A comparison as a picture: accuracy with its intervals, a line for each arm."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from vitrail.compare.questions import get_question
from vitrail.compare.statistics import Interval, PowerLaw
from vitrail.compare.summary import EPOCHS, label
from vitrail.figures import BLUE, GREEN, MUTED, ORANGE, styled

Row = Mapping[str, Any]
COLOURS = {
    "vit": BLUE,
    "vit-label-query": GREEN,
    "vit-conv-stem": MUTED,
    "vit-plain": GREEN,
    "vit-scratch": GREEN,
    "resnet": ORANGE,
    "resnet-scratch": MUTED,
}
COST = "cost"
PANELS = {
    "data": [("", "x")],
    "regularisation": [("", "x")],
    "transfer": [("", "seconds"), ("", "pflop")],
    "scale": [(EPOCHS, "pflop"), ("equal compute", "x"), ("", COST)],
}
"""For each question, which runs a panel shows and what lies along its x."""
X_LABELS = {"seconds": "seconds of training", "pflop": "PFLOP of training"}


@styled
def draw_results(results: Mapping[str, Any]) -> Figure:
    """The question's picture from what `results.json` holds."""
    question, summary, panels = get_question(results["question"]), results["summary"], PANELS[results["question"]]
    figure = Figure(figsize=(5.2 * len(panels), 4.2), dpi=120, layout="constrained")
    figure.suptitle(question.title)
    for axes, (regime, key) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        axes.grid(alpha=0.25)
        if key == COST:
            _draw_cost(axes, summary["cost"])
        else:
            means = [mean for mean in summary["means"] if mean["regime"] == regime]
            _draw_means(axes, means, key)
            axes.set(title=regime, xlabel=X_LABELS.get(key, question.x_label), ylabel="test accuracy, 95% intervals")
            axes.yaxis.set_major_formatter(_say_percent)
            if results["question"] != "regularisation":
                axes.set_xscale("log")
                places = sorted({mean["x"] for mean in means}) if key == "x" else None
                _rule(axes.xaxis, places, "{x:.0%}" if results["question"] == "data" else "{x:g}")
            if regime == EPOCHS:
                _draw_fits(axes, summary["fits"], means)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def _say_percent(share: float, _: int | None) -> str:
    return f"{100 * share:.4g}%"


def _draw_means(axes: Axes, means: Sequence[Row], key: str) -> None:
    for arm in dict.fromkeys(mean["arm"] for mean in means):
        rows = [mean for mean in means if mean["arm"] == arm]
        y = np.array([row["test_accuracy"] for row in rows])
        ends = [[row[end] for row in rows] for end in ("low", "high")]
        spread = None if None in ends[0] else np.abs(np.array(ends) - y)
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.4, "color": COLOURS[arm]}
        axes.errorbar([row[key] for row in rows], y, spread, label=label(arm), **style)


def _draw_fits(axes: Axes, fits: Sequence[Row], means: Sequence[Row]) -> None:
    """The fitted power laws of the error, over the operations that were fitted."""
    for fit in fits:
        law = PowerLaw(fit["factor"], Interval(**fit["exponent"]))
        places = [mean["pflop"] for mean in means if mean["arm"] == fit["arm"]]
        x = np.geomspace(min(places), max(places), 50)
        style: dict[str, Any] = {"color": COLOURS[fit["arm"]], "linewidth": 1, "linestyle": (0, (4, 2))}
        axes.plot(x, [1 - law.at(place) for place in x], label=f"{label(fit['arm'])}, fitted", **style)


def _draw_cost(axes: Axes, cost: Sequence[Row]) -> None:
    """Seconds of a step over its counted operations, a line for each thing that is varied, its values at the points."""
    for varied, colour in (("patches", BLUE), ("width", ORANGE)):
        rows = [row for row in cost if row["varies"] == varied]
        x, y = ([row[key] for row in rows] for key in ("gflop", "step_s"))
        axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.4, label=varied)
        for row in rows:
            place = (row["gflop"], row["step_s"])
            axes.annotate(str(row[varied]), place, (4, -9), textcoords="offset points", fontsize=7)
    axes.set(title="cost of a ViT's step", xlabel="GFLOP, counted", ylabel="seconds, measured")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        _rule(axis)


def _rule(axis: Axis, places: Sequence[float] | None = None, form: str = "{x:g}") -> None:
    """Mark a logarithmic axis at these places, or else as a ruler is."""
    axis.set_major_locator(FixedLocator(places) if places else LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(form)
