"""A process for each contender, so that none inherits another's threads, memory or settings."""

import multiprocessing
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any, Self

from vitrail.bench.peers import Setup
from vitrail.errors import VitrailError


class Worker:
    """A process that builds calls and times them when asked; idle, it waits and takes no time from the others."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def build(self, key: str, task: str, setup: Setup, batch_size: int) -> None:
        """Build a call under the name `key`, and make it twice so that it is warm. Raises VitrailError if it fails."""
        self._ask("build", key, task, setup, batch_size, self._threads)

    def time(self, key: str, seconds: float) -> float:
        """Repeat a call for at least `seconds`; returns the images per second."""
        return self._ask("time", key, seconds)

    def drop(self, key: str) -> None:
        """Forget a call."""
        self._ask("drop", key)

    def peak_memory_mb(self) -> float:
        """The most memory that the process has held so far, libraries included."""
        return self._ask("peak_memory_mb")

    def _ask(self, verb: str, *arguments: Any) -> Any:
        try:
            self._connection.send((verb, *arguments))
            done, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise VitrailError(f"a benchmark process ended in the middle of '{verb}'; was it out of memory?") from error
        if not done:
            raise VitrailError(answer)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()


def _serve(connection: Connection) -> None:
    """Answer the parent's requests until it hangs up. Ctrl-C is the parent's to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    calls: dict[str, tuple[Any, int]] = {}

    def build(key: str, task: Any, setup: Setup, batch_size: int, threads: int) -> None:
        from vitrail.bench.calls import build_call

        call = build_call(task, setup, batch_size, threads)
        call()
        call()
        calls[key] = call, batch_size

    def measure(key: str, seconds: float) -> float:
        call, batch_size = calls[key]
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds or count == 0:
            call()
            count += 1
        return count * batch_size / (time.perf_counter() - began)

    def peak_memory_mb() -> float:
        unit = 2**20 if sys.platform == "darwin" else 2**10  # getrusage(2): bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    verbs: dict[str, Any] = {"build": build, "time": measure, "drop": calls.pop, "peak_memory_mb": peak_memory_mb}
    while True:
        try:
            verb, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = verbs[verb](*arguments)
            connection.send((True, answer if verb != "drop" else None))
        except Exception as error:  # noqa: BLE001 - told to the parent, which names the contender
            connection.send((False, f"{type(error).__name__}: {error}".splitlines()[0]))
