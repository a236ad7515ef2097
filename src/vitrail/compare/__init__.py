"""What is said of Vision Transformers, measured: a question's grid of trainings, and what follows from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.compare.plan import Plan, make_plan
from vitrail.compare.session import run_plan
from vitrail.config import RunConfig
from vitrail.errors import Listener, ignore_events

__all__ = ["Plan", "compare", "make_plan", "run_plan"]


def compare(
    question: str,
    base: RunConfig,
    out: str | Path,
    listener: Listener = ignore_events,
    *,
    arms: Sequence[str] = (),
    num_seeds: int = 3,
) -> dict[str, Any]:
    """Plan a question's grid, do what is left of it, and return what `results.json` in `out` holds.

    Args and errors are those of `make_plan` and `run_plan`.
    """
    return run_plan(make_plan(question, base, Path(out), listener, arms=arms, num_seeds=num_seeds), listener)
