"""Alternating turns: each contender works for a moment, then the next, round after round.

Whatever else the machine does then falls on all alike, and ratios are taken within a round.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vitrail.bench.peers import Setup
from vitrail.bench.worker import Worker
from vitrail.errors import Event, Listener, VitrailError

NUM_ROUNDS = 7
MIN_ROUNDS = 2


@dataclass(frozen=True)
class Entry:
    """One call that takes turns: what, how, and for how many images at once."""

    task: str
    setup: Setup
    batch_size: int


@dataclass
class Stage:
    """What has been measured of one task: images per second by round, and ours over theirs in the same round."""

    ours: Entry
    rates: dict[Entry, list[float]] = field(default_factory=dict[Entry, list[float]])
    ratios: dict[Entry, list[float]] = field(default_factory=dict[Entry, list[float]])

    def add(self, rounds: dict[Entry, list[float]]) -> None:
        """Take in some rounds, of which ours was part."""
        for entry, rates in rounds.items():
            self.rates.setdefault(entry, []).extend(rates)
            if entry != self.ours:
                self.ratios[entry] = [a / b for a, b in zip(rounds[self.ours], rates, strict=True)]

    def fastest(self, entries: Sequence[Entry]) -> Entry:
        """Of `entries`, the one that ours is least ahead of."""
        return min((e for e in entries if e in self.ratios), key=lambda e: statistics.median(self.ratios[e]))

    def figures(self, entry: Entry) -> dict[str, Any]:
        """What to tell of an entry."""
        told = {"setup": str(entry.setup), "batch_size": entry.batch_size, "images_per_s": spread(self.rates[entry])}
        return told if entry == self.ours else {**told, "ratio": spread(self.ratios[entry])}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of some measurements, to four digits."""
    shown = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: float(f"{value:.4g}") for name, value in shown.items()} | {"rounds": len(values)}


class Session:
    """The workers, the time that is left, and what had to be left out."""

    def __init__(self, workers: dict[str, Worker], minutes: float, listener: Listener) -> None:
        self._workers = workers
        self._began, self._limit_s, self._listener = time.monotonic(), 60 * minutes, listener
        self._tried: dict[Entry, float] = {}
        self.left_out: list[str] = []

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def left_s(self) -> float:
        """Seconds until the bound; negative beyond it."""
        return self._limit_s - self.spent_s

    def has(self, name: str) -> bool:
        """Whether there is such a contender."""
        return name in self._workers

    def alternate(self, entries: Sequence[Entry], turn_s: float, reserve_s: float = 0.0) -> dict[Entry, list[float]]:
        """Images per second of each entry by round: seven rounds, or as many as leave `reserve_s` of the time.

        Entries that fail are named in `left_out` and missing from the answer.
        """
        ready = [entry for entry in dict.fromkeys(entries) if self._build(entry)]
        rounds: dict[Entry, list[float]] = {entry: [] for entry in ready}
        for i in range(NUM_ROUNDS):
            if i >= MIN_ROUNDS and self.left_s < reserve_s:
                break
            first = i % len(ready)
            for entry in ready[first:] + ready[:first]:
                rounds[entry].append(self._time(entry, turn_s))
        for entry in ready:
            self._workers[entry.setup.name].drop(str(entry))
        return rounds

    def screen(self, entries: Sequence[Entry], turn_s: float) -> Entry:
        """The fastest of some entries of one contender, by a single turn each; the first if no time is left.

        What had its turn in an earlier trial gets no other.
        """
        for entry in entries:
            if len(entries) > 1 and entry not in self._tried and self.left_s > 0 and self._build(entry):
                self._tried[entry] = self._time(entry, turn_s)
                self._workers[entry.setup.name].drop(str(entry))
        return max((e for e in entries if e in self._tried), key=lambda e: self._tried[e], default=entries[0])

    def peak_memory_mb(self, entry: Entry) -> float | None:
        """What its process has held at most, if the entry is the first that it ever ran."""
        if not self._build(entry):
            return None
        self._workers[entry.setup.name].drop(str(entry))
        return round(self._workers[entry.setup.name].peak_memory_mb())

    def _build(self, entry: Entry) -> bool:
        self._tell()
        try:
            self._workers[entry.setup.name].build(str(entry), entry.task, entry.setup, entry.batch_size)
        except VitrailError as error:
            self.left_out.append(f"{entry.setup.name}, {entry.setup}, {entry.task}: {error}")
            return False
        return True

    def _time(self, entry: Entry, turn_s: float) -> float:
        self._tell()
        return self._workers[entry.setup.name].time(str(entry), turn_s)

    def _tell(self) -> None:
        done, total = round(self.spent_s), round(self._limit_s)
        self._listener(Event(task="timing (seconds)", done=min(done, total), total=total))
