"""Training: from a config to a finished run, and on from where one stopped."""

import math
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from vitrail.config import ResolvedConfig, RunConfig
from vitrail.data import ImageSet, SampleStream, fingerprint, load_training_data
from vitrail.errors import Event, Listener, VitrailError, ignore_events
from vitrail.evaluate import compute_logits
from vitrail.learner import Learner
from vitrail.resolve import choose_machine, plan_num_steps, prepare_cpu, resolve
from vitrail.run import Run, check_vacant, create_run, load_run

CHECKPOINT_EVERY_S = 300


class Interrupted(Exception):  # noqa: N818 - not an error: the run is safe and can go on
    """Training was asked to stop and has saved where it was."""


def train(config: RunConfig, out: str | Path, listener: Listener = ignore_events) -> Run:
    """Train a model from nothing into the new run folder `out`.

    Raises:
        VitrailError: if the config, the data or the folder will not do; nothing is left behind then.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint to resume from.
    """
    check_vacant(Path(out))
    began = time.monotonic()
    config = choose_machine(config)
    prepare_cpu(config.threads)
    train_set, val_set, preprocessing = load_training_data(config, listener)
    resolved = resolve(config, train_set, val_set, preprocessing)
    num_steps = plan_num_steps(resolved, train_set, val_set, spent_s=time.monotonic() - began)
    return _fit(create_run(Path(out), replace(resolved, num_steps=num_steps)), train_set, val_set, listener)


def resume(out: str | Path, listener: Listener = ignore_events) -> Run:
    """Go on with the run in `out` exactly where its newest checkpoint stands.

    The run that results is, bit for bit on the same machine, the one that would have been without the
    interruption. Raises VitrailError if the data has changed, and as `train` does.
    """
    run = load_run(out)
    if run.weights.exists():
        raise VitrailError(f"{run.folder} is finished; nothing is left to resume")
    config = run.config
    prepare_cpu(config.threads)
    train_set, val_set, _ = load_training_data(config, listener)
    if fingerprint(train_set, val_set) != config.data_sha256:
        raise VitrailError(f"{config.data} has changed since {run.folder} began; resume needs the very same images")
    return _fit(run, train_set, val_set, listener)


@dataclass
class _Progress:
    """Where a run stands; saved with each checkpoint. The pass_ figures begin anew with each pass."""

    step: int = 0
    elapsed_s: float = 0.0
    pass_steps: int = 0
    pass_loss: float = 0.0
    pass_s: float = 0.0

    def add(self, loss: float, seconds: float) -> None:
        self.step, self.pass_steps = self.step + 1, self.pass_steps + 1
        self.pass_loss += loss
        self.pass_s += seconds
        self.elapsed_s += seconds

    def figures(self, config: ResolvedConfig) -> dict[str, float]:
        """What there is to tell of the pass so far."""
        return {
            "step": self.step,
            "epoch": self.step * config.optim.batch_size / config.epoch_images,
            "train_loss": self.pass_loss / self.pass_steps,
            "images_per_s": self.pass_steps * config.optim.batch_size / self.pass_s,
        }


def _fit(run: Run, train_set: ImageSet, val_set: ImageSet, listener: Listener) -> Run:
    """Train from the newest checkpoint, or from the start, to the last step."""
    config = run.config
    batch_size = config.optim.batch_size
    stream = SampleStream(train_set.labels, config.seed, config.input.balanced)
    learner, progress = Learner(config), _Progress()
    checkpoint = run.load_checkpoint()
    if checkpoint is not None:
        learner.load_state(checkpoint[0])
        progress = _Progress(**checkpoint[1])
    rows = [row for row in run.read_metrics() if row["step"] <= progress.step]
    last_saved = time.monotonic()
    with _stop_signals() as stop_requested:
        while progress.step < config.num_steps:
            began = time.monotonic()
            batch = train_set.take(stream.indices(progress.step * batch_size, batch_size))
            progress.add(_checked(learner.step(batch, progress.step), progress.step), time.monotonic() - began)
            row = progress.figures(config) | {"lr": config.optim.lr * learner.lr_factor(progress.step - 1)}
            finished = progress.step == config.num_steps
            pass_ended = finished or progress.step * batch_size % config.epoch_images < batch_size
            if pass_ended:
                row |= _validate(learner, val_set, config, progress)
                rows.append(row)
                run.write_metrics(rows)
            elif rows:
                row["val_accuracy"] = rows[-1]["val_accuracy"]
            listener(
                Event(task="training", done=progress.step, total=config.num_steps, fields=row, milestone=pass_ended)
            )
            if pass_ended or stop_requested() or time.monotonic() - last_saved > CHECKPOINT_EVERY_S:
                run.save_checkpoint(learner.state(), asdict(progress))
                last_saved = time.monotonic()
            if stop_requested() and not finished:
                raise Interrupted(f"stopped at step {progress.step} of {config.num_steps} and saved there")
    run.save_model(learner.result.state_dict())
    return run


def _validate(learner: Learner, val_set: ImageSet, config: ResolvedConfig, progress: _Progress) -> dict[str, float]:
    """Close a pass: the validation figures, with the time counted and the running sums begun anew."""
    began = time.monotonic()
    logits = compute_logits(learner.working_copy(), val_set, config.preprocessing)
    loss = F.cross_entropy(logits, val_set.labels).item()
    accuracy = (logits.argmax(1) == val_set.labels).double().mean().item()
    progress.elapsed_s += time.monotonic() - began
    progress.pass_steps, progress.pass_loss, progress.pass_s = 0, 0.0, 0.0
    return {"val_loss": loss, "val_accuracy": accuracy, "elapsed_s": progress.elapsed_s}


def _checked(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise VitrailError(f"the loss became {loss} at step {step}; try a lower --optim.lr or --optim.muon-lr")
    return loss


@contextmanager
def _stop_signals() -> Generator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request, heard between two steps; the second one kills.

    Only the main thread may set handlers; elsewhere nothing is ever requested.
    """
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, hear)
        yield lambda: bool(heard)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
