"""Training: from a config to a finished run, and on from where one stopped."""

import json
import os
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from vitrail.checkpoint import write_text
from vitrail.config import RunConfig
from vitrail.data import ImageSet, fingerprint, load_training_data
from vitrail.distributed import World, join_world
from vitrail.errors import Event, Listener, VitrailError, VitrailWarning, ignore_events
from vitrail.loop import run_steps
from vitrail.plain import to_dict
from vitrail.pretrained import fit_weights, read_weights
from vitrail.resolve import check_world, choose_machine, plan_num_steps, prepare_cpu, resolve, share_cores
from vitrail.run import Run, check_vacant, create_run, load_run


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
        return run_steps(run, train_set, val_set, listener, world, start=start)


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
        return run_steps(run, train_set, val_set, listener, world, start={})


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
