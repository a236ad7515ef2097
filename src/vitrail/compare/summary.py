"""What follows from the finished cells: means, paired differences, and each question's own figure, in sentences too."""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vitrail.compare.questions import ARMS, Question, get_question
from vitrail.compare.statistics import (
    estimate_mean,
    find_cost,
    find_crossings,
    fit_power_law,
    pair,
    say_difference,
)

Row = Mapping[str, Any]
EPOCHS = "equal epochs"
UNITS = {"seconds": "seconds", "pflop": "PFLOP"}


def summarise(name: str, cells: Sequence[Row], cost: Sequence[Row]) -> dict[str, Any]:
    """All that is told of a question's finished cells, as plain values. Accuracies are shares, differences points."""
    question = get_question(name)
    trained = [cell for cell in cells if cell["kind"] == "training"]
    means = list(_average(trained))
    differences = list(_subtract(question, trained))
    own = {"data": _cross, "regularisation": _gain, "transfer": _weigh, "scale": _fit}[name](question, trained, means)
    if cost:
        own["cost"] = list(cost)
        own["sentences"] += [_say_cost(cost, varied) for varied in ("patches", "width")]
    sentences = [difference["sentence"] for difference in differences] + own.pop("sentences")
    return {"means": means, "differences": differences, **own, "sentences": sentences}


def label(arm: str) -> str:
    """What an arm is called."""
    return ARMS[arm].label


def say_place(question: Question, x: Any, regime: str) -> str:
    """Where in the grid: a value of x, and how long the runs were where a question has two ways."""
    return question.x_words.format(x) + (f", {regime}" if regime else "")


