"""A comparison's runs, one after the other: each an ordinary run folder, trained, then shown its test split once."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitrail.compare.plan import Plan
from vitrail.compare.questions import Cell
from vitrail.compare.summary import summarise
from vitrail.compare.tables import save_results
from vitrail.config import InputConfig
from vitrail.errors import Event, Listener, VitrailError, ignore_events
from vitrail.evaluate import evaluate, save_evaluation
from vitrail.resolve import count_training_flops
from vitrail.run import Run, load_run
from vitrail.train import resume, train


def run_plan(plan: Plan, listener: Listener = ignore_events) -> dict[str, Any]:
    """Do every run that is left, with results and tables written anew after each; returns what `results.json` holds.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM in a training; the same plan goes on from there.
        VitrailError: as `train` and `evaluate` do, or if the images changed between two runs.
    """
    left = plan.left
    whole = _WholeGrid(listener, sum(map(plan.expect_seconds, left)))
    for number, cell in enumerate(left, 1):
        whole.begin(f"{number} of {len(left)}, {cell.name}", plan.expect_seconds(cell))
        _finish(cell, plan.folder(cell), whole)
        save_results(_collect(plan), plan.out)
    results = _collect(plan)
    if not left:
        save_results(results, plan.out)
    return results


class _WholeGrid:
    """Tells of a run's training as of a part of the whole comparison, in the seconds that were planned."""

    def __init__(self, listener: Listener, total_s: float) -> None:
        self._listener, self._total_s = listener, total_s
        self._done_s, self._run, self._run_s = 0.0, "", 0.0

    def begin(self, run: str, run_s: float) -> None:
        """The next run is called so and takes so many seconds."""
        self._done_s += self._run_s
        self._run, self._run_s = run, run_s

    def __call__(self, event: Event) -> None:
        if event.task == "training":
            done = self._done_s + self._run_s * event.progress
            told = Event(task="comparing (planned seconds)", done=round(done), total=round(self._total_s))
            fields = {"run": self._run, **event.fields}
            self._listener(replace(told, fields=fields, milestone=event.done == event.total))


def _finish(cell: Cell, folder: Path, listener: Listener) -> None:
    """Bring a run from where it stands to its end; what only its training needed is deleted then."""
    run = load_run(folder) if (folder / "config.json").exists() else None
    if run is not None and not run.weights.exists():
        if run.checkpoints:
            run = resume(folder, listener)
        else:  # stopped before there was anything to go on from
            shutil.rmtree(folder)
            run = None
    run = run or train(cell.config, folder, listener)
    save_evaluation(evaluate(run, split="test"), "test", folder)
    run.drop_checkpoints()


def _collect(plan: Plan) -> dict[str, Any]:
    """The finished cells as the run folders tell of them, and what follows from them."""
    finished = [cell for cell in plan.cells if plan.is_finished(cell)]
    runs = {cell.name: load_run(plan.folder(cell)) for cell in finished}
    _check_same_data(runs.values())
    cells = [_tell_cell(cell, runs[cell.name]) for cell in finished]
    return {
        **plan.measured.settings,
        "machine": dict(plan.measured.machine),
        "to_do": [cell.name for cell in plan.left],
        "cells": cells,
        "summary": summarise(plan.question, cells, plan.measured.cost),
    }


def _check_same_data(runs: Iterable[Run]) -> None:
    """Raise VitrailError if two runs that were to see the same images did not."""
    seen: dict[tuple[InputConfig, int], Run] = {}
    for run in runs:
        first = seen.setdefault((run.config.input, run.config.seed), run)
        if first.config.data_sha256 != run.config.data_sha256:
            raise VitrailError(
                f"{run.config.data} has changed between {first.folder} and {run.folder}; their results do not belong "
                "together: give another --out"
            )


def _tell_cell(cell: Cell, run: Run) -> dict[str, Any]:
    evaluation = json.loads((run.folder / "evaluation-test.json").read_text())
    last = run.read_metrics()[-1]
    return {
        "arm": cell.arm,
        "x": cell.x,
        "seed": run.config.seed,
        "test_accuracy": evaluation["accuracy"],
        "seconds": last["elapsed_s"],
        "pflop": count_training_flops(run.config) / 1e15,
        "kind": cell.kind,
        "regime": cell.regime,
        "num_steps": run.config.num_steps,
        "epochs": last["epoch"],
        "num_train": run.config.num_train,
        "run": cell.name,
    }
