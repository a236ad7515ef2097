"""A trained model on one's own pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.batch import normalize
from vitrail.data import open_picture, to_pixels
from vitrail.errors import Event, Listener, VitrailError, ignore_events
from vitrail.run import Run, load_run


@dataclass(frozen=True)
class Guess:
    """A class and the model's probability for it, 0..1."""

    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one picture, best first."""

    path: str
    top: list[Guess]


class Classifier:
    """A run's model with its preprocessing and class names, ready for pictures."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model = run.load_model()
        self.classes = run.config.classes

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Image.Image]) -> Tensor:
        """Class probabilities [len(images), K] of upright pictures of any size.

        Raises:
            VitrailError: if they are not finite.
        """
        preprocessing = self.run.config.preprocessing
        size, channels = preprocessing.image_size, preprocessing.num_channels
        pixels = np.stack([to_pixels(image, size, channels) for image in images])
        probabilities = self.model(normalize(torch.from_numpy(pixels), preprocessing)).softmax(1)
        if not probabilities.isfinite().all():
            raise VitrailError(f"{self.run.weights} answers with NaN or infinity; train again")
        return probabilities

    def predict(
        self, images: Sequence[str | Path | Image.Image], top: int = 3, listener: Listener = ignore_events
    ) -> list[Prediction]:
        """The `top` likeliest classes of each file or picture.

        Files may have any size, mode (grey, RGBA, palette, CMYK, 16-bit) and EXIF orientation.

        Raises:
            VitrailError: naming the first file that cannot be read.
        """
        if top < 1:
            raise VitrailError(f"top is {top}; give at least 1")
        names = [image.__class__.__name__ if isinstance(image, Image.Image) else str(image) for image in images]
        opened = [open_picture(image) for image in images]
        predictions: list[Prediction] = []
        for i, (name, image) in enumerate(zip(names, opened, strict=True)):
            # One at a time: a picture's answer must not depend, in its last bit, on those beside it.
            probabilities, order = self.probabilities([image])[0].sort(descending=True)
            guesses = [
                Guess(self.classes[k], p) for k, p in zip(order[:top].tolist(), probabilities.tolist(), strict=False)
            ]
            predictions.append(Prediction(name, guesses))
            listener(Event(task="predicting", done=i + 1, total=len(images)))
        return predictions


def load(model: str | Path = "cifar10") -> Classifier:
    """Open a run folder, a checkpoint in it, or a model that ships, to predict with.

    Raises VitrailError if it is none of them.
    """
    return Classifier(load_run(model))
