"""What people see while they wait."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from vitrail import console
from vitrail.console import ProgressDisplay
from vitrail.errors import Event


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def training(step: int, time_share: float) -> Event:
    return Event(task="training", done=step, total=100, time_share=time_share, milestone=True)


def test_the_time_left_is_that_of_the_whole_pictures_still_to_come(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """After half of the steps, a fifth of the time, in one minute, four are left."""
    with ProgressDisplay(quiet=False) as display:
        display(training(0, 0.0))
        clock.now += 60
        display(training(50, 0.2))
    assert capsys.readouterr().err.splitlines()[-1] == "training 50/100    4.0 min left"


def test_a_resumed_run_counts_from_where_it_began(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(quiet=False) as display:
        display(training(90, 0.8))
        clock.now += 60
        display(training(95, 0.9))
    assert capsys.readouterr().err.splitlines()[-1] == "training 95/100    1.0 min left"


def test_a_second_task_of_the_same_name_counts_anew(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The images of train are decoded, then those of val."""
    with ProgressDisplay(quiet=False) as display:
        for total in (1000, 10):
            display(Event(task="decoding images", done=0, total=total))
            clock.now += 120
            display(Event(task="decoding images", done=total // 2, total=total))
            clock.now += 120
            display(Event(task="decoding images", done=total, total=total))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("    ")[1] for line in lines] == ["2.0 min left", "0.0 min left"] * 2


def test_a_task_of_nothing_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    """A bench of less than half a second, or a comparison of such runs, rounds its total to none."""
    with ProgressDisplay(quiet=False) as display:
        display(Event(task="timing (seconds)", done=0, total=0, milestone=True))
    assert capsys.readouterr().err == "timing (seconds) 0/0    0.0 min left\n"


def test_a_terminal_shows_the_count_and_fills_the_bar_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(console, "Console", lambda **_: terminal)
    with ProgressDisplay(quiet=False) as display:
        display(training(50, 0.25))
    last = screen.getvalue().split("\r")[-1]
    assert "50/100" in last
    filled, rest = last.split("╺")
    assert (filled.count("━"), rest.count("━")) == (6, 17)


def test_a_narrow_terminal_keeps_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(console, "Console", lambda **_: terminal)
    fields = {"epoch": 1.0, "train_loss": 1.5, "val_accuracy": 0.5, "images_per_s": 1000.0, "lr": 1e-3}
    with ProgressDisplay(quiet=False) as display:
        display(replace(training(5000, 0.25), total=10000, fields=fields))
    last = screen.getvalue().split("\r")[-1]
    assert "5000/10000" in last
    assert "-:--:--" in last
