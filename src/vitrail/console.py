"""How progress looks: a moving bar on a terminal, plain lines elsewhere; always on standard error."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from vitrail.errors import Event

PLAIN_LINE_EVERY_S = 60
SHOWN = {
    "run": ("run", "{}"),
    "epoch": ("epoch", "{:.1f}"),
    "train_loss": ("loss", "{:.3f}"),
    "val_accuracy": ("val", "{:.1%}"),
    "skipped_steps": ("skipped", "{:.0f}"),
    "images_per_s": ("img/s", "{:.0f}"),
    "lr": ("lr", "{:.1e}"),
}


class ProgressDisplay:
    """A listener for `Event`s that draws them; use it as a context manager."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(),
            # They take the room that is left, so that on a narrow terminal they give way and not the time left.
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True)),
            console=self._console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, float]] = {}
        self._last_line: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars.live.is_started:
            self._bars.stop()

    def __call__(self, event: Event) -> None:
        if self._quiet:
            return
        if event.text:
            self._console.print(event.text, soft_wrap=True, markup=False, highlight=False)
        elif self._console.is_terminal:
            self._move_bar(event)
        else:
            self._print_line(event)

    def _move_bar(self, event: Event) -> None:
        task = self._tasks.get(event.task)
        if task is None or self._bars.tasks[task].finished:
            task = self._bars.add_task(event.task, total=1, count="", figures="")
            self._tasks[event.task] = task
        count = f"{event.done}/{event.total}"
        self._bars.update(task, completed=event.progress, count=count, figures=_figures(event.fields))

    def _print_line(self, event: Event) -> None:
        """A line for each milestone, else one a minute, so that short tasks stay silent."""
        now = time.monotonic()
        # A resumed run begins part of the way, so the pace counts from the first event.
        began, progress_before = self._began.setdefault(event.task, (now, event.progress))
        if event.milestone or now - self._last_line.get(event.task, began) > PLAIN_LINE_EVERY_S:
            self._last_line[event.task] = now
            pace = (now - began) / max(1e-9, event.progress - progress_before)
            left = f"{pace * (1 - event.progress) / 60:.1f} min left"
            print(
                f"{event.task} {event.done}/{event.total}  {_figures(event.fields)}  {left}",
                file=sys.stderr,
                flush=True,
            )
        if event.done == event.total:  # the next task of this name has a pace of its own
            self._began.pop(event.task)


def _figures(fields: Mapping[str, float | str]) -> str:
    return "  ".join(f"{label} {form.format(fields[key])}" for key, (label, form) in SHOWN.items() if key in fields)
