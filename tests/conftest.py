"""Small data and small runs that the tests share."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.config import AugmentConfig, RunConfig
from vitrail.presets import get_preset
from vitrail.run import Run
from vitrail.train import train

# A shell lets what runs in its background ignore Ctrl-C, and the processes that it starts inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


def make_config(**changes: object) -> RunConfig:
    """The tiny preset, in fp32 and for half a pass, so that a run takes about a second."""
    return replace(get_preset("tiny"), **{"budget": "0.3epochs", "precision": "fp32", "threads": 1, **changes})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A digits model trained for a few steps: too little to be good, enough to be one."""
    return train(make_config(), tmp_path_factory.mktemp("run") / "digits")


def save_image(path: Path, colour: tuple[int, int, int], size: int = 16, seed: int = 0) -> Path:
    """A square of one colour with some noise on it."""
    noise = np.random.default_rng(seed).integers(-40, 40, (size, size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def colour_folder(tmp_path: Path) -> Path:
    """`train/<colour>/*.png`, twelve of each of three classes, and `test` with two of each."""
    root = tmp_path / "colours"
    for split, count in (("train", 12), ("test", 2)):
        for name, colour in COLOURS.items():
            for i in range(count):
                save_image(root / split / name / f"{i}.png", colour, seed=i)
    return root


def colour_config(folder: Path, **changes: object) -> RunConfig:
    """A run on `colour_folder` that takes a second."""
    return make_config(data=str(folder), budget="2epochs", augment=AugmentConfig(), **changes)
