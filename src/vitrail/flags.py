"""The flags of each verb, as typed dataclasses that tyro reads. Training's own are in `config`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vitrail.config import RunConfig


@dataclass
class TrainFlags:
    """Train a Vision Transformer from nothing."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """The run folder to make; by default runs/PRESET-DATA-NUMBER."""
    resume: bool = False
    """Go on with the run in --out, with the config it began with."""
    quiet: bool = False
    """Show no progress."""
    json: bool = False
    """Print one JSON object: the run folder and its last figures."""


@dataclass
class EvaluateFlags:
    """Measure a model on a split: accuracy with its 95% interval, loss, per class, confusion, calibration."""

    model: tyro.conf.Positional[str]
    """A run folder, or a checkpoint in one."""
    data: str | None = None
    """The images; by default those the model was trained on."""
    split: Literal["test", "val", "train"] = "test"
    """Which of the splits. Choose on val; read test once, at the end."""
    out: Path | None = None
    """Folder for the figures and the picture; by default the run's."""
    json: bool = False
    """Print one JSON object."""
    quiet: bool = False
    """Show no progress."""


@dataclass
class PredictFlags:
    """The likeliest classes of each picture."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Picture files of any size, mode and orientation."""
    model: str
    """A run folder, or a checkpoint in one."""
    top: int = 3
    """How many classes to show for each."""
    json: bool = False
    """Print one JSON object."""
    quiet: bool = False
    """Show no progress."""


@dataclass
class BenchFlags:
    """This machine's speed: vitrail beside timm, vit-pytorch, transformers, torchvision, ONNX Runtime and OpenVINO."""

    minutes: float = 5.0
    """How long it may take; with more, compiled peers are timed too."""
    threads: int = 0
    """CPU threads for each contender; 0 takes one for each core."""
    json: bool = False
    """Print one JSON object."""
    quiet: bool = False
    """Show no progress."""
