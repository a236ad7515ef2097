"""What a comparison's recipes take on this machine: measured once, before the first run, and kept in `plan.json`.

A budget in time is turned into steps by this probe, in which all recipes take turns: so every seed of an arm does the
same number of steps however busy the machine is later, and a comparison that goes on repeats the same runs.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitrail.checkpoint import write_text
from vitrail.compare.questions import SIZES, scale_model
from vitrail.config import ResolvedConfig, RunConfig
from vitrail.data import ImageSet, load_training_data
from vitrail.errors import Event, Listener, VitrailError
from vitrail.plain import to_dict
from vitrail.resolve import SpeedProbe, choose_machine, count_training_flops, prepare_cpu, resolve
from vitrail.schedule import Budget

MIN_ROUNDS, MAX_ROUNDS, PROBE_S = 3, 25, 20.0
# Enough for every size of the images to have its share.
PROBED_STEPS = 1000
COST_GRIDS = (4, 6, 8, 12)
"""Patches along the side of an image, for cost against tokens."""


@dataclass(frozen=True)
class Speed:
    """What a recipe takes: seconds of a step and of a look at val, operations of a step, bytes it leaves and needs.

    `model` is its model as it was resolved: all cells of the recipe have this one, whatever share of the data they
    see, be it a ResNet matched to a ViT.
    """

    model: dict[str, Any]
    step_s: float
    val_s: float
    step_flops: float
    model_bytes: int
    checkpoint_bytes: int


@dataclass(frozen=True)
class Measurements:
    """`plan.json`: what was asked for, the machine as it was chosen, and what each recipe takes on it."""

    settings: Mapping[str, str]
    machine: Mapping[str, Any]
    read_s: float = 0.0
    speeds: Mapping[str, Speed] = field(default_factory=dict[str, Speed])
    cost: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def speed_of(self, config: RunConfig) -> Speed:
        """The speed of a config's recipe."""
        return self.speeds[_recipe(config)]

    def save(self, out: Path) -> None:
        """Write `plan.json` into `out`. Raises VitrailError if that cannot be done."""
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "plan.json", json.dumps(asdict(self), indent=1))
        except OSError as error:
            raise VitrailError(f"cannot write to {out}: {error.strerror}; give another --out") from error


def begin_measurements(out: Path, settings: Mapping[str, str], base: RunConfig) -> Measurements:
    """What `out` was begun with, or the start of it: the machine as it is chosen for all runs, nothing measured yet.

    Raises:
        VitrailError: if runs were begun there with other settings.
    """
    path = out / "plan.json"
    machine = choose_machine(base)
    new = Measurements(settings, {name: getattr(machine, name) for name in ("device", "precision", "threads")})
    if not path.exists():
        return new
    try:
        values = json.loads(path.read_text())
        known = Measurements(**values | {"speeds": {key: Speed(**speed) for key, speed in values["speeds"].items()}})
    except (ValueError, KeyError, TypeError) as error:
        raise VitrailError(f"{path} is not what vitrail writes ({error}); give another --out") from error
    for name, asked in settings.items():
        if known.settings.get(name) != asked:
            if not any((out / "cells").glob("*/config.json")):
                return new
            was = f"{out} was begun with {name} {known.settings.get(name)}, now it is {asked}"
            raise VitrailError(f"{was}; ask for the same to go on, or give another --out")
    return known


def measure(known: Measurements, base: RunConfig, configs: Iterable[RunConfig], listener: Listener) -> Measurements:
    """`known` with the speed of every recipe among `configs`; what it has already is not measured again."""
    recipes = {key: config for config in configs if (key := _recipe(config)) not in known.speeds}
    if not recipes:
        return known
    prepare_cpu(base.threads)
    began = time.monotonic()
    train_set, val_set, preprocessing = load_training_data(base, listener)
    read_s = time.monotonic() - began
    resolve_here = partial(resolve, train_set=train_set, val_set=val_set, preprocessing=preprocessing)
    found = {key: replace(resolve_here(config), num_steps=PROBED_STEPS) for key, config in recipes.items()}
    probes = {key: SpeedProbe(config, train_set, val_set) for key, config in found.items()}
    with_cost = known.settings["question"] == "scale" and not known.cost
    costs = _lay_out_cost(replace(resolve_here(base), num_steps=PROBED_STEPS)) if with_cost else []
    for i, (_, config) in enumerate(costs):
        images = _make_images(config)
        probes[str(i)] = SpeedProbe(config, images, images)
    # Only a budget in time depends on the answer.
    patience_s = PROBE_S if Budget.parse(base.budget).unit == "s" else 0.0
    times = _take_turns(probes, patience_s, listener)
    speeds = {key: _tell_speed(probes[key], times[key], config) for key, config in found.items()}
    cost = [
        {**varied, "gflop": _step_flops(config) / 1e9, "step_s": times[str(i)]}
        for i, (varied, config) in enumerate(costs)
    ]
    return replace(known, read_s=read_s, speeds={**known.speeds, **speeds}, cost=known.cost + cost)


def _take_turns(probes: Mapping[str, SpeedProbe], patience_s: float, listener: Listener) -> dict[str, float]:
    """The median seconds of a step of each, over rounds in which each has its turn."""
    rounds: list[list[float]] = []
    began = time.monotonic()
    while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and time.monotonic() - began < patience_s):
        rounds.append([probe.time_step() for probe in probes.values()])
        listener(Event(task="measuring speed", done=len(rounds), total=MAX_ROUNDS))
    return dict(zip(probes, map(statistics.median, zip(*rounds, strict=True)), strict=True))


def _tell_speed(probe: SpeedProbe, step_s: float, config: ResolvedConfig) -> Speed:
    tensors = (probe.learner.result(), probe.learner.state())
    model, state = (sum(tensor.nbytes for tensor in held.values()) for held in tensors)
    return Speed(to_dict(config.model), step_s, probe.time_validation(), _step_flops(config), model, state)


def _step_flops(config: ResolvedConfig) -> float:
    return count_training_flops(config) / config.num_steps


def _recipe(config: RunConfig) -> str:
    """A name for all of a config that decides its speed."""
    parts = [to_dict(getattr(config, name)) for name in ("model", "optim", "augment")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _lay_out_cost(resolved: ResolvedConfig) -> list[tuple[dict[str, Any], ResolvedConfig]]:
    """The ViT on images of several sizes, then in several widths, with the rest as it is and no coarse images."""
    model, pre = resolved.model, resolved.preprocessing
    resolved = replace(resolved, optim=replace(resolved.optim, coarse_fraction=0.0))
    grids = [(side, model) for side in COST_GRIDS]
    widths = [
        (pre.image_size // model.patch_size, replace(scale_model(model, factor), depth=model.depth)) for factor in SIZES
    ]
    laid_out: list[tuple[dict[str, Any], ResolvedConfig]] = []
    for varies, (side, sized) in [("patches", each) for each in grids] + [("width", each) for each in widths]:
        varied = {"varies": varies, "patches": side**2, "width": sized.embed_dim}
        resized = replace(pre, image_size=side * model.patch_size)
        laid_out.append((varied, replace(resolved, model=sized, preprocessing=resized)))
    return laid_out


def _make_images(config: ResolvedConfig) -> ImageSet:
    """A batch of noise: what a step costs does not depend on what it sees."""
    count, pre = config.optim.batch_size, config.preprocessing
    generator = torch.Generator().manual_seed(0)
    shape = (count, pre.num_channels, pre.image_size, pre.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % len(config.classes), config.classes, 0)
