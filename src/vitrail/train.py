"""Training: from a config to a finished run, and on from where one stopped."""

import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vitrail.checkpoint import write_text
from vitrail.config import ResolvedConfig, RunConfig, from_dict, to_dict
from vitrail.data import ImageSet, SampleStream, fingerprint, load_training_data
from vitrail.distributed import World, join_world
from vitrail.errors import Event, Interrupted, Listener, VitrailError, VitrailWarning, ignore_events
from vitrail.evaluate import compute_logits
from vitrail.learner import Learner
from vitrail.pretrained import fit_weights, read_weights
from vitrail.resolve import check_world, choose_machine, plan_num_steps, prepare_cpu, resolve, share_cores
from vitrail.run import Run, check_vacant, create_run, load_run

Tensors = Mapping[str, Tensor]
# After so many steps in a row whose loss or gradients were not finite, the run will not find back.
MAX_SKIPPED = 10


def train(config: RunConfig, out: str | Path, listener: Listener = ignore_events) -> Run:
    """Train a model, from nothing or from the weights of `config.init_from`, into the new run folder `out`.

    Under `torchrun` all its processes train the one model, and the first writes. Started again by it because
    one of them died, they go on with the run.

    Raises:
        VitrailError: if the config, the weights, the data or the folder will not do; nothing is left behind then.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint to resume from.
    """
    folder = Path(out)
    if _started_again() and (folder / "config.json").exists():
        begun = load_run(folder).config.asked()
        check_unchanged(begun, _chosen_alike(config, begun))
        return resume(folder, listener)
    check_vacant(folder)
    began = time.monotonic()
    with join_world() as world:
        config = choose_machine(config, world)
        prepare_cpu(config.threads)
        weights = read_weights(config.init_from) if config.init_from else None
        train_set, val_set, measured = load_training_data(config, listener)
        resolved = resolve(config, train_set, val_set, weights.adopt(measured) if weights else measured, world)
        start, report = fit_weights(weights, resolved) if weights else ({}, None)
        num_steps = plan_num_steps(resolved, train_set, val_set, time.monotonic() - began, world)
        resolved = replace(resolved, num_steps=num_steps)
        if world.leads:
            create_run(folder, resolved)
            if report is not None:
                write_text(folder / "init.json", json.dumps(asdict(report), indent=1))
                listener(Event(task="weights from elsewhere", done=1, total=1, text=report.describe()))
        run = Run(folder, resolved, folder / "model.safetensors")
        return _fit(run, train_set, val_set, listener, world, start=start)


def resume(out: str | Path, listener: Listener = ignore_events) -> Run:
    """Go on with the run in `out` exactly where its newest checkpoint stands.

    The run that results is, bit for bit on the same machine and as many processes, the one that would have been
    without the interruption. Raises VitrailError if the data has changed, and as `train` does.
    """
    run = load_run(out)
    if run.weights.exists():
        if _started_again():
            return run
        raise VitrailError(f"{run.folder} is finished; nothing is left to resume")
    with join_world() as world:
        run = _for_world(run, world)
        prepare_cpu(run.config.threads)
        train_set, val_set, _ = load_training_data(run.config, listener)
        _check_data(run, train_set, val_set)
        return _fit(run, train_set, val_set, listener, world, start={})


def _started_again() -> bool:
    """Whether torchrun has started this process anew after one of them died (its --max-restarts)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _chosen_alike(config: RunConfig, begun: RunConfig) -> RunConfig:
    """`config` with what it leaves to the machine, or to a match, chosen as it was for `begun`."""
    left_open = {"device": "auto", "precision": "auto", "threads": 0}
    chosen = {name: getattr(begun, name) for name, value in left_open.items() if getattr(config, name) == value}
    if config.model.match != "none":
        depth, width = begun.model.resnet_depth, begun.model.resnet_width
        chosen["model"] = replace(config.model, resnet_depth=depth, resnet_width=width)
    return replace(config, **chosen)


def check_unchanged(begun: RunConfig, asked: RunConfig) -> None:
    """Raise VitrailError, with both sides, if another run is asked for than the one begun."""
    for name, value in to_dict(begun).items():
        now = to_dict(asked)[name]
        if now != value:
            raise VitrailError(f"a resumed run keeps its config: {name} was {value}, now {now}; leave that flag out")


def _for_world(run: Run, world: World) -> Run:
    """The run as these processes can go on with it; warns if they are more or fewer than it began with."""
    check_world(run.config, world)
    begun = run.config.num_processes
    if world.size == begun:
        return run
    if world.leads:
        warnings.warn(
            f"{run.folder} began with {begun} processes and goes on with {world.size}: it will agree with an "
            "undisturbed run to rounding, not to the bit",
            VitrailWarning,
            stacklevel=3,
        )
    return replace(run, config=replace(run.config, threads=share_cores(world)))


def _check_data(run: Run, train_set: ImageSet, val_set: ImageSet) -> None:
    found, begun = fingerprint(train_set, val_set), run.config.data_sha256
    if found != begun:
        raise VitrailError(
            f"{run.config.data} has changed since {run.folder} began (SHA-256 {found[:12]}…, then {begun[:12]}…); "
            "resume needs the very same images"
        )


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


def _fit(run: Run, train_set: ImageSet, val_set: ImageSet, listener: Listener, world: World, *, start: Tensors) -> Run:
    """Train from the newest checkpoint, or from the weights to start from, to the last step."""
    config = run.config
    batch_size = config.optim.batch_size
    stream = SampleStream(train_set.labels, config.seed, config.input.balanced)
    learner = Learner(config, world)
    progress = _begin(run, learner, start, world)
    rows = [row for row in run.read_metrics() if row["step"] <= progress.step]
    last_saved = time.monotonic()
    with _stop_signals() as stop_requested:
        while progress.step < config.num_steps:
            began = time.monotonic()
            indices = stream.indices(progress.step * batch_size, batch_size)
            loss = learner.step(train_set.take(indices[learner.share]), progress.step)
            progress.add(loss, time.monotonic() - began)
            if progress.skipped_in_row == MAX_SKIPPED:
                raise _lost(run, stream, progress.step)
            row = progress.figures(config) | {"lr": config.optim.lr * learner.lr_factor(progress.step - 1)}
            finished = progress.step == config.num_steps
            pass_ended = finished or progress.step * batch_size % config.images_per_val < batch_size
            if pass_ended:
                row |= _validate(learner, val_set, config, progress, world)
                rows.append(row)
                if world.leads:
                    run.write_metrics(rows)
            elif rows:
                row["val_accuracy"] = rows[-1]["val_accuracy"]
            listener(
                Event(task="training", done=progress.step, total=config.num_steps, fields=row, milestone=pass_ended)
            )
            # One process's clock or signal counts for all, so that all save and leave after the same step.
            number, due = world.max(stop_requested(), _checkpoint_due(config, progress, last_saved))
            if pass_ended or number or due:
                _save(run, learner, progress, world)
                last_saved = time.monotonic()
            if number and not finished:
                raise Interrupted(f"stopped at step {progress.step} of {config.num_steps} and saved there", number)
    state = learner.result()
    if world.leads:
        run.save_model(state)
    world.wait()
    return run


def _begin(run: Run, learner: Learner, start: Tensors, world: World) -> _Progress:
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
