"""Whether an interrupted run ends as an undisturbed one does, to the bit: tried here, with one's own config."""

import hashlib
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from vitrail.errors import Event, Listener, VitrailError, ignore_events
from vitrail.run import Run, create_run, load_run

# Each life of the disturbed run is to save about twice before it is killed, so that it always gets ahead.
SAVES_PER_LIFE = 2


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What came of it: SHA-256 of both runs' weights, and the saved step each life of the killed one had reached."""

    num_steps: int
    killed_after_steps: list[int]
    undisturbed_sha256: str
    killed_sha256: str
    same_metrics: bool

    @property
    def exact(self) -> bool:
        """Whether weights and metrics, times aside, are the same."""
        return self.undisturbed_sha256 == self.killed_sha256 and self.same_metrics


def verify_resume(
    config_of: str | Path, num_steps: int = 40, num_kills: int = 3, seed: int = 0, listener: Listener = ignore_events
) -> Verification:
    """Train a short run twice with the resolved config of a run, once undisturbed, once killed by SIGKILL and resumed.

    Args:
        config_of: a run folder, or its config.json; its data are read where the config says.
        num_steps: length of the short run; its schedule is that of a run of this length.
        num_kills: how often it is killed, each time at a moment drawn by `seed` after it has saved anew.

    Raises:
        VitrailError: if there is no such run, a number makes no sense, or a training fails of itself.
    """
    if num_kills < 1 or num_steps < 2 * SAVES_PER_LIFE * (num_kills + 1):
        raise VitrailError(
            f"{num_kills} kills in {num_steps} steps; give at least 1, and {2 * SAVES_PER_LIFE} steps for each life"
        )
    path = Path(config_of)
    config = load_run(path.parent if path.name == "config.json" else path).config
    every = num_steps // (SAVES_PER_LIFE * (num_kills + 1))
    config = replace(config, num_steps=num_steps, checkpoint_steps=every)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="vitrail-verify-") as scratch:
        undisturbed, killed = (create_run(Path(scratch) / name, config) for name in ("undisturbed", "killed"))
        listener(Event(task="verifying", done=0, total=num_kills + 2))
        _finish(_start(undisturbed))
        interval_s = every * config.optim.batch_size / undisturbed.read_metrics()[-1]["images_per_s"]
        reached: list[int] = []
        for i in range(num_kills):
            listener(Event(task="verifying", done=i + 1, total=num_kills + 2))
            reached.append(_live_and_die(killed, draw.uniform(0, interval_s)))
        listener(Event(task="verifying", done=num_kills + 1, total=num_kills + 2))
        _finish(_start(killed))
        listener(Event(task="verifying", done=num_kills + 2, total=num_kills + 2))
        return Verification(
            num_steps=num_steps,
            killed_after_steps=reached,
            undisturbed_sha256=hash_weights(undisturbed),
            killed_sha256=hash_weights(killed),
            same_metrics=timeless_metrics(undisturbed) == timeless_metrics(killed),
        )


def hash_weights(run: Run) -> str:
    """SHA-256 of the finished weights' file."""
    return hashlib.sha256(run.weights.read_bytes()).hexdigest()


def timeless_metrics(run: Run) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "elapsed_s")} for row in run.read_metrics()]


def newest_step(run: Run) -> int:
    """The step of the newest published checkpoint; 0 before the first."""
    return int(run.checkpoints[-1].name.removeprefix("step_")) if run.checkpoints else 0


def _start(run: Run) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vitrail", "train", "--resume", "--out", str(run.folder), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate()
    if process.returncode != 0:
        raise VitrailError(f"the short training ended with code {process.returncode}: {said.strip()[-400:]}")


def _live_and_die(run: Run, delay_s: float) -> int:
    """Resume, wait for a new checkpoint and `delay_s` more, kill; the step of the newest checkpoint then."""
    before, process = newest_step(run), _start(run)
    while newest_step(run) == before and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay_s)
    process.kill()
    _, said = process.communicate()
    if process.returncode >= 0:
        raise VitrailError(f"the short training ended by itself, with code {process.returncode}: {said.strip()[-400:]}")
    return newest_step(run)
