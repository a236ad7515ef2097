"""The benchmark's figures as tables for people."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table


def build_tables(result: dict[str, Any]) -> Iterator[Table]:
    """First ours against the fastest of the others, then everyone's own figures."""
    table = Table("measure", "vitrail", "against", "ratio", "range")
    for task in (key for key in result if key == "training" or key.startswith("inference_")):
        figures = result[task]
        for kind in ("readme", "best"):
            if f"ratio_{kind}" in figures:
                ratio = figures[f"ratio_{kind}_spread"]
                between = f"{ratio['lowest']:.2f} to {ratio['highest']:.2f}"
                table.add_row(task, _our_rate(figures), figures[f"fastest_{kind}"], f"{ratio['median']:.2f}×", between)
    training, trace = result["training"], result["trace_over_forward"]
    limit = f"its bare matrix products, {training['limit_images_per_s']['median']:.0f} img/s"
    table.add_row("training", _our_rate(training), limit, f"{training['limit_share']:.0%}", "")
    table.add_row("data and augmentation", "", "the training step", f"{training['data_share']:.1%}", "")
    table.add_row("trace", "", "forward, in time", f"{trace['median']:.2f}×", "")
    yield table
    everyone = Table("who", "how", "task", "batch", "img/s", "vitrail is")
    for name, tasks in result["peers"].items():
        for task, entries in tasks.items():
            for entry in entries:
                rate, ratio = entry["images_per_s"]["median"], entry["ratio"]["median"]
                everyone.add_row(name, entry["setup"], task, str(entry["batch_size"]), f"{rate:.0f}", f"{ratio:.2f}×")
    yield everyone


def _our_rate(figures: dict[str, Any]) -> str:
    """Our own rate in a task."""
    return f"{figures['vitrail']['images_per_s']['median']:.0f} img/s"
