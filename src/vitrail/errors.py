"""What went wrong, told to the person who can mend it.

The command line shows a `VitrailError` as one line, with its table below, and exits with code 2. Anything else is a bug
of ours and keeps its traceback. `Event` is how long work tells of its progress without printing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


class VitrailError(Exception):
    """The input is wrong: the message says what it was, what was expected and what to do.

    Where two sides differ in several things, `table` has them for people: a heading, then rows of as many cells.
    """

    def __init__(self, message: str, table: Sequence[Sequence[str]] = ()) -> None:
        super().__init__(message)
        self.table = table


def require(condition: bool, message: str) -> None:
    """Raise VitrailError with `message` unless `condition` holds."""
    if not condition:
        raise VitrailError(message)


class Interrupted(Exception):  # noqa: N818 - not an error: the run is safe and can go on
    """Training was asked to stop, by the signal of this number, and has saved where it was."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class VitrailWarning(UserWarning):
    """The input is allowed but unlikely to be what was meant."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """`done` of `total` units of `task` are finished; `fields` are figures worth showing beside it.

    `milestone` marks the events that plain logs keep (one an epoch, say); the others only move a bar.
    `text` is something to be told once, in lines, beside all bars. `time_share` (0 to 1) is the part of the whole time
    that is over, where the units do not all take equally long.
    """

    task: str
    done: int
    total: int
    fields: Mapping[str, float | str] = field(default_factory=dict[str, float | str])
    milestone: bool = False
    text: str = ""
    time_share: float | None = None

    @property
    def progress(self) -> float:
        """How much of the work is over, 0 to 1, as far as one can tell; of no work all is."""
        if self.time_share is not None:
            return self.time_share
        return self.done / self.total if self.total else 1.0


def printable(text: str) -> str:
    """`text` as it may be shown: what would move a terminal's cursor, colour or reading direction is spelt out.

    The names of classes and files come from whoever made the data.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


Listener = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """The listener that shows nothing: the default when vitrail is called from Python."""
