"""The loop of steps: from the newest checkpoint to the last step, with stops that lose nothing."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vitrail.checkpoint import write_text
from vitrail.config import OptimConfig, ResolvedConfig
from vitrail.data import ImageSet, SampleStream
from vitrail.distributed import World
from vitrail.errors import Event, Interrupted, Listener, VitrailError
from vitrail.evaluate import compute_logits
from vitrail.learner import Learner
from vitrail.plain import from_dict
from vitrail.run import Run
from vitrail.schedule import time_share

# After so many steps in a row whose loss or gradients were not finite, the run will not find back.
MAX_SKIPPED = 10


@dataclass
class _Progress:
    """Where a run stands; saved with each checkpoint. The pass_ figures begin anew with each pass."""

    step: int = 0
    elapsed_s: float = 0.0
    skipped: int = 0
    skipped_in_row: int = 0
    pass_steps: int = 0
    pass_skipped: int = 0
    pass_loss: float = 0.0
    pass_s: float = 0.0

    def add(self, loss: float, seconds: float) -> None:
        """Count a step; a loss of NaN is that of one skipped."""
        self.step, self.pass_steps = self.step + 1, self.pass_steps + 1
        self.pass_s += seconds
        self.elapsed_s += seconds
        if math.isnan(loss):
            self.skipped, self.pass_skipped = self.skipped + 1, self.pass_skipped + 1
            self.skipped_in_row += 1
        else:
            self.pass_loss += loss
            self.skipped_in_row = 0

    def figures(self, config: ResolvedConfig) -> dict[str, float]:
        """What there is to tell of the pass so far."""
        figures = {
            "step": self.step,
            "epoch": self.step * config.optim.batch_size / config.epoch_images,
            "train_loss": self.pass_loss / max(1, self.pass_steps - self.pass_skipped),
            "images_per_s": self.pass_steps * config.optim.batch_size / self.pass_s,
        }
        return figures | ({"skipped_steps": self.skipped} if self.skipped else {})

    def ends_pass(self, config: ResolvedConfig) -> bool:
        """Whether a pass ended with this step, or the run."""
        batch_size = config.optim.batch_size
        return self.step == config.num_steps or self.step * batch_size % config.images_per_val < batch_size

    def tell(self, config: ResolvedConfig, fields: Mapping[str, float], *, milestone: bool) -> Event:
        """The event for those who watch."""
        over = time_share(self.step, config.num_steps, config.optim.coarse_fraction)
        return Event(
            task="training",
            done=self.step,
            total=config.num_steps,
            fields=fields,
            milestone=milestone,
            time_share=over,
        )


def run_steps(
    run: Run, train_set: ImageSet, val_set: ImageSet, listener: Listener, world: World, *, start: Mapping[str, Tensor]
) -> Run:
    """Train from the newest checkpoint, or else from the weights of `start`, to the last step, and save the model.

    Raises:
        VitrailError: if losses stay not finite, or the checkpoint does not fit the config.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint to resume from.
    """
    config = run.config
    stream = SampleStream(train_set.labels, config.seed, config.input.balanced)
    learner = Learner(config, world)
    progress = _begin(run, learner, start, world)
    rows = [row for row in run.read_metrics() if row["step"] <= progress.step]
    last_saved = time.monotonic()
    with _stop_signals() as stop_requested:
        while progress.step < config.num_steps:
            _take_step(learner, train_set, stream, config.optim, progress)
            if progress.skipped_in_row == MAX_SKIPPED:
                raise _lost(run, stream, progress.step)
            row = progress.figures(config) | {"lr": config.optim.lr * learner.lr_factor(progress.step - 1)}
            pass_ended = progress.ends_pass(config)
            if pass_ended:
                row |= _validate(learner, val_set, config, progress, world)
                rows.append(row)
                if world.leads:
                    run.write_metrics(rows)
            elif rows:
                row["val_accuracy"] = rows[-1]["val_accuracy"]
            listener(progress.tell(config, row, milestone=pass_ended))
            # One process's clock or signal counts for all, so that all save and leave after the same step.
            number, due = world.max(stop_requested(), _checkpoint_due(config, progress, last_saved))
            if pass_ended or number or due:
                _save(run, learner, progress, world)
                last_saved = time.monotonic()
            if number and progress.step < config.num_steps:
                raise Interrupted(f"stopped at step {progress.step} of {config.num_steps} and saved there", number)
    state = learner.result()
    if world.leads:
        run.save_model(state)
    world.wait()
    return run


def _take_step(
    learner: Learner, train_set: ImageSet, stream: SampleStream, optim: OptimConfig, progress: _Progress
) -> None:
    """One step, counted and timed."""
    began = time.monotonic()
    indices = stream.indices(progress.step * optim.batch_size, optim.batch_size)
    loss = learner.step(train_set.take(indices[learner.share]), progress.step)
    progress.add(loss, time.monotonic() - began)


def _begin(run: Run, learner: Learner, start: Mapping[str, Tensor], world: World) -> _Progress:
    """Bring the learner to the newest checkpoint, or to its first step.

    Weights from elsewhere are saved before that one: they may be gone or changed when the run is resumed.
    """
    checkpoint = run.load_checkpoint()
    if checkpoint is not None:
        try:
            learner.load_state(checkpoint[0])
            return from_dict(_Progress, checkpoint[1])
        except (KeyError, RuntimeError, VitrailError) as error:
            raise VitrailError(f"the checkpoint of {run.folder} does not fit its config.json: {error}") from error
    if start:
        learner.begin_with(start)
        _save(run, learner, _Progress(), world)
    elif run.config.init_from:
        raise VitrailError(f"{run.folder} was stopped before it had weights; train again with another --out")
    return _Progress()


def _checkpoint_due(config: ResolvedConfig, progress: _Progress, last_saved: float) -> bool:
    """Whether the config asks for a checkpoint now, by the clock or by the count of steps."""
    by_clock = config.checkpoint_minutes and time.monotonic() - last_saved > 60 * config.checkpoint_minutes
    by_steps = config.checkpoint_steps and progress.step % config.checkpoint_steps == 0
    return bool(by_clock or by_steps)


def _validate(
    learner: Learner, val_set: ImageSet, config: ResolvedConfig, progress: _Progress, world: World
) -> dict[str, float]:
    """Close a pass: the validation figures, with the time counted and the running sums begun anew."""
    began = time.monotonic()
    logits = compute_logits(learner.working_copy(), val_set, config.preprocessing, world=world)
    loss = F.cross_entropy(logits, val_set.labels).item()
    accuracy = (logits.argmax(1) == val_set.labels).double().mean().item()
    progress.elapsed_s += time.monotonic() - began
    progress.pass_steps, progress.pass_skipped, progress.pass_loss, progress.pass_s = 0, 0, 0.0, 0.0
    return {"val_loss": loss, "val_accuracy": accuracy, "elapsed_s": progress.elapsed_s}


def _lost(run: Run, stream: SampleStream, num_done: int) -> VitrailError:
    """What to say after too many skipped steps; writes down which images they were."""
    size, path = run.config.optim.batch_size, run.folder / "nonfinite.json"
    steps = range(num_done - MAX_SKIPPED, num_done)
    write_text(path, json.dumps({step: stream.indices(step * size, size).tolist() for step in steps}))
    return VitrailError(
        f"loss or gradients were not finite for {MAX_SKIPPED} steps in a row, up to step {num_done}; try a lower "
        f"--optim.lr or --optim.muon-lr, or look at the training images whose numbers are in {path}"
    )


def _save(run: Run, learner: Learner, progress: _Progress, world: World) -> None:
    """Save a checkpoint; raise VitrailError instead, in every process, if what it would hold is not finite."""
    state = learner.state()
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise VitrailError(
                f"{name} was not finite at step {progress.step}, and was not saved; "
                "try a lower --optim.lr or --optim.muon-lr"
            )
    if world.leads:
        run.save_checkpoint(state, asdict(progress))
    # Nobody leaves before it is written: torchrun ends all processes when one of them ends.
    world.wait()


@contextmanager
def _stop_signals() -> Generator[Callable[[], int]]:
    """Turn the first Ctrl-C or SIGTERM into a request, its number, heard between two steps; the second one kills.

    Only the main thread may set handlers; elsewhere nothing is ever requested.
    """
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, hear)
        yield lambda: heard[0] if heard else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
