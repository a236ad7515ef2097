"""The flags of each verb, as typed dataclasses that tyro reads. Training's own are in `config`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vitrail.config import RunConfig


@dataclass
class TrainFlags:
    """Train a Vision Transformer, from nothing or from weights that are there."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """The run folder to make; by default runs/PRESET-DATA-NUMBER."""
    resume: bool = False
    """Go on with the run in --out, with the config it began with."""
    quiet: bool = False
    """Show no progress."""
    json: bool = False
    """Print one JSON object: the run folder, its last figures, and what it began with if not from nothing."""


@dataclass
class EvaluateFlags:
    """Measure a model on a split: accuracy with its 95% interval, loss, per class, confusion, calibration."""

    model: tyro.conf.Positional[str]
    """A run folder, a checkpoint in one, or a model that ships: cifar10."""
    data: str | None = None
    """The images; by default those the model was trained on."""
    split: Literal["test", "val", "train"] = "test"
    """Which of the splits. Choose on val; read test once, at the end."""
    out: Path | None = None
    """Folder for the figures and the picture; by default the run's, or here for a model that ships."""
    json: bool = False
    """Print one JSON object."""
    quiet: bool = False
    """Show no progress."""


@dataclass
class PredictFlags:
    """The likeliest classes of each picture."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Picture files of any size, mode and orientation."""
    model: str = "cifar10"
    """A run folder, a checkpoint in one, or a model that ships: cifar10."""
    top: int = 3
    """How many classes to show for each."""
    json: bool = False
    """Print one JSON object."""
    quiet: bool = False
    """Show no progress."""


@dataclass
class ExplainFlags:
    """Where the model looks in a picture: every head, rollout, and the evidence for a class, in one figure."""

    model: tyro.conf.Positional[str]
    """A run folder, a checkpoint in one, or a model that ships: cifar10."""
    image: tyro.conf.Positional[Path]
    """A picture file of any size, mode and orientation."""
    out: Path | None = None
    """The figure, .png, .svg or .pdf, with its numbers beside it as .json; by default IMAGE-explained.png here."""
    method: Literal["all", "attention", "rollout", "relevance", "evidence"] = "all"
    """All in one figure, or one map: attention of the last block, attention rollout, relevance for a class, or where
    a class's own query looks (only with --model.head label-query)."""
    label: str | None = None
    """The class that relevance and evidence speak for; by default the one predicted."""
    layer: int | None = None
    """Show the attention of this block alone, counted from 1."""
    head: int | None = None
    """Show the attention of this head alone, counted from 1; needs --layer."""
    fusion: Literal["mean", "max", "min"] = "mean"
    """How rollout makes one map of a block's heads."""
    discard_ratio: float = 0.0
    """Share of each token's smallest looks that rollout drops, from 0 to below 1."""
    json: bool = False
    """Print one JSON object: the numbers behind the figure."""


@dataclass
class ReportFlags:
    """Write one self-contained page on a run: how it trained, how good it is, how it sees, how far to trust that."""

    model: tyro.conf.Positional[str]
    """A run folder, a checkpoint in one, or a model that ships: cifar10."""
    out: Path | None = None
    """The page, with its numbers beside it as .json; by default report.html in the run folder, or here."""
    lang: Literal["en", "ko"] = "en"
    """Language of the page."""
    data: str | None = None
    """The images; by default those the model was trained on."""
    split: Literal["test", "val", "train"] = "test"
    """Which of the splits. Choose on val; read test once, at the end."""
    json: bool = False
    """Print one JSON object: the page and its main figures."""
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


@dataclass
class VerifyResumeFlags:
    """Train a short run twice with a run's config, once killed and resumed, and compare the results to the bit."""

    config: tyro.conf.Positional[Path]
    """A run folder, or its config.json; the run itself is left alone."""
    steps: int = 40
    """Length of the short run."""
    kills: int = 3
    """How often it is killed (SIGKILL), each time at a random moment after it has saved."""
    seed: int = 0
    """Draws the moments."""
    json: bool = False
    """Print one JSON object."""
    quiet: bool = False
    """Show no progress."""


@dataclass
class CompareFlags:
    """Measure what is said of Vision Transformers: a grid of trainings, with means, intervals and a picture.

    Stop it at any moment and give the same command again: what is finished is kept, and it goes on from there.
    """

    question: tyro.conf.Positional[str]
    """data, regularisation, transfer or scale."""
    data: str
    """Where the images come from: digits, cifar10, or a folder of images by class or of parquet files."""
    out: Path
    """Folder for the runs, results.json, the tables and the picture; one for each question."""
    budget: str = "1min"
    """Training of one run, as `2min`, `90s`, `20epochs` or `800steps`; time is turned into steps once, before the
    first run."""
    seeds: int = 3
    """Runs of each cell, with the seeds 0, 1, 2…; an interval needs two at least."""
    preset: str = "minute"
    """The recipe that all arms share but for what makes them an arm."""
    arms: str = ""
    """Some of the question's arms, as `vit,resnet`; by default all."""
    plan: bool = False
    """Print how many runs, how long and how much disk, and stop there."""
    json: bool = False
    """Print one JSON object: what results.json holds."""
    quiet: bool = False
    """Show no progress."""
