"""What a comparison will run: its grid with every config complete, how long it takes and how much it leaves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitrail.compare.measure import Measurements, Speed, begin_measurements, measure
from vitrail.compare.questions import ARMS, Cell, get_question, lay_out_grid
from vitrail.config import ModelConfig, RunConfig
from vitrail.data import split_records
from vitrail.errors import Listener, VitrailError, ignore_events
from vitrail.plain import from_dict, to_dict
from vitrail.run import load_run
from vitrail.schedule import Budget, plan_steps

# Configuration, metrics, environment, the evaluation and its picture.
SMALL_FILES_BYTES = 150_000


@dataclass(frozen=True)
class Plan:
    """The cells of a question in the order they run, with the speed of each by its name.

    `sizes` are the numbers of images of the source's splits.
    """

    question: str
    out: Path
    cells: list[Cell]
    speeds: dict[str, Speed]
    measured: Measurements
    sizes: dict[str, int]

    def folder(self, cell: Cell) -> Path:
        """The cell's run folder."""
        return _cells_folder(self.out) / cell.name

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell has been trained and has read its test split."""
        return (self.folder(cell) / "evaluation-test.json").exists()

    @property
    def left(self) -> list[Cell]:
        """The cells still to do."""
        return [cell for cell in self.cells if not self.is_finished(cell)]

    def expect_seconds(self, cell: Cell) -> float:
        """Training with its looks at val, the images read, and the test split at the pace of val."""
        speed, num_steps = self.speeds[cell.name], Budget.parse(cell.config.budget).amount
        num_vals = num_steps * cell.config.optim.batch_size / self.sizes["train"] + 1
        evaluating = (num_vals + self.sizes["test"] / self.sizes["val"]) * speed.val_s
        reading = self.measured.read_s * sum(self.sizes.values()) / (self.sizes["train"] + self.sizes["val"])
        return num_steps * speed.step_s + evaluating + reading

    @property
    def disk_bytes(self) -> int:
        """What the finished runs leave, and the checkpoints of the one that runs: two, while a third is written."""
        left = sum(speed.model_bytes + SMALL_FILES_BYTES for speed in self.speeds.values())
        return left + 3 * max(speed.checkpoint_bytes for speed in self.speeds.values())

    def describe(self) -> list[str]:
        """The plan in words: runs, time, disk."""
        lines = [f"{get_question(self.question).title}: {len(self.cells)} runs, {len(self.left)} to do"]
        for arm in dict.fromkeys(cell.arm for cell in self.cells):
            of_arm = [cell for cell in self.cells if cell.arm == arm]
            steps = _span([Budget.parse(cell.config.budget).amount for cell in of_arm], "{:.0f}")
            seconds = _span([self.expect_seconds(cell) for cell in of_arm], "{:.0f}")
            lines.append(f"{ARMS[arm].label}: {len(of_arm)} runs of {steps} steps, {seconds} s each")
        minutes = sum(map(self.expect_seconds, self.left)) / 60
        lines.append(f"time: {minutes:.1f} min for what is to do, by the speed measured here")
        lines.append(f"disk: {self.disk_bytes / 1e6:.1f} MB in {self.out}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        left = self.left
        return {
            **self.measured.settings,
            "runs": len(self.cells),
            "to_do": [cell.name for cell in left],
            "seconds": sum(map(self.expect_seconds, left)),
            "disk_bytes": self.disk_bytes,
            "budgets": {cell.name: cell.config.budget for cell in self.cells},
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
    get_question(question, arms)
    settings = {"question": question, "data": base.data, "preset": base.preset, "budget": base.budget}
    splits = split_records(base.data, base.input, 0)
    sizes = {split: len(records.labels) for split, records in splits.items()}
    measured = begin_measurements(out, settings, base)
    base = replace(base, **measured.machine)
    grid = lay_out_grid(question, base, num_seeds, splits["train"].class_names)
    cells = [cell for cell in grid if not arms or cell.arm in arms]
    for config in {cell.config.input: cell.config for cell in cells}.values():
        split_records(config.data, config.input, 0)
    payers = [cell.config for cell in grid if cell.regime and cell.config.seed == 0]
    measured = measure(measured, base, [cell.config for cell in cells] + payers, listener)
    measured.save(out)
    lengths = _Lengths(measured, payers, sizes["train"], len(splits["train"].class_names))
    speeds = {cell.name: measured.speed_of(cell.config) for cell in cells}
    cells = [_complete(cell, lengths.count_steps(cell), speeds[cell.name], out) for cell in cells]
    _check_begun(cells, out)
    return Plan(question, out, cells, speeds, measured, sizes)


@dataclass(frozen=True)
class _Lengths:
    """Turns budgets into steps; `payers` are the configs that decide together where lengths are to be equal."""

    measured: Measurements
    payers: Sequence[RunConfig]
    num_train: int
    num_classes: int

    def count_steps(self, cell: Cell) -> int:
        """The steps of a cell."""
        if not cell.regime:
            return self._buy(cell.config, cell.share)
        num_steps = min(self._buy(payer) for payer in self.payers)
        if cell.regime == "equal epochs":
            return num_steps
        costliest = max(self.measured.speed_of(payer).step_flops for payer in self.payers)
        return max(1, round(num_steps * costliest / self.measured.speed_of(cell.config).step_flops))

    def _buy(self, config: RunConfig, share: float = 1.0) -> int:
        """The steps that a share of the config's budget pays for."""
        budget, speed = Budget.parse(config.budget), self.measured.speed_of(config)
        num_images = self.num_train
        if budget.unit == "epochs":  # else only how often val is looked at matters, which the share does not change
            share_of_classes = (len(config.input.classes) or self.num_classes) / self.num_classes
            num_images = round(num_images * share_of_classes * config.input.train_fraction)
        budget = replace(budget, amount=share * budget.amount)
        return plan_steps(budget, num_images, config.optim.batch_size, speed.step_s, speed.val_s)


def _complete(cell: Cell, num_steps: int, speed: Speed, out: Path) -> Cell:
    """The cell with its length, its model as it was resolved, and the folder whose weights it begins with."""
    begins_with = str(_cells_folder(out) / cell.begins_with) if cell.begins_with else ""
    model = replace(from_dict(ModelConfig, speed.model), match="none")
    return replace(cell, config=replace(cell.config, budget=f"{num_steps}steps", init_from=begins_with, model=model))


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
