"""What a comparison will run: its grid with every config complete, how long it takes and how much it leaves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitrail.compare.measure import Measurements, begin_measurements, measure
from vitrail.compare.questions import ARMS, Cell, get_question, lay_out_grid
from vitrail.config import Budget, RunConfig, to_dict
from vitrail.data import split_records
from vitrail.errors import Listener, VitrailError, ignore_events
from vitrail.run import load_run
from vitrail.schedule import plan_steps

# Configuration, metrics, environment, the evaluation and its picture.
SMALL_FILES_BYTES = 150_000


@dataclass(frozen=True)
class Plan:
    """The cells of a question in the order they run, and the seconds each is expected to take, by its name."""

    question: str
    out: Path
    cells: list[Cell]
    seconds: dict[str, float]
    disk_bytes: int
    measured: Measurements

    def folder(self, cell: Cell) -> Path:
        """The cell's run folder."""
        return _cells_folder(self.out) / cell.name

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell has been trained and has read its test split."""
        return (self.folder(cell) / "evaluation-test.json").exists()

    @property
    def runs(self) -> list[Cell]:
        """The cells, but one that stands for two only once."""
        return list({cell.name: cell for cell in self.cells}.values())

    @property
    def left(self) -> list[Cell]:
        """The runs still to do."""
        return [cell for cell in self.runs if not self.is_finished(cell)]

    def describe(self) -> list[str]:
        """The plan in words: runs, time, disk."""
        runs, left = self.runs, self.left
        lines = [f"{get_question(self.question).title}: {len(runs)} runs, {len(left)} to do"]
        for arm in dict.fromkeys(cell.arm for cell in runs):
            of_arm = [cell for cell in runs if cell.arm == arm]
            steps = _span([Budget.parse(cell.config.budget).amount for cell in of_arm], "{:.0f}")
            seconds = _span([self.seconds[cell.name] for cell in of_arm], "{:.0f}")
            lines.append(f"{ARMS[arm].label}: {len(of_arm)} runs of {steps} steps, {seconds} s each")
        minutes = sum(self.seconds[cell.name] for cell in left) / 60
        lines.append(f"time: {minutes:.1f} min for what is to do, by the speed measured here")
        lines.append(f"disk: {self.disk_bytes / 1e6:.1f} MB in {self.out}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        left = self.left
        return {
            **self.measured.settings,
            "runs": len(self.runs),
            "to_do": [cell.name for cell in left],
            "seconds": sum(self.seconds[cell.name] for cell in left),
            "disk_bytes": self.disk_bytes,
            "budgets": {cell.name: cell.config.budget for cell in self.runs},
        }


def make_plan(
    question: str,
    base: RunConfig,
    out: Path,
    listener: Listener = ignore_events,
    *,
    arms: Sequence[str] = (),
    num_seeds: int = 3,
) -> Plan:
    """Lay out a question's grid, measure what is not measured yet, and check it against what `out` holds already.

    Args:
        base: the recipe, with the data and the budget of one run; its seed is not used.

    Raises:
        VitrailError: for an unknown question or arm, data that will not do (a fraction that leaves a class empty), or
            an `out` that was begun with other settings.
    """
    get_question(question)
    settings = {"question": question, "data": base.data, "preset": base.preset, "budget": base.budget}
    splits = split_records(base.data, base.input, 0)
    measured = begin_measurements(out, settings, base)
    base = replace(base, **measured.machine)
    cells = lay_out_grid(question, base, arms, num_seeds, splits["train"].class_names)
    for config in {cell.config.input: cell.config for cell in cells}.values():
        split_records(config.data, config.input, 0)
    configs = [config for cell in cells for config in (cell.config, cell.paid_as) if config]
    measured = measure(measured, base, configs, listener)
    measured.save(out)
    sizes = {split: len(records.labels) for split, records in splits.items()}
    cells = [_complete(cell, measured, sizes["train"], len(splits["train"].class_names), out) for cell in cells]
    _check_begun(cells, out)
    speeds = {cell.name: measured.speed_of(cell.config) for cell in cells}
    spare = max(speed.checkpoint_bytes for speed in speeds.values()) * 3  # two are kept while a third is written
    return Plan(
        question=question,
        out=out,
        cells=cells,
        seconds={cell.name: _expect_seconds(cell, measured, sizes) for cell in cells},
        disk_bytes=spare + sum(speed.model_bytes + SMALL_FILES_BYTES for speed in speeds.values()),
        measured=measured,
    )


def _complete(cell: Cell, measured: Measurements, num_train: int, num_classes: int, out: Path) -> Cell:
    """The cell with its length in steps, and with the folder whose weights it begins with."""
    config, payer = cell.config, measured.speed_of(cell.paid_as or cell.config)
    budget = Budget.parse(config.budget)
    budget = replace(budget, amount=cell.share * budget.amount)
    num_images = num_train * (len(config.input.classes) or num_classes) / num_classes
    if budget.unit == "epochs":
        num_images *= config.input.train_fraction
    num_steps = plan_steps(budget, round(num_images), config.optim.batch_size, payer.step_s, payer.val_s)
    if cell.regime == "equal compute":
        num_steps = max(1, round(num_steps * payer.step_flops / measured.speed_of(config).step_flops))
    begins_with = {"init_from": str(_cells_folder(out) / cell.begins_with)} if cell.begins_with else {}
    return replace(cell, config=replace(config, budget=f"{num_steps}steps", **begins_with))


def _expect_seconds(cell: Cell, measured: Measurements, sizes: dict[str, int]) -> float:
    """Training with its looks at val, the images read, and the test split at the pace of val."""
    speed, num_steps = measured.speed_of(cell.config), Budget.parse(cell.config.budget).amount
    num_vals = num_steps * cell.config.optim.batch_size / sizes["train"] + 1
    evaluating = (num_vals + sizes["test"] / sizes["val"]) * speed.val_s
    reading = measured.read_s * (1 + sizes["test"] / (sizes["train"] + sizes["val"]))
    return num_steps * speed.step_s + evaluating + reading


def _check_begun(cells: Sequence[Cell], out: Path) -> None:
    """Raise VitrailError, with both sides, where a run folder holds another run than the one asked for."""
    for cell in cells:
        folder = _cells_folder(out) / cell.name
        if not (folder / "config.json").exists():
            continue
        begun, asked = (_flatten(to_dict(config)) for config in (load_run(folder).config.asked(), cell.config))
        for name, value in asked.items():
            if begun[name] != value:
                raise VitrailError(
                    f"{folder} was begun with {name} {begun[name]}, now it would be {value}; "
                    "give another --out, or ask for the same again"
                )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _span(values: Sequence[float], form: str) -> str:
    ends = [form.format(end) for end in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


def _cells_folder(out: Path) -> Path:
    return out / "cells"