def _average(cells: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """The mean of every arm at every place, with the seeds' interval."""
    for regime, x in _places(cells):
        for arm in _arms(cells):
            if chosen := _select(cells, regime=regime, x=x, arm=arm):
                accuracy = estimate_mean([cell["test_accuracy"] for cell in chosen])
                yield {
                    "regime": regime,
                    "x": x,
                    "arm": arm,
                    "seeds": accuracy.count,
                    "test_accuracy": accuracy.mean,
                    "low": accuracy.low,
                    "high": accuracy.high,
                    "seconds": statistics.mean(cell["seconds"] for cell in chosen),
                    "pflop": statistics.mean(cell["pflop"] for cell in chosen),
                }


def _subtract(question: Question, cells: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """The paired difference of every pair of arms at every place."""
    for a, b in question.pairs:
        for regime, x in _places(cells):
            found = pair(*(_points(cells, regime=regime, x=x, arm=arm) for arm in (a, b)))
            if found is not None:
                place = say_place(question, x, regime)
                sentence = say_difference(f"{label(a)} − {label(b)} at {place}", found)
                yield {"arm": a, "against": b, "regime": regime, "x": x, **asdict(found), "sentence": sentence}


def _cross(question: Question, cells: Sequence[Row], means: Sequence[Row]) -> dict[str, Any]:
    """Where the mean curves of two arms cross, or how far they stay apart."""
    found: list[dict[str, Any]] = []
    for a, b in question.pairs:
        curves = [{mean["x"]: 100 * mean["test_accuracy"] for mean in _select(means, arm=arm)} for arm in (a, b)]
        xs = sorted(curves[0].keys() & curves[1].keys())
        if len(xs) < 2:
            continue
        ys = [[curve[x] for x in xs] for curve in curves]
        gaps = [p - q for p, q in zip(*ys, strict=True)]
        places = find_crossings(xs, *ys)
        if places:
            where = " and ".join(map(question.x_words.format, places))
            sentence = f"the mean curves of {label(a)} and {label(b)} cross at {where}"
        else:
            side = "above" if sum(gaps) > 0 else "below"
            near, far = (pick(map(abs, gaps)) for pick in (min, max))
            sentence = f"{label(a)} stays {side} {label(b)}, by {near:.1f} to {far:.1f} points in the mean; no crossing"
        pairs = (pair(*(_points(cells, arm=arm, x=x) for arm in (a, b))) for x in xs)
        if not any(gap is None or gap.low is None or gap.sees_difference for gap in pairs):
            sentence += ", though no difference is seen anywhere"
        found.append({"arm": a, "against": b, "at": places, "gaps": gaps, "sentence": sentence})
    growths = list(_grow(question, cells))
    return {"crossings": found, "growths": growths, "sentences": [row["sentence"] for row in found + growths]}


def _grow(question: Question, cells: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """By how much the first arm of a pair gains on the second from the least data to the most, seed by seed."""
    for a, b in question.pairs:
        xs = sorted({cell["x"] for cell in _select(cells, arm=a)} & {cell["x"] for cell in _select(cells, arm=b)})
        if len(xs) < 2:
            continue
        least, most = ([_points(cells, arm=arm, x=x) for arm in (a, b)] for x in (xs[0], xs[-1]))
        growth = pair(
            *({seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs} for ours, theirs in (most, least))
        )
        if growth is not None:
            span = " to ".join(map(question.x_words.format, (xs[0], xs[-1])))
            sentence = say_difference(f"{label(a)} gains on {label(b)} from {span}", growth)
            yield {"arm": a, "against": b, **asdict(growth), "sentence": sentence}


def _gain(question: Question, cells: Sequence[Row], means: Sequence[Row]) -> dict[str, Any]:
    """What regularisation brings each arm over none."""
    found: list[dict[str, Any]] = []
    for arm, level in itertools.product(_arms(cells), ("light", "strong")):
        gain = pair(*(_points(cells, arm=arm, x=x) for x in (level, "none")))
        if gain is not None:
            sentence = say_difference(f"{label(arm)}: {level} − no regularisation", gain)
            found.append({"arm": arm, "x": level, **asdict(gain), "sentence": sentence})
    return {"gains": found, "sentences": [gain["sentence"] for gain in found]}


def _weigh(question: Question, cells: Sequence[Row], means: Sequence[Row]) -> dict[str, Any]:
    """How many times the cost of the second arm the first one needs for an accuracy that both reach, seed by seed."""
    found: list[dict[str, Any]] = []
    for (a, b), unit in ((names, unit) for names in question.pairs for unit in UNITS):
        curves = [_curves(cells, arm, unit) for arm in (a, b)]
        costs: list[dict[int, float]] = [{}, {}]
        for seed in curves[0].keys() & curves[1].keys():
            reached = min(max(accuracy for _, accuracy in curve[seed]) for curve in curves)
            for cost, curve in zip(costs, curves, strict=True):
                cost[seed] = math.log(find_cost(reached, curve[seed]))
        difference = pair(*costs)
        if difference is None:
            continue
        ratio = difference.map(math.exp)
        what = f"{label(a)} over {label(b)}, fine-tuning {UNITS[unit]} for an accuracy that both reach"
        seen = ratio.low is None or difference.sees_difference
        sentence = f"{what}: {ratio.show('.2f')} times" + ("" if seen else ", no difference seen")
        found.append({"arm": a, "against": b, "unit": unit, **asdict(ratio), "sentence": sentence})
    return {"cost_ratios": found, "sentences": [ratio["sentence"] for ratio in found]}


def _fit(question: Question, cells: Sequence[Row], means: Sequence[Row]) -> dict[str, Any]:
    """Error over training operations at equal epochs as a power law, for each arm."""
    found: list[dict[str, Any]] = []
    for arm in _arms(cells):
        chosen = _select(cells, arm=arm, regime=EPOCHS)
        fit = fit_power_law([cell["pflop"] for cell in chosen], [1 - cell["test_accuracy"] for cell in chosen])
        if fit is not None:
            exponent = fit.exponent.show(".3f")
            sentence = f"{label(arm)}: error = {fit.factor:.3g} · PFLOP^−b at equal epochs, b = {exponent}"
            found.append({"arm": arm, "factor": fit.factor, "exponent": asdict(fit.exponent), "sentence": sentence})
    return {"fits": found, "sentences": [fit["sentence"] for fit in found]}


def _say_cost(cost: Sequence[Row], varied: str) -> str:
    rows = [row for row in cost if row["varies"] == varied]
    first, last = rows[0], rows[-1]
    times, counted = last["step_s"] / first["step_s"], last["gflop"] / first["gflop"]
    return (
        f"a ViT's step from {first[varied]} to {last[varied]} {varied if varied == 'patches' else 'wide'}: "
        f"{counted:.1f} times the operations by the count, {times:.1f} times the seconds measured"
    )


def _select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _points(cells: Sequence[Row], **wanted: Any) -> dict[int, float]:
    """Accuracy in points by seed."""
    return {cell["seed"]: 100 * cell["test_accuracy"] for cell in _select(cells, **wanted)}


def _curves(cells: Sequence[Row], arm: str, unit: str) -> dict[int, list[tuple[float, float]]]:
    """By seed, the (cost, accuracy) of an arm's cells."""
    curves: dict[int, list[tuple[float, float]]] = {}
    for cell in _select(cells, arm=arm):
        curves.setdefault(cell["seed"], []).append((cell[unit], cell["test_accuracy"]))
    return curves


def _places(cells: Sequence[Row]) -> list[tuple[str, Any]]:
    """Every (regime, x), in order of appearance, the regimes one after the other."""
    return sorted(dict.fromkeys((cell["regime"], cell["x"]) for cell in cells), key=lambda place: place[0] != EPOCHS)


def _arms(cells: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(cell["arm"] for cell in cells))
