"""The run folder: what a training leaves behind and everything after it reads. No pickle anywhere.

config.json         the resolved config: architecture, classes, preprocessing, budget, seed
environment.json    versions, machine, command
init.json           where its first weights came from, if from elsewhere, and what became of each
metrics.jsonl       one line per pass
model.safetensors   the finished weights, fp32
checkpoints/        step_NNNNNNNN/: all it takes to go on (checkpoint.py)
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.checkpoint import (
    find_damage,
    list_checkpoints,
    load_newest_checkpoint,
    load_tensors,
    read_json,
    refuse_pickle,
    save_checkpoint,
    save_tensors,
    sync,
    write_text,
    writing,
)
from vitrail.config import ResolvedConfig
from vitrail.errors import VitrailError
from vitrail.model import build_model
from vitrail.plain import from_dict, to_dict

# Runs that ship with the package; a name there is a model's name everywhere.
BUNDLED = Path(__file__).parent / "models"
# What every line of metrics.jsonl tells.
METRICS = ("step", "epoch", "train_loss", "val_loss", "val_accuracy", "lr", "images_per_s", "elapsed_s")


@dataclass(frozen=True)
class Run:
    """A run folder with its resolved config; `weights` is the file its model is read from."""

    folder: Path
    config: ResolvedConfig
    weights: Path

    @property
    def outputs(self) -> Path:
        """Where what is made of the run goes unless told otherwise: into it, or here if it ships with the package."""
        return Path() if self.folder.parent == BUNDLED else self.folder

    @property
    def checkpoints(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        return list_checkpoints(self._checkpoints_folder)

    @property
    def _checkpoints_folder(self) -> Path:
        return self.folder / "checkpoints"

    def read_metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl. Raises VitrailError if they are not what vitrail writes."""
        path = self.folder / "metrics.jsonl"
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            if all(isinstance(row[name], int | float) for row in rows for name in METRICS):
                return rows
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise VitrailError(f"{path} is not what vitrail writes: {error}") from error
        raise VitrailError(f"{path} is not what vitrail writes: it holds other things than numbers")

    def read_environment(self) -> dict[str, Any]:
        """Versions, machine and command, if the run kept them. Raises VitrailError for anything else."""
        path = self.folder / "environment.json"
        found = read_json(path) if path.exists() else {}
        command = found.get("command", []) if isinstance(found, dict) else None
        if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
            raise VitrailError(f"{path} is not what vitrail writes; remove it")
        return found

    def write_metrics(self, rows: list[dict[str, float]]) -> None:
        """Replace metrics.jsonl. Raises VitrailError if it cannot be written."""
        path = self.folder / "metrics.jsonl"
        with writing(path, self._checkpoints_folder):
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def save_checkpoint(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write a checkpoint at `values["step"]`. Raises VitrailError if it cannot be written."""
        save_checkpoint(self._checkpoints_folder, tensors, values)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest sound checkpoint's tensors and values, or None before the first."""
        return load_newest_checkpoint(self._checkpoints_folder)

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints of a finished run; its model stays."""
        if self._checkpoints_folder.exists():
            shutil.rmtree(self._checkpoints_folder)

    def save_model(self, state: Mapping[str, Tensor]) -> None:
        """Write the finished weights. Raises VitrailError if they cannot be written."""
        final = self.folder / "model.safetensors"
        partial = final.with_name(f".{final.name}.partial")
        with writing(final, self._checkpoints_folder):
            save_tensors(state, partial)
            partial.rename(final)
            sync(self.folder)

    def load_model(self) -> nn.Module:
        """The trained model, on the CPU, in fp32 and ready to evaluate.

        Raises:
            VitrailError: if there are no weights, or they do not fit the config.
        """
        if not self.weights.exists():
            raise VitrailError(
                f"{self.folder} has no {self.weights.name}: its training has not finished; "
                f"go on with `vitrail train --resume --out {self.folder}`, or name one of its checkpoints"
            )
        if self.weights.name == "state.safetensors" and (damage := find_damage(self.weights.parent)):
            raise VitrailError(f"{damage}; name another checkpoint")
        state = load_tensors(self.weights)
        if self.weights.name == "state.safetensors":
            prefix = "ema." if any(k.startswith("ema.") for k in state) else "model."
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        pre = self.config.preprocessing
        build = partial(build_model, self.config.model, pre.image_size, pre.num_channels, len(self.config.classes))
        head = state.get("head.weight")
        if head is not None and head.ndim and len(head) != len(self.config.classes):
            raise VitrailError(
                f"{self.weights} tells {len(head)} classes apart, its config names {len(self.config.classes)}; "
                "the two do not belong together"
            )
        with torch.device("meta"):  # shapes alone, which take no memory whatever the config says
            _check_fit(self.weights, state, build().state_dict())
        model = build()
        model.load_state_dict(state)
        return model.eval()


def _check_fit(weights: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise VitrailError unless the tensors in a file are those that a model has, by name, shape and kind of number."""
    for name in sorted(found.keys() | expected.keys()):
        theirs, ours = (
            f"{list(state[name].shape)}{'' if state[name].is_floating_point() else ' of whole numbers'}"
            if name in state
            else "nothing"
            for state in (found, expected)
        )
        if theirs != ours:
            raise VitrailError(
                f"{weights} does not fit its config.json: {name} is {theirs} there, {ours} by the config"
            )


def create_run(folder: Path, config: ResolvedConfig) -> Run:
    """Start a run folder. Raises VitrailError if it holds a run already or cannot be written."""
    check_vacant(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "environment.json", json.dumps(_environment(), indent=1))
        write_text(folder / "config.json", json.dumps(to_dict(config), indent=1))
    except OSError as error:
        raise VitrailError(f"cannot write to {folder}: {error.strerror}; give another --out") from error
    return Run(folder, config, folder / "model.safetensors")


def check_vacant(folder: Path) -> None:
    """Raise VitrailError if `folder` holds a run, or is no place to put one."""
    if (folder / "config.json").exists():
        raise VitrailError(f"{folder} already holds a run; go on with it by --resume, or give another --out")
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise VitrailError(f"cannot write to {folder}: {existing} is not a writable folder; give another --out")


def load_run(model: str | Path) -> Run:
    """Open a run folder, one checkpoint in it (`RUN/checkpoints/step_NNNNNNNN`), or a model that ships by its name.

    Raises:
        VitrailError: if it is none of them.
    """
    path = Path(model)
    refuse_pickle(path)
    if not path.exists() and str(model) in list_bundled():
        path = BUNDLED / model
    if (path / "state.safetensors").exists():
        folder, weights = path.parent.parent, path / "state.safetensors"
    else:
        folder, weights = path, path / "model.safetensors"
    config_file = folder / "config.json"
    if not config_file.exists():
        raise VitrailError(
            f"no model at {path}: expected a run folder with config.json, a checkpoint in one, "
            f"or a model that ships ({', '.join(list_bundled())})"
        )
    return Run(folder, from_dict(ResolvedConfig, read_json(config_file)), weights)


def list_bundled() -> list[str]:
    """The names of the models that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def _environment() -> dict[str, Any]:
    """Versions and machine, to read a number by later."""
    packages = ("vitrail", "torch", "torchvision", "numpy", "pillow")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        **{name: version(name) for name in packages},
    }
